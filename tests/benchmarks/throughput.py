"""Stock trl.DPOTrainer against shared prefixes: same weights, same pairs, same order, one process,
steps in turn.

    OMP_WAIT_POLICY=passive python tests/benchmarks/throughput.py --device cpu \\
        --pairs PAIRS.jsonl --tokenizer FOLDER
    python tests/benchmarks/throughput.py --device cuda --model qwen3-8b \\
        --pairs PAIRS.jsonl --tokenizer FOLDER --per_device 4 --max_length 2048 \\
        --steps 12 --repeats 3 --profile --output throughput.json

Each row of the table adds one technique to the row above. Every step of every row runs right after
the same step of the other rows, so that whatever else the machine does falls on all alike; the
optimizer moves the weights, and the largest difference of a loss from stock's shows whether they
moved alike. A ratio is that of the summed times of one repeat's steps: median, least and greatest
over the repeats. On a CPU that other programs share, processor time is the steadier measure (with
OMP_WAIT_POLICY=passive, or waiting counts as work). Weights are random unless --model is a folder:
the speed of a dense model does not depend on them.

`computed` tokens run through the layers, padding included; `needed` tokens are the distinct ones of
the pairs. Useful work, for N weights in the layers' matrices: 2N per needed token forward, 2N
backward (the weights are frozen; LoRA's own get 4N) and 2N for the reference; the same with the
head's weights per scored token. MFU is that work over the time, as a share of the rate of a plain
matrix product on the same machine. Attention and the recomputation of checkpointing do not count
there and have columns of their own. Peak memory is the process's in a forward and backward pass of
the row's largest batch, after the repeats, with the base once and every row's adapter in it. On a
CPU, large tensors are given back to the system as they are freed, and the page faults of the next
ones are timed as well; larger batches have more of them. --keep_memory keeps such memory for the
process, as torch keeps a GPU's.
"""

import argparse
import copy
import ctypes
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dpotrainer

# The small shapes stand in for a large model on a CPU. There TRL scores every position, not only
# those of answers, so their vocabulary is cut (ids modulo its size) until the head takes the share
# of a step that it takes in Qwen3-8B.
SHAPES = {  # width, width of the MLP, layers, query heads, key heads, width of a head, vocabulary
    "qwen3-2x64": (64, 128, 2, 4, 2, 16, 256),
    "qwen3-6x1024": (1024, 3072, 6, 16, 8, 128, 2048),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936),
}
ROWS = (
    "stock",
    "+ shared prefixes",
    "+ no LoRA input casts",
    "+ compiled layers",
)  # each with all that stand before it
KINDS = {  # of work, by the name of a kernel or operator; the first that matches
    "attention": r"flash|fmha|scaled_dot|attn",
    "head": r"_forward_kernel|_backward_kernel|ChunkedLogProb",
    "matrix products": r"gemm|nvjet|cutlass|cublas|aten::(mm|bmm|addmm|linear|matmul)",
    "copies, casts, gathers": r"copy|memcpy|memset|cat|index|gather|scatter|fill|aten::to",
    "elementwise, reductions": r"elementwise|reduce|norm|softmax|aten::",
}


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--model", help=f"a folder, or {', '.join(SHAPES)}; by default the one for the device"
    )
    parser.add_argument("--pairs", required=True, help="JSON lines of prompt, chosen and rejected")
    parser.add_argument(
        "--tokenizer", required=True, help="a folder; Qwen3's chat template if it has none"
    )
    parser.add_argument("--per_device", type=int, default=4, help="pairs per step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument(
        "--steps", type=int, default=8, help="steps in a repeat, each on other pairs"
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often to run those steps")
    parser.add_argument("--checkpointing", choices=("off", "on"), nargs="+", default=["off", "on"])
    parser.add_argument(
        "--keep_memory", action="store_true", help="in the timed steps (CPU, glibc)"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=8, help="for the count of waiting")
    parser.add_argument("--global_batch", type=int, default=64, help="for the count of waiting")
    parser.add_argument("--compile", action="store_true", help="add the row of compiled layers")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="add the time by kind of work, of one step of each row",
    )
    parser.add_argument("--output", help="a JSON file for every figure")
    return parser.parse_args()


