"""Stock trl.DPOTrainer against shared prefixes: same weights, same pairs, same order, one process, step by step in turn.

    OMP_WAIT_POLICY=passive python tests/benchmarks/throughput.py --device cpu --pairs PAIRS.jsonl --tokenizer FOLDER
    python tests/benchmarks/throughput.py --device cuda --model qwen3-8b --pairs PAIRS.jsonl --tokenizer FOLDER \\
        --per_device 4 --max_length 2048 --steps 12 --repeats 3 --profile --output throughput.json

Each row of the table adds one technique to the row above it. Every step of every row runs on the same pairs, right after
the same step of the other rows, so that whatever else the machine does falls on all of them; the optimizer moves the
weights, and the largest difference of a step's loss to stock's says whether they moved alike. A ratio is that of the
times of all steps of one repeat: median, least and greatest over the repeats. Weights are random unless --model is a
folder: the speed of a dense model does not depend on them.

Tokens: `computed` are those that run through the layers, padding included; `needed` is every distinct token of the pairs
once. Useful work, for N weights in the layers' matrices: 2N per needed token forward, 2N backward (the weights are
frozen; LoRA's own get 4N) and 2N for the reference, and the same with the head's weights per scored token. MFU is that
work over the time, as a share of the rate of a plain matrix product on the same machine; attention and the
recomputation of checkpointing do not count, and stand in columns of their own.
"""

import argparse
import copy
import gc
import importlib.resources
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dpotrainer

# The small shapes stand in for a large model on a CPU: their vocabulary is cut (ids modulo its size), since on a CPU TRL
# scores every position, and the head would otherwise outweigh the layers, which it does not in a large model.
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6}
SHAPES = {
    "qwen3-2x64": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256},
    "qwen3-6x1024": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 16}
    | {"vocab_size": 2048},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"vocab_size": 151936},
}
TECHNIQUES = {  # each is added to those above it
    "stock": "trl.DPOTrainer as it is",
    "shared prefixes": "every distinct token once, without padding",
    "no LoRA input casts": "activations stay in half precision on their way into LoRA (CUDA)",
    "compiled layers": "torch.compile of each decoder layer, for any shape (--compile)",
}
KINDS = {  # of work, by the name of a kernel or operator; the first that matches
    "attention": r"flash|fmha|scaled_dot|attn",
    "head": r"_forward_kernel|_backward_kernel|ChunkedLogProb",
    "matrix products": r"gemm|nvjet|cutlass|cublas|aten::(mm|bmm|addmm|linear|matmul)",
    "copies, casts, gathers": r"copy|memcpy|memset|cat|index|gather|scatter|fill|aten::to",
    "reductions": r"reduce|norm|softmax|sum|mean|amax",
    "elementwise": r"elementwise|aten::",
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"a folder, or one of {', '.join(SHAPES)}; by default one for the device")
    parser.add_argument("--pairs", required=True, help="JSON lines of prompt, chosen, rejected: strings or messages")
    parser.add_argument("--tokenizer", required=True, help="a folder; without a chat template of its own, Qwen3's is used")
    parser.add_argument("--per_device", type=int, default=4, help="pairs per step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="steps in a repeat, each on other pairs")
    parser.add_argument("--repeats", type=int, default=3, help="how often to run those steps")
    parser.add_argument("--checkpointing", choices=("off", "on"), nargs="+", default=["off", "on"])
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="add the row of compiled layers")
    parser.add_argument("--profile", action="store_true", help="add the time by kind of work, of one step of each row")
    parser.add_argument("--output", help="a JSON file for every figure")
    return parser.parse_args()


def load_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        template = importlib.resources.files("trl") / "chat_templates" / "qwen3.jinja"
        tokenizer.chat_template = template.read_text()
    return tokenizer


