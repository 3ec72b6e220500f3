"""Operations and memory of a DPO step of any size, stock and shared: no GPU, no weights.

    python tests/benchmarks/operations.py --model FOLDER --pairs PAIRS.jsonl

FOLDER holds a config.json and a tokenizer: those of Qwen3-8B for the figures of RESULTS.md. The
model is built of fake tensors, which have shapes alone, and runs the real batches: TRL's padded
rows, or the packed row of share_prefixes. Counted are the matrix products of the policy, of its
backward pass and of the reference, with LoRA, masks left out; and of TRL's head on the scored
tokens, policy, reference and backward pass with its recomputation.

The layers are alike: two and three are counted, and the others cost what the third one does.
`--full` counts them all, to the same figures in minutes. `--memory` also prints what torch's memory
tracker finds at the peak of a pass with its backward pass, beside the estimate of the plan.
"""

import argparse
import copy
import json
import math
import sys
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dpotrainer


class Count(NamedTuple):
    """Operations of a batch, by kind."""

    forward: int  # of the policy's layers
    backward: int  # with the recomputation of checkpointing
    reference: int
    head: int

    @property
    def total(self):
        return sum(self)


def build_policy(config, shared, checkpointing, rank=32):
    """The policy with LoRA on the meta device, in bf16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if shared:
            dpotrainer.share_prefixes(model)
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = get_peft_model(model, lora)
    if checkpointing:
        policy.enable_input_require_grads()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def make_batch(examples, shared, max_length):
    kind = dpotrainer.SharedPrefixCollator if shared else DataCollatorForPreference
    return kind(pad_token_id=0, max_length=max_length)(examples)


def run_backbone(policy, batch):
    """The layers' hidden states: rows padded, or packed where the batch has a layout."""
    given = {
        name: batch[name] for name in ("input_ids", "attention_mask", "layout") if name in batch
    }
    with torch.autocast("cpu", torch.bfloat16):
        return policy.get_base_model().base_model(**given, use_cache=False).last_hidden_state


def count_backward(gradient, query, key, *_, **__):
    """Operations of attention's backward pass, its recomputation left out."""
    return 8 * math.prod(query) * key[-2]


def count_operations(config, examples, shared, checkpointing=False, max_length=2048):
    """The Count of one batch."""
    policy = build_policy(config, shared, checkpointing)
    batch = make_batch(examples, shared, max_length)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        attention: dpotrainer.count_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: count_backward,
        torch.ops.aten._grouped_mm: dpotrainer.count_experts,
    }
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        disable_input_dtype_casting(policy),  # as the program does on a GPU
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        policy.to_empty(device="cpu")
        hidden = run_backbone(policy, batch)
        forward = counter.get_total_flops()
        hidden.sum().backward()
        backward = counter.get_total_flops() - forward
        with torch.no_grad(), policy.disable_adapter():
            run_backbone(policy, batch)
        reference = counter.get_total_flops() - forward - backward
    scored = int(batch["completion_mask"][:, 1:].sum())
    head = policy.get_base_model().get_output_embeddings().weight.numel()
    return Count(forward, backward, reference, 4 * 2 * head * scored)


class Tracker(MemTracker):
    """torch's memory tracker, for a model with frozen weights, on which it would hang hooks."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def track_peak(config, examples, shared, checkpointing=False, max_length=2048):
    """Bytes at the peak of a forward and backward pass of the layers, without the weights."""
    policy = build_policy(config, shared, checkpointing)
    batch = make_batch(examples, shared, max_length)
    with FakeTensorMode(allow_non_fake_inputs=True), disable_input_dtype_casting(policy):
        policy.to_empty(device="cpu")
        tracker = Tracker()
        tracker.track_external(policy)
        with tracker:
            run_backbone(policy, batch).sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    weights = sum(weight.untyped_storage().nbytes() for weight in policy.parameters())
    return peak["Total"] - weights


def estimate_peak(config, examples, shared, checkpointing=False, max_length=2048):
    """What the plan estimates in its place, from the batch's number of tokens alone."""
    batch = make_batch(examples, shared, max_length)
    rows, length = batch["input_ids"].shape
    if shared:
        rows //= 2
        length = math.ceil(batch["layout"]["input_ids"].numel() / rows)
    policy = build_policy(config, shared=False, checkpointing=False)
    size = dpotrainer.Pass(rows, length, scored=0)
    args = DPOConfig("unused", bf16=True, use_cpu=True, gradient_checkpointing=checkpointing)
    _, kept = dpotrainer.measure_pass(policy, size, args)
    if not checkpointing:
        return kept
    inputs = config.num_hidden_layers * rows * length * config.hidden_size * 2
    return inputs + dpotrainer.WITH_GRADIENTS * kept / config.num_hidden_layers