def build_model(arguments):
    """The base model, in float32 on a CPU and bf16 on CUDA, made on the device itself."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    torch.manual_seed(arguments.seed)
    if arguments.model not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(
            arguments.device
        )
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    sizes = dict(zip((*names, "head_dim", "vocab_size"), SHAPES[arguments.model]))
    with torch.device(arguments.device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", rope_theta=1e6, **sizes), dtype=dtype
        )


def build_trainer(row, base, pairs, tokenizer, checkpointing, arguments):
    """The trainer of a row.

    All rows share the base's weights; each has its own adapter, from the same seed.
    """
    place = ROWS.index(row)
    model = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    collator_class = DataCollatorForPreference
    if place >= 1:
        dpotrainer.share_prefixes(model)
        collator_class = dpotrainer.SharedPrefixCollator
    options = {
        "per_device_train_batch_size": arguments.per_device,
        "max_length": arguments.max_length,
    }
    options |= {
        "learning_rate": arguments.learning_rate,
        "use_cpu": arguments.device == "cpu",
        "seed": arguments.seed,
    }
    options |= {
        "bf16": arguments.device == "cuda",
        "report_to": [],
        "gradient_checkpointing": checkpointing,
    }
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            tempfile.mkdtemp(), gradient_checkpointing_kwargs={"use_reentrant": False}, **options
        ),
        data_collator=collator_class(0, arguments.max_length),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in trainer.model.modules() if place >= 2 else ():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    for layer in model.base_model.layers if place >= 3 else ():
        layer.compile(dynamic=True)
    trainer.current_gradient_accumulation_steps = 1  # what train() would have set
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(
        trainer.model, trainer.create_optimizer()
    )
    return trainer


def build_trainers(base, pairs, tokenizer, checkpointing, arguments):
    """The trainer of each row, and the batches of all steps of a repeat, as TRL tokenizes the
    pairs.
    """
    rows = [row for row in ROWS if arguments.compile or row != "+ compiled layers"]
    if arguments.device == "cpu":
        rows.remove("+ no LoRA input casts")  # nothing is cast in float32
    trainers = {
        row: build_trainer(row, base, pairs, tokenizer, checkpointing, arguments) for row in rows
    }
    columns, size = ("prompt_ids", "chosen_ids", "rejected_ids"), base.config.vocab_size
    examples = [
        {name: [i % size for i in row[name]] for name in columns}
        for row in trainers["stock"].train_dataset
    ]
    random.Random(arguments.seed).shuffle(examples)
    count = arguments.steps * arguments.per_device
    examples = (examples * -(-count // len(examples)))[:count]
    return trainers, [
        examples[i : i + arguments.per_device] for i in range(0, count, arguments.per_device)
    ]


def run_step(trainer, examples, device):
    """One optimizer step: (seconds, loss, seconds of processor time)."""
    batch = trainer.data_collator(examples)
    if device == "cuda":
        torch.cuda.synchronize()
    start, processor = time.perf_counter(), time.process_time()
    loss = trainer.training_step(trainer.model_wrapped, batch)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    loss = loss.item()  # waits for the GPU
    return time.perf_counter() - start, loss, time.process_time() - processor


def keep_memory(keep):
    """Whether large tensors of the CPU, once freed, stay with this process: glibc alone can be
    asked.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX: they come from the heap too
        libc.mallopt(
            -1, -1 if keep else 2**26
        )  # M_TRIM_THRESHOLD: the heap never shrinks; else, what glibc makes it
        libc.malloc_trim(0)


def measure_peak(trainer, batches, arguments):
    """Bytes at the peak of a forward and backward pass over the largest batch; 0 where they cannot
    be known.
    """
    batches, reset = map(trainer.data_collator, batches), Path("/proc/self/clear_refs")
    largest = max(batches, key=lambda batch: batch.get("layout", batch)["input_ids"].numel())
    if arguments.keep_memory:
        keep_memory(False)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif reset.exists():
        reset.write_text("5")  # resets VmHWM, the peak resident size
    trainer.training_step(trainer.model_wrapped, largest)
    trainer.model.zero_grad()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return (
        int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        if reset.exists()
        else 0
    )


def measure(trainers, batches, arguments):
    """Every step of every repeat, row after row, there and back: {row: [repeat][step] of what
    run_step returns}.
    """
    if arguments.keep_memory:
        keep_memory(True)
    for trainer in trainers.values():  # fills caches, compiles; moves nothing
        trainer.training_step(trainer.model_wrapped, trainer.data_collator(batches[-1]))
        trainer.model.zero_grad()
    taken = {row: [[] for _ in range(arguments.repeats)] for row in trainers}
    for repeat in range(arguments.repeats):
        for i, examples in enumerate(batches):
            for row in list(trainers)[:: -1 if (i + repeat) % 2 else 1]:
                taken[row][repeat].append(run_step(trainers[row], examples, arguments.device))
            seconds = "".join(
                f", {row} {repeats[repeat][-1][0]:.2f} s" for row, repeats in taken.items()
            )
            print(f"repeat {repeat + 1}, step {i + 1}{seconds}", file=sys.stderr, flush=True)
    return taken