def build_model(arguments):
    """The base model, in float32 on a CPU and bf16 on CUDA, made on the device itself."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    torch.manual_seed(arguments.seed)
    with torch.device(arguments.device):
        if arguments.model not in SHAPES:
            return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
        config = AutoConfig.for_model(**{**QWEN3, **SHAPES[arguments.model]})
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def build_row(technique, base, pairs, tokenizer, checkpointing, arguments):
    """A trainer with this technique and all above it. The rows share the base's weights; each has its own adapter."""
    place = list(TECHNIQUES).index(technique)
    model = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    if place >= 1:
        dpotrainer.share_prefixes(model)
    options = {"per_device_train_batch_size": arguments.per_device, "max_length": arguments.max_length}
    options |= {"learning_rate": arguments.learning_rate, "use_cpu": arguments.device == "cpu", "seed": arguments.seed}
    options |= {"bf16": arguments.device == "cuda", "report_to": [], "gradient_checkpointing": checkpointing}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(tempfile.mkdtemp(), gradient_checkpointing_kwargs={"use_reentrant": False}, **options),
        data_collator=dpotrainer.PreferenceCollator(0, arguments.max_length, share_prefixes=place >= 1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=arguments.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in trainer.model.modules() if place >= 2 else ():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    for layer in model.base_model.layers if place >= 3 else ():
        layer.compile(dynamic=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    return trainer


def build_rows(base, pairs, tokenizer, checkpointing, arguments):
    """The trainers, by technique, and their pairs as TRL tokenizes them."""
    techniques = list(TECHNIQUES)[: 4 if arguments.compile else 3]
    if arguments.device == "cpu":
        techniques.remove("no LoRA input casts")
    rows = {name: build_row(name, base, pairs, tokenizer, checkpointing, arguments) for name in techniques}
    vocabulary = base.config.vocab_size
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows_of_ids = rows["stock"].train_dataset.select_columns(columns)
    examples = [{name: [i % vocabulary for i in row[name]] for name in columns} for row in rows_of_ids]
    random.Random(arguments.seed).shuffle(examples)
    count = arguments.steps * arguments.per_device
    examples = (examples * -(-count // len(examples)))[:count]
    return rows, [examples[i : i + arguments.per_device] for i in range(0, count, arguments.per_device)]


def run_step(trainer, examples, device):
    """One optimizer step: (seconds, loss, peak bytes, seconds of processor time)."""
    batch = trainer.data_collator(examples)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size
    start, processor = time.perf_counter(), time.process_time()
    loss = trainer.training_step(trainer.model_wrapped, batch)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    loss = loss.item()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return seconds, loss, torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident(), processor


def peak_resident():
    """The largest size of this process in memory since the last reset, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 if peak else 0


def measure(rows, batches, arguments):
    """Every step of every repeat, row after row, in an order that turns: {row: [repeat][step] of (s, loss, bytes)}."""
    longest = max(batches, key=lambda examples: max(len(e["prompt_ids"] + e["chosen_ids"]) for e in examples))
    for trainer in rows.values():  # compiles, fills the allocator, moves nothing
        trainer.training_step(trainer.model_wrapped, trainer.data_collator(longest))
        trainer.model.zero_grad()
    taken = {name: [[] for _ in range(arguments.repeats)] for name in rows}
    for repeat in range(arguments.repeats):
        for i, examples in enumerate(batches):
            for name in sorted(rows, key=list(rows).index, reverse=(i + repeat) % 2 == 1):
                taken[name][repeat].append(run_step(rows[name], examples, arguments.device))
            losses = " ".join(f"{name} {taken[name][repeat][-1][0]:.2f}s" for name in rows)
            print(f"  repeat {repeat + 1} step {i + 1}: {losses}", file=sys.stderr, flush=True)
    return taken


def matmul_rate(device):
    """Floating-point operations per second of a plain product of square matrices: the machine's practical ceiling."""
    size, dtype, times = (8192, torch.bfloat16, 20) if device == "cuda" else (2048, torch.float32, 10)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(times + 2):
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[2:])


def count_work(base, adapter_weights, batches, arguments):
    """What the steps of one repeat take: tokens by kind, and useful, attention and recomputation operations."""
    collator = dpotrainer.PreferenceCollator(0, arguments.max_length)
    work = Counter()
    for examples in batches:
        batch = collator(examples)
        plan = batch["plan"]
        work["pairs"] += len(examples)
        work["computed"] += batch["input_ids"].numel()
        work["needed"] += plan["input_ids"].numel()
        work["scored"] += int(batch["completion_mask"][:, 1:].sum())
        lengths = zip(plan["query_lengths"], plan["key_lengths"])
        work["scores"] += sum(queries * (keys - queries) + queries * (queries + 1) // 2 for queries, keys in lengths)
    head = base.get_output_embeddings().weight.numel()
    layers = sum(w.numel() for name, w in base.base_model.named_parameters() if w.dim() == 2 and "embed" not in name)
    config = base.config
    work["recomputation"] = 2 * layers * work["needed"]
    work["useful"] = 3 * work["recomputation"] + 6 * adapter_weights * work["needed"] + 6 * head * work["scored"]
    score = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # products, forward
    work["attention"] = 4 * score * work["scores"]  # policy forward, twice that backward, reference forward
    return dict(work)


def summarize(taken, work, rate):
    """One dict of figures per row of the table."""
    stock, table = taken["stock"], []
    for name, repeats in taken.items():
        seconds = [sum(step[0] for step in repeat) for repeat in repeats]
        ratios = [sum(step[0] for step in old) / new for old, new in zip(stock, seconds)]
        each = [statistics.median(repeat[i][0] for repeat in repeats) for i in range(len(repeats[0]))]
        stock_each = [statistics.median(repeat[i][0] for repeat in stock) for i in range(len(each))]
        typical = sum(each)
        difference = max(abs(a[1] - b[1]) for old, new in zip(stock, repeats) for a, b in zip(old, new))
        table.append(
            {
                "row": name,
                "seconds_per_step": typical / len(each),
                "pairs_per_second": work["pairs"] / typical,
                "computed_per_second": work["computed" if name == "stock" else "needed"] / typical,
                "needed_per_second": work["needed"] / typical,
                "mfu": work["useful"] / typical / rate,
                "attention_share": work["attention"] / typical / rate,
                "recomputation_share": work["recomputation"] / typical / rate,
                "peak_gib": max(step[2] for repeat in repeats for step in repeat) / 2**30,
                "loss_difference": difference,
                "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
                "ratio_of_median_steps": sum(stock_each) / typical,
            }
        )
    return table


def print_table(table, checkpointing):
    heads = "pairs/s", "computed tok/s", "needed tok/s", "MFU", "attention", "recompute", "peak GiB", "max |dloss|", "ratio"
    print(f"\n| gradient checkpointing {'on' if checkpointing else 'off'} | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for row in table:
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])
        recomputed = f"{row['recomputation_share']:.1%}" if checkpointing else "-"
        print(
            f"| {'' if row['row'] == 'stock' else '+ '}{row['row']} | {row['pairs_per_second']:.2f} "
            f"| {row['computed_per_second']:,.0f} | {row['needed_per_second']:,.0f} | {row['mfu']:.1%} "
            f"| {row['attention_share']:.1%} | {recomputed} | {row['peak_gib']:.1f} | {row['loss_difference']:.1e} | {ratio} |"
        )


def profile_step(trainer, examples, device):
    """Milliseconds of one step by kind of work: kernels on CUDA, operators on a CPU."""
    activities = [getattr(torch.profiler.ProfilerActivity, device.upper())]
    with torch.profiler.profile(activities=activities) as profiler:
        run_step(trainer, examples, device)
    kinds = Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE)), "other")
        kinds[kind] += spent / 1e3
    return dict(kinds.most_common())