def read_pairs(path, tokenizer, count):
    """The first pairs as TRL's columns, Qwen3's chat template where the tokenizer has none."""
    if tokenizer.chat_template is None:
        template = files("trl") / "chat_templates/qwen3.jinja"
        tokenizer.chat_template = template.read_text()
    examples = []
    for line in Path(path).read_text().splitlines()[:count]:
        pair = json.loads(line)
        options = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, **options
        )
        example = {"prompt_ids": prompt}
        for side in ("chosen", "rejected"):
            row = tokenizer.apply_chat_template(pair["prompt"] + pair[side], **options)
            example[f"{side}_ids"] = row[len(prompt) :]
        examples.append(example)
    return examples


def cut_layers(config, layers):
    """The same model with fewer layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    return config


def measure_all_layers(measure, config, full=False):
    """measure(config) for all layers: from two and three of them, since the others are alike."""
    if full:
        return measure(config)
    two = measure(cut_layers(copy.deepcopy(config), 2))
    three = measure(cut_layers(copy.deepcopy(config), 3))
    return two + (config.num_hidden_layers - 2) * (three - two)


def count_pairs(config, examples, size, shared, checkpointing, arguments):
    """TFLOP a pair in batches of `size` pairs."""

    def count(config):
        total = 0
        for begin in range(0, len(examples), size):
            batch = examples[begin : begin + size]
            count = count_operations(config, batch, shared, checkpointing, arguments.max_length)
            total += count.total
        return total / len(examples) / 1e12

    return measure_all_layers(count, config, arguments.full)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder with config.json and a tokenizer")
    parser.add_argument("--pairs", required=True, help="JSON lines of prompt, chosen and rejected")
    parser.add_argument("--count", type=int, default=16, help="how many of the pairs")
    parser.add_argument("--per_device", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--full", action="store_true", help="count every layer")
    parser.add_argument("--memory", action="store_true", help="peak and estimate, 4 pairs a pass")
    arguments = parser.parse_args()
    config = AutoConfig.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples = read_pairs(arguments.pairs, tokenizer, arguments.count)

    for checkpointing, name in ((False, "checkpointing off"), (True, "checkpointing on")):
        print(f"\n| TFLOP a pair, {name} | stock | shared | ratio |\n|---|---|---|---|")
        # a packed row does not depend on what else is in the batch
        shared = count_pairs(config, examples, len(examples), True, checkpointing, arguments)
        for size in arguments.per_device:
            stock = count_pairs(config, examples, size, False, checkpointing, arguments)
            figures = f"{stock:.1f} | {shared:.1f} | {stock / shared:.2f}"
            print(f"| {size} pairs per device | {figures} |", flush=True)
    if not arguments.memory:
        return
    print("\n| GiB of activations, 4 pairs a pass | tracked peak | estimate |\n|---|---|---|")
    for shared, rows in ((True, "shared"), (False, "stock")):
        for checkpointing, name in ((False, "checkpointing off"), (True, "checkpointing on")):
            what = (examples[:4], shared, checkpointing, arguments.max_length)

            def track(config, what=what):
                return track_peak(config, *what)

            peak = measure_all_layers(track, config, arguments.full) / 2**30
            estimate = estimate_peak(config, *what) / 2**30
            print(f"| {rows}, {name} | {peak:.2f} | {estimate:.2f} |", flush=True)


if __name__ == "__main__":
    main()