def matmul_rate(device):
    """Floating-point operations per second of a plain product of square matrices: the machine's
    practical ceiling.
    """
    size, dtype, times = (
        (8192, torch.bfloat16, 20) if device == "cuda" else (2048, torch.float32, 10)
    )
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(times + 2):
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[2:])


def count_work(base, lora_weights, batches, arguments):
    """What the steps of one repeat take: tokens by kind, and operations by kind."""
    work, collator, config = (
        Counter(),
        dpotrainer.SharedPrefixCollator(0, arguments.max_length),
        base.config,
    )
    for examples in batches:
        batch = collator(examples)
        lengths = list(zip(batch["layout"]["query_lengths"], batch["layout"]["key_lengths"]))
        work["pairs"] += len(examples)
        work["computed"] += batch["input_ids"].numel()
        work["needed"] += sum(queries for queries, _ in lengths)
        work["scored"] += int(batch["completion_mask"][:, 1:].sum())
        work["scores"] += sum(
            queries * (2 * keys - queries + 1) // 2 for queries, keys in lengths
        )  # query-key pairs
    head = base.get_output_embeddings().weight.numel()
    layers = sum(
        w.numel()
        for name, w in base.base_model.named_parameters()
        if w.dim() == 2 and "embed" not in name
    )
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    work["recomputation"] = 2 * layers * work["needed"]
    work["useful"] = 6 * (layers + lora_weights) * work["needed"] + 6 * head * work["scored"]
    work["attention"] = (
        4 * 4 * config.num_hidden_layers * width * work["scores"]
    )  # forward, twice it back, reference
    return dict(work)


def count_waiting(dataset, arguments):
    """How much more than the mean the busiest process has to do, summed over steps: counted.

    {order: [when processes meet after a step (DDP), after each pass (FSDP, ZeRO), tokens of the
    largest pass]}.
    """
    collator, size = dpotrainer.SharedPrefixCollator(0, arguments.max_length), arguments.per_device
    needed = np.array([sum(collator([pair])["layout"]["query_lengths"]) for pair in dataset])
    step = min(
        arguments.global_batch,
        len(needed) // (size * arguments.processes) * size * arguments.processes,
    )
    needed, found = needed[: len(needed) // step * step], {}
    for name, sizes in (("random", np.ones_like(needed)), ("balanced", needed)):
        order, tokens = (
            dpotrainer.BalancedSampler(sizes, size, step // size, seed=arguments.seed),
            [],
        )
        for epoch in range(20):
            order.set_epoch(epoch)
            pairs = np.array(list(order))
            tokens.append(
                needed[pairs].reshape(
                    -1, step // size // arguments.processes, arguments.processes, size
                )
            )
        tokens = np.concatenate(tokens).sum(3)  # of each step, pass and process
        mean = tokens.sum() / arguments.processes
        found[name] = [
            tokens.sum(1).max(1).sum() / mean,
            tokens.max(2).sum() / mean,
            int(tokens.max()),
        ]
    print(
        f"\n| {arguments.processes} processes, {step} pairs per step "
        "| busiest to mean: step | pass | largest pass |"
    )
    print("| --- | --- | --- | --- |")
    for name, (a_step, a_pass, largest) in found.items():
        print(f"| {name} order | {a_step:.3f} | {a_pass:.3f} | {largest:,} tokens |", flush=True)
    return found


def ratio_to_stock(stock, repeats, field):
    """(median, least, greatest) over the repeats of stock's sum over its steps to this row's."""
    ratios = [
        sum(s[field] for s in old) / sum(s[field] for s in new) for old, new in zip(stock, repeats)
    ]
    return statistics.median(ratios), min(ratios), max(ratios)


def summarize(taken, peaks, work, rate):
    """One dict of figures per row of the table; rates are those of each step's median over the
    repeats.
    """
    stock, table = taken["stock"], []
    for row, repeats in taken.items():
        seconds = sum(statistics.median(step[0] for step in steps) for steps in zip(*repeats))
        figures = {
            "row": row,
            "seconds_per_step": seconds / len(repeats[0]),
            "pairs/s": work["pairs"] / seconds,
        }
        figures["computed tokens/s"] = work["computed" if row == "stock" else "needed"] / seconds
        figures["needed tokens/s"] = work["needed"] / seconds
        for name, kind in (
            ("MFU", "useful"),
            ("+ attention", "attention"),
            ("+ recomputation", "recomputation"),
        ):
            figures[name] = work[kind] / seconds / rate
        figures["peak GiB"] = peaks[row] / 2**30
        pairs_of_steps = (steps for old, new in zip(stock, repeats) for steps in zip(old, new))
        figures["loss difference"] = max(
            abs(theirs[1] - ours[1]) for theirs, ours in pairs_of_steps
        )
        figures["times stock"] = ratio_to_stock(stock, repeats, 0)
        figures["in processor time"] = ratio_to_stock(stock, repeats, 2)
        table.append(figures)
    return table


def print_table(table, checkpointing, device):
    ratio = "{0[0]:.2f} ({0[1]:.2f} to {0[2]:.2f})"
    shown = {
        "pairs/s": "{:.2f}",
        "computed tokens/s": "{:,.0f}",
        "needed tokens/s": "{:,.0f}",
        "MFU": "{:.1%}",
    }
    shown |= {"+ attention": "{:.1%}"} | ({"+ recomputation": "{:.1%}"} if checkpointing else {})
    shown |= {"peak GiB": "{:.1f}", "loss difference": "{:.1e}", "times stock": ratio}
    shown.update({"in processor time": ratio} if device == "cpu" else {})
    lines = [
        [f"checkpointing {'on' if checkpointing else 'off'}", *shown],
        ["---"] * (len(shown) + 1),
    ]
    lines += [
        [figures["row"], *(form.format(figures[name]) for name, form in shown.items())]
        for figures in table
    ]
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def profile_step(trainer, examples, device):
    """Milliseconds of one step by kind of work: of kernels on CUDA, of operators on a CPU."""
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    with torch.profiler.profile(activities=[activity]) as profiler:
        run_step(trainer, examples, device)
    kinds = Counter()
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE)),
            "other",
        )
        kinds[kind] += (
            event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        )
    return {kind: round(microseconds / 1e3) for kind, microseconds in kinds.most_common()}