def describe_machine(arguments):
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    if arguments.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        machine = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    else:
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
        machine = f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {name: version(name) for name in names},
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }


def main():
    arguments = parse_arguments()
    arguments.model = arguments.model or {"cpu": "qwen3-6x1024", "cuda": "qwen3-8b"}[arguments.device]
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(arguments.tokenizer)
    pairs = [json.loads(line) for line in Path(arguments.pairs).read_text().splitlines()]
    base, rate, machine = build_model(arguments), matmul_rate(arguments.device), describe_machine(arguments)
    print(f"{machine}\nmatrix products: {rate / 1e12:.3f} TFLOP/s", flush=True)
    results = []
    for checkpointing in (choice == "on" for choice in arguments.checkpointing):
        rows, batches = build_rows(base, pairs, tokenizer, checkpointing, arguments)
        adapter = sum(w.numel() for w in rows["stock"].model.parameters() if w.requires_grad)
        work = count_work(base, adapter, batches, arguments)
        taken = measure(rows, batches, arguments)
        table = summarize(taken, work, rate)
        print_table(table, checkpointing)
        result = {"checkpointing": checkpointing, "work": work, "table": table, "steps": taken}
        if arguments.profile:
            result["profile_ms"] = {name: profile_step(row, batches[0], arguments.device) for name, row in rows.items()}
            print(f"\nmilliseconds of one step by kind of work: {json.dumps(result['profile_ms'], indent=2)}")
        results.append(result)
        del rows
        gc.collect()
    if arguments.output:
        everything = {**machine, "matmul_flops": rate, "arguments": vars(arguments), "results": results}
        Path(arguments.output).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