def describe_machine(device):
    def run(*command):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    gpu = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    cpu = ["sh", "-c", "lscpu | sed -n 's/^Model name: *//p'"]
    name = run(*(gpu if device == "cuda" else cpu))
    return {
        "machine": f"{name}, {torch.get_num_threads()} CPU threads",
        "commit": run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")
        },
        "command": " ".join(["python", *sys.argv]),
    }


def main():
    arguments = parse_arguments()
    arguments.model = (
        arguments.model or {"cpu": "qwen3-6x1024", "cuda": "qwen3-8b"}[arguments.device]
    )
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.chat_template = (
        tokenizer.chat_template or (files("trl") / "chat_templates/qwen3.jinja").read_text()
    )
    pairs = [json.loads(line) for line in Path(arguments.pairs).read_text().splitlines()]
    base, rate, machine = (
        build_model(arguments),
        matmul_rate(arguments.device),
        describe_machine(arguments.device),
    )
    print(
        f"{json.dumps(machine, indent=1)}\nmatrix products: {rate / 1e12:.3f} TFLOP/s", flush=True
    )
    results = []
    for checkpointing in (choice == "on" for choice in arguments.checkpointing):
        trainers, batches = build_trainers(base, pairs, tokenizer, checkpointing, arguments)
        if not results:
            waiting = count_waiting(trainers["stock"].train_dataset, arguments)
        lora_weights = sum(
            w.numel() for w in trainers["stock"].model.parameters() if w.requires_grad
        )
        work, taken = (
            count_work(base, lora_weights, batches, arguments),
            measure(trainers, batches, arguments),
        )
        peaks = {
            row: measure_peak(trainer, batches, arguments) for row, trainer in trainers.items()
        }
        table = summarize(taken, peaks, work, rate)
        print_table(table, checkpointing, arguments.device)
        results.append(
            {"checkpointing": checkpointing, "work": work, "table": table, "steps": taken}
        )
        for figures in table if arguments.profile else ():
            figures["profile"] = profile_step(
                trainers[figures["row"]], batches[0], arguments.device
            )
            print(
                f"{figures['row']}, milliseconds of a step by kind of work: {figures['profile']}",
                flush=True,
            )
        del trainers
        gc.collect()
    if arguments.output:
        everything = {
            **machine,
            "matmul_flops": rate,
            "arguments": vars(arguments),
            "waiting": waiting,
            "results": results,
        }
        Path(arguments.output).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
