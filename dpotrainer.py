"""Align a language model with human preferences by Direct Preference Optimization (DPO), in one file.

    python dpotrainer.py                                      edit the constants below, run
    python dpotrainer.py --config FILE.yaml --beta 0.05       constants < YAML < command line
    accelerate launch --config_file configs/accelerate/ddp.yaml dpotrainer.py          several GPUs

Over pairs of a prompt x with a chosen answer y_w and a rejected one y_l, DPO (arXiv 2305.18290, eq. 7) minimises

    loss = -log sigmoid(reward(x, y_w) - reward(x, y_l)),    reward(x, y) = beta * (log pi(y | x) - log pi_ref(y | x)).

The log shows the means of reward(x, y_w) as rewards/chosen, of reward(x, y_l) as rewards/rejected, of their difference
as rewards/margins, and the share of pairs where that is positive as rewards/accuracies. trl.DPOTrainer trains; this
file decides what a good run is, checks it before it costs anything (`--dry_run true` shows the plan and one pair as
the model sees it), computes each pair's common prefix once, shows what happened, and loses nothing.

OUTPUT_DIR gets the adapter with tokenizer and model card, settings.yaml (`--config OUTPUT_DIR/settings.yaml` repeats
the run), metrics.jsonl, rewards.png, samples.md, checkpoint-N. The same command again continues an interrupted run.
"""

import argparse
import copy
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import accelerate
import datasets
import numpy as np
import pandas as pd
import peft
import torch
import torch.nn.functional as F
import transformers
import trl
import yaml
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg
from transformers.utils.peft_utils import find_adapter_config_file
from trl.data_utils import common_prefix_length

# fmt: off
# ----------------------------------------------------------------------------------------------- constants: edit these
MODEL_NAME = "Qwen/Qwen3-8B"  # hub name or folder of an instruct model, or of a PEFT adapter that SFT left behind
DATASET_NAME = "trl-lib/ultrafeedback_binarized"  # hub name, folder, or jsonl, json, parquet, csv file of pairs
OUTPUT_DIR = "qwen3-8b-dpo"  # everything that the run writes

BETA = 0.1  # weight of staying near the reference: 0.05 moves further, 0.5 stays closer; 0.1 is the paper's
LOSS_TYPE = "sigmoid"  # sigmoid (DPO), hinge, ipo, robust, ...: any of OBJECTIVES below, or a list of them
MAX_LENGTH = 2048  # tokens of prompt plus answer; what is longer loses its end

LEARNING_RATE = 5e-6  # ten times full fine-tuning's 5e-7 ("LoRA Without Regret", 2025); zephyr-7b-dpo-qlora's too
LR_SCHEDULER_TYPE = "cosine"  # cosine, linear, constant_with_warmup, ...; cosine is the zephyr-7b recipes'
WARMUP_STEPS = 0.1  # below 1: share of all steps; 0.1 is the zephyr-7b recipes'
NUM_TRAIN_EPOCHS = 1.0  # passes over the pairs; zephyr-7b-dpo-qlora stops after one, a second mostly overfits
GLOBAL_BATCH_SIZE = 64  # pairs per optimizer step over all GPUs, the paper's; accumulation is derived from it
PER_DEVICE_BATCH_SIZE = 4  # pairs per forward on one GPU: changes memory and speed; the result, of aot and sft alone

LORA_R = 32  # rank, 8 to 128; preferences need little capacity ("LoRA Without Regret", 2025)
LORA_ALPHA = 32  # the update is scaled by alpha / r, here 1, as in zephyr-7b-dpo-qlora (128 / 128)
LORA_DROPOUT = 0.0  # [0, 1); above 0 the policy's log-probs get noise; needs `disable_dropout: false` too
DTYPE = "bfloat16"  # of the frozen weights: bfloat16, float16, float32
BF16 = True  # bf16 autocast: Ampere GPUs (2020) and newer
GRADIENT_CHECKPOINTING = True  # recompute activations in the backward pass: a third more compute, far less memory

EVAL_PAIRS = 500  # pairs held out when the data set has no test split
EVAL_STEPS = 100  # optimizer steps between evaluations
SAVE_STEPS = 100  # optimizer steps between checkpoints
LOGGING_STEPS = 10  # optimizer steps between log lines
SEED = 42  # of adapter, order and held-out pairs
# -------------------------------------------------------------------------------------------------------- end of edits

# A constant is the setting of the same name in lower case, but for these; a misspelt one is refused.
RENAMED = {"MODEL_NAME": "model_name_or_path", "PER_DEVICE_BATCH_SIZE": "per_device_train_batch_size"}
OUR_DEFAULTS = {  # where a good run differs from TRL's defaults
    "use_peft": True, "lora_target_modules": "all-linear", "use_bnb_nested_quant": True,
    "eval_strategy": "steps", "save_total_limit": 2, "logging_first_step": True, "eval_delay": 0.0,
    "gradient_accumulation_steps": None, "per_device_eval_batch_size": None,  # check_settings derives them
    "logging_nan_inf_filter": False,  # it would hide a loss that is not finite; we stop at one
    "ddp_find_unused_parameters": False,  # every adapter weight gets a gradient
    "ddp_timeout": 7200,  # seconds: a slow first tokenization must not trip the processes that wait for it
}


# ------------------------------------------------------------------------------------------------------------ settings
@dataclass
class Settings:
    """What TRL has no name for; all else is in trl.ScriptArguments, trl.ModelConfig and trl.DPOConfig."""

    global_batch_size: int | None = HfArg(default=None, help="pairs per optimizer step over all processes")
    eval_pairs: int = HfArg(default=0, help="pairs held out when the data set has no test split")
    share_prefixes: bool = HfArg(default=True, help="compute each pair's common prefix once, and no padding")
    reference: Literal["auto", "copy", "adapter"] = HfArg(default="auto", help="auto: adapter off, or the SFT adapter "
        "if that is the start; copy: a second, frozen model; adapter: a frozen copy of the starting adapter")
    ref_model_name_or_path: str | None = HfArg(default=None, help="frozen model of `reference: copy`; else the start")
    fresh_adapter: bool = HfArg(default=False, help="merge the starting adapter and train a new one on top")
    chat_strings: bool = HfArg(default=False, help="wrap plain strings in the chat template")
    sample_prompts: int = HfArg(default=8, help="held-out prompts answered after training; 0: none")
    merge: bool = HfArg(default=False, help="also write the merged full model to OUTPUT_DIR/merged")
    dry_run: bool = HfArg(default=False, help="check everything, print the plan and one pair, then stop")
    overwrite: bool = HfArg(default=False, help="move an earlier run in output_dir aside and start afresh")


KINDS = (Settings, trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig)
OPTIONAL = {name for kind in KINDS for name, hint in get_type_hints(kind).items() if type(None) in get_args(hint)}
OBJECTIVES = {  # loss_type: what it does to the margin or the rewards, and where it is from
    "sigmoid": "logistic loss, DPO (arXiv 2305.18290, eq. 7)", "hinge": "hinge loss, SLiC (arXiv 2305.10425)",
    "ipo": "squared distance of the mean gap from 1/(2 beta), IPO (arXiv 2310.12036, eq. 17)",
    "robust": "logistic loss unbiased by flipped labels, equals sigmoid if label_smoothing is 0 (arXiv 2403.00409)",
    "exo_pair": "reverse KL, EXO (arXiv 2402.00856)", "nca_pair": "noise contrast, NCA (arXiv 2402.05369)",
    "sppo_hard": "squared distance to win or loss, SPPO (arXiv 2405.00675)", "discopop": "DiscoPOP (arXiv 2406.08414)",
    "bco_pair": "binary classifier, BCO (arXiv 2404.04656)", "aot": "sorted margins, AOT (arXiv 2406.05882)",
    "aot_unpaired": "sorted rewards, AOT (arXiv 2406.05882)", "apo_down": "both down, APO (arXiv 2408.06266)",
    "apo_zero": "chosen up, rejected down, APO (arXiv 2408.06266)", "sft": "cross-entropy of chosen",
    "sigmoid_norm": "logistic loss per token (arXiv 2405.14734)",
}
RULES = (  # settings; when the value v of one is wrong beside all settings s; why, and what to do
    ("beta learning_rate num_train_epochs logging_steps eval_steps save_steps",
     lambda v, s: v is not None and not 0 < v < math.inf, "must be > 0"),
    ("global_batch_size per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r "
     "lora_alpha max_length", lambda v, s: v is not None and v < 1, "must be >= 1"),
    ("eval_pairs sample_prompts warmup_steps max_grad_norm seed data_seed",
     lambda v, s: v is not None and not 0 <= v < math.inf, "must be >= 0"),
    ("max_steps", lambda v, s: v == 0, "would train one step; -1 trains whole epochs"),
    ("label_smoothing", lambda v, s: not 0 <= v < 0.5, "must lie in [0, 0.5)"),
    ("lora_dropout", lambda v, s: not 0 <= v < 1, "must lie in [0, 1)"),
    ("save_total_limit", lambda v, s: v is not None and v < 2, "must be >= 2: the newest may be half written"),
    ("accelerator_config auto_find_batch_size batch_eval_metrics dataloader_drop_last dataset_streaming hub_token "
     "enable_jit_checkpoint eval_use_gather_object ignore_data_skip load_best_model_at_end model_init_kwargs "
     "padding_free push_to_hub resume_from_checkpoint save_only_model sync_ref_model trust_remote_code "
     "use_liger_kernel", lambda v, s: v,
     "is ignored, runs an author's code, or breaks what is promised; leave it out"),
    ("use_peft eval_do_concat_batches train_sampling_strategy truncation_mode",
     lambda v, s: v not in (True, "random", "keep_start"), "would break what is promised; leave it out"),
    ("loss_type", lambda v, s: {*v} - {*OBJECTIVES}, f"is unknown; one of {', '.join(OBJECTIVES)}"),
    ("loss_weights", lambda v, s: v and (len(v) != len(s.loss_type) or not np.isfinite(v).all()),
     "must be one number for each loss_type; mend the list"),
    ("label_smoothing", lambda v, s: v and not {"robust", "exo_pair", "aot", "aot_unpaired"}.intersection(s.loss_type),
     "is for robust, exo_pair, aot and aot_unpaired; leave it out"),
    ("label_smoothing", lambda v, s: not v and "exo_pair" in s.loss_type, "must be above 0 for exo_pair; 1e-3"),
    ("save_strategy", lambda v, s: v not in ("steps", "epoch"), "would leave nothing to resume from; steps"),
    ("torch_compile_backend torch_compile_mode", lambda v, s: v and not s.torch_compile, "is idle; set torch_compile"),
    ("discopop_tau", lambda v, s: v != 0.05 and "discopop" not in s.loss_type, "is for discopop; leave it out"),
    ("lora_dropout", lambda v, s: v and s.disable_dropout, "has no effect; add `disable_dropout: false`"),
    ("ref_model_name_or_path", lambda v, s: v and s.reference != "copy", "has no effect; add `reference: copy`"),
    ("reference", lambda v, s: v == "adapter" and s.fresh_adapter, "copies what fresh_adapter merges; auto"),
    ("precompute_ref_log_probs merge", lambda v, s: v and (is_sharded() or s.fsdp or s.deepspeed),
     "needs a model in one piece; leave it out"),
    ("fresh_adapter", lambda v, s: v and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3",
     "cannot be merged while ZeRO-3 shards its base; use fsdp2.yaml, or merge it first"),
    ("merge", lambda v, s: v and (s.load_in_4bit or s.load_in_8bit), "needs a bf16 base; README, 'Merging', says how"),
    ("model_name_or_path dataset_name output_dir dtype", lambda v, s: not v, "is empty; give a value"),
    ("model_name_or_path dataset_name ref_model_name_or_path",
     lambda v, s: re.search(r"^[./~]|/.*/|\.(jsonl?|parquet|csv)$", v or "") and not os.path.exists(v),
     "there is no such file or folder; check the path"),
    ("output_dir", lambda v, s: v and not os.access(  # with a slash, a file is refused
        f"{next(filter(os.path.exists, [v, *Path(v).absolute().parents]))}/", os.W_OK | os.X_OK),
     "is not a folder that can be written; choose another"),
)
MACHINE_RULES = (  # the same, of what the machine must have
    ("use_cpu", lambda v, s: not v and not torch.cuda.is_available(),
     "no CUDA GPU; `python dpotrainer.py --config configs/quickstart.yaml` runs anywhere"),
    ("use_cpu", lambda v, s: not v and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ,
     "several GPUs but one process; `accelerate launch --config_file configs/accelerate/ddp.yaml dpotrainer.py`"),
    ("bf16", lambda v, s: v and torch.cuda.is_available() and not (s.use_cpu or torch.cuda.is_bf16_supported(False)),
     "needs an Ampere GPU (2020) or newer; `--bf16 false --fp16 true --dtype float16`"),  # False: not by emulation
    ("report_to", lambda v, s: v and not all(name in ("all", "none") or find_spec(name) for name in np.atleast_1d(v)),
     "is not installed; `pip install tensorboard`, `pip install wandb` or `pip install trackio`"),
    ("load_in_4bit load_in_8bit optim", lambda v, s: re.search("True|bnb|paged|lion|ademamix|adamw_8bit", str(v))
     and not find_spec("bitsandbytes"), "needs bitsandbytes; `pip install bitsandbytes`"),
)
# fmt: on


class UserError(Exception):
    """Ends the program with this message and no traceback; status 2 is a mistake that the message says how to mend."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_sharded() -> bool:
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in ("FSDP", "DEEPSPEED"))


def say(*lines: Any) -> None:
    if lines and is_main():
        print(*lines, sep="\n", flush=True)


def parse_settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Constants, then the YAML file, then flags: one namespace of every field of KINDS, and all problems found."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file of settings, by the names below")
    file, argv = first.parse_known_args(argv)
    try:
        in_file = {**yaml.safe_load(Path(file.config).read_text("utf-8"))} if file.config else {}
        os.environ |= {name: str(value) for name, value in in_file.pop("env", {}).items()}  # as `trl dpo` does
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--config {file.config}: {why}; give a file of lines such as `beta: 0.1`") from None
    names = re.findall(r"^([A-Z]\w*) *[:=]", Path(__file__).read_text("utf-8").split("end of edits")[0], flags=re.M)
    constants = {RENAMED.get(name, name.lower()): globals()[name] for name in names}
    parser = trl.TrlParser(KINDS, parents=[first], allow_abbrev=False, exit_on_error=False)
    parser._option_string_actions["--report_to"].nargs = "+"  # its type is a text or a list of texts
    parser.set_defaults_with_config(**OUR_DEFAULTS)
    s, problems = parser.parse_args([]), []
    parser.set_defaults_with_config(**constants)  # for --help
    constants |= {"global_batch_size": None} if in_file.get("gradient_accumulation_steps") else {}  # as `trl dpo`
    values = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in (constants | in_file).items()}
    nulls = [name for name in values if values[name] is None and (name in OPTIONAL or vars(s).get(name, "") is None)]
    vars(s).update({name: values.pop(name) for name in nulls})  # no flag can say it; all else is checked as a flag
    flags = [[f"--{name}", *map(str, v)] if isinstance(v, list) else [f"--{name}={v}"] for name, v in values.items()]
    flags += [words.split("\0") for words in re.split("\0(?=--)", "\0".join(argv)) if words]  # each with its values
    for words in flags:
        try:
            if unknown := parser.parse_known_args(words, s)[1]:
                closest = difflib.get_close_matches(words[0].partition("=")[0], vars(s), n=1, cutoff=0)[0]
                problems.append(f"{' '.join(words)}: {unknown[0]!r} is not a setting; did you mean {closest}?")
        except argparse.ArgumentError as error:
            problems.append(str(error))
    for name in ("model_name_or_path", "dataset_name", "output_dir", "ref_model_name_or_path"):
        setattr(s, name, getattr(s, name) and os.path.expanduser(getattr(s, name)))
    return s, problems


def find_broken(s: argparse.Namespace, rules: tuple) -> list[str]:
    shown = vars(s) | {"hub_token": "..."}
    return [f"{name}={shown[name]}: {text}" for names, is_wrong, text in rules for name in names.split()
            if is_wrong(getattr(s, name), s)]  # fmt: skip


def check_settings(s: argparse.Namespace) -> list[str]:
    """Derive the batch; all that is wrong, each with its fix, before anything is downloaded or written."""
    problems, world = find_broken(s, RULES), int(os.getenv("WORLD_SIZE", 1))
    size, passes = max(1, s.per_device_train_batch_size), s.gradient_accumulation_steps
    s.per_device_eval_batch_size = s.per_device_eval_batch_size or size
    s.global_batch_size = s.global_batch_size or size * (passes or 1) * world
    s.gradient_accumulation_steps = passes or s.global_batch_size // (size * world)
    if s.global_batch_size != size * s.gradient_accumulation_steps * world:
        sizes = [n for n in range(1, 1000) if s.global_batch_size % (n * world) == 0]
        made = f"{size} per device x {passes or 'any'} accumulation x {world} processes"
        fix = f"leave accumulation out, and take one of {sizes} per device, or a multiple of {world}"
        problems.append(f"global_batch_size={s.global_batch_size}: is not {made}; {fix}")
    if not problems:
        trl.ModelConfig.__post_init__(s)  # a single one of lora_target_modules may be a pattern, or "all-linear"
    return problems


# --------------------------------------------------------------------------------------------------------- preferences
SIDES = ["prompt", "chosen", "rejected"]
LAYOUTS = {  # what the columns of SIDES and `conversations` hold, as far as they are there
    "standard": dict.fromkeys(SIDES, "text"), "conversational": dict.fromkeys(SIDES, "messages"),
    "conversations": dict.fromkeys(SIDES[1:], "messages"), "transcripts": dict.fromkeys(SIDES[1:], "transcript"),
    "prompt beside conversations": {"prompt": "text", "chosen": "messages", "rejected": "messages"},
    "ShareGPT": {"conversations": "messages", "chosen": "messages", "rejected": "messages"},
}  # fmt: skip
SCORES = [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating")]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}
CODED = r"""\s*(Human:|\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:)"""  # how a text with turns in it begins
RAW = "{% for message in messages %}{{ message.content }}{% endfor %}"  # plain text's chat template
PREPARED = {f"{side}_ids": datasets.List(datasets.Value("int32")) for side in SIDES}
PREPARED |= dict.fromkeys((*SIDES, "pair_hash", "needed_tokens"), datasets.Value("int64"))  # SIDES: uncut tokens
PREPARED |= {"dropped": datasets.Value("string")}  # why the pair is not used, or ""
as_yaml = functools.partial(yaml.safe_dump, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**6)


def recognise_layout(dataset, source: str) -> str:
    """The layout of the columns, each judged by its first filled cell of the first 100 rows."""
    found, names = {}, {str: "text", list: "messages", dict: "messages"}
    for column, cells in dataset[:100].items():
        cell = next(filter(None, cells), None)
        found[column] = names.get(type(cell), type(cell).__name__)
        if isinstance(cell, str) and (special := re.match(CODED, cell)) and column != "prompt":
            found[column] = "transcript" if special[1] == "Human:" else "JSON in a text: parse it"
    sides = {column: found[column] for column in ("conversations", *SIDES) if column in found}
    if sides in LAYOUTS.values():
        return next(layout for layout, kinds in LAYOUTS.items() if kinds == sides)
    table = as_yaml({"columns found": found, **LAYOUTS})
    raise UserError(f"{source}: the columns fit no known layout, or more than one; rename or remove some\n{table}")


def read_turns(cell, column: str, kind: str) -> list[dict]:
    r"""[{role, content, ...}] from such a list, {from, value}, "\n\nHuman: ...\n\nAssistant: ...", or a text."""
    turns, names = [*cell] if isinstance(cell, list) else [cell], {"from": "role", "value": "content"}
    if kind == "text":
        turns = [{"role": "user" if column == "prompt" else "assistant", "content": cell}]
    elif kind == "transcript":
        parts = re.split(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):", str(cell))
        turns = [{"role": name, "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2])]
    for i, turn in enumerate(turns):
        turn = {names.get(key, key): turn[key] for key in turn} if isinstance(turn, dict) else {}
        role, content = ROLES.get(str(turn.get("role")).lower()), "" if "tool_calls" in turn else None
        turns[i] = {"content": content} | turn | {"role": role}
        if role is None or not isinstance(turns[i]["content"], str):
            raise ValueError(f"{column} holds {str(cell)[:200]}, not {kind} (roles: {', '.join(ROLES)})")
    return turns


def canonical_pair(row: dict, layout: str) -> tuple[list[dict], list[dict], list[dict], str]:
    """Prompt, and chosen and rejected without it, as messages; and why the pair is dropped, or ""."""
    *start, chosen, rejected = (read_turns(row.get(column), column, kind) for column, kind in LAYOUTS[layout].items())
    repeats = layout == "prompt beside conversations" and any(
        turns[0]["role"] != "assistant" for turns in (chosen, rejected) if turns)  # fmt: skip
    prompt = start[0] if start and not repeats else []
    if not prompt:  # what both conversations begin with, up to the last turn that is not the assistant's
        shared = chosen[: common_prefix_length(chosen, rejected)]
        while shared and shared[-1]["role"] == "assistant":
            shared.pop()
        prompt = shared if any(turn["role"] == "user" for turn in shared) else []
    chosen, rejected = (side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected))
    ends = [turns[-1] for turns in (prompt, chosen, rejected) if turns]
    reasons = {"empty side": not all([chosen, rejected, *(t["content"].strip() or t.get("tool_calls") for t in ends)]),
               "tied scores": any(row.get(a) not in (None, "") and row[a] == row.get(b) for a, b in SCORES),
               "no final assistant turn": any(turn["role"] != "assistant" for turn in ends[-2:]),
               "histories differ": not prompt}  # fmt: skip
    return prompt, chosen, rejected, next(filter(reasons.get, reasons), "")


def tokenize_pair(prompt: list, chosen: list, rejected: list, row: dict, tokenizer, raw: bool) -> list[list[int]]:
    """Ids of the prompt, and of each answer up to its turn end or eos, from messages; raw ones without a template."""
    tools, more = (json.loads(cell or "null") if isinstance(cell, str) else cell
                   for cell in map(row.get, ("tools", "chat_template_kwargs")))  # fmt: skip
    # Qwen3's empty think block belongs to the prompt unless an answer carries reasoning: the first that fits is taken
    for thinking in ({"enable_thinking": False}, {}):
        options = {"chat_template": RAW if raw else None, "tools": tools, "tokenize": False} | thinking
        render = functools.partial(tokenizer.apply_chat_template, **options | (more or {}))
        alone, *whole = render(prompt, add_generation_prompt=True), render(prompt + chosen), render(prompt + rejected)
        if all(text.startswith(alone) for text in whole):
            break
    else:
        parted = min(common_prefix_length(alone, text) for text in whole)
        shown = "\n  ".join(repr(text[max(0, parted - 80) : parted + 80]) for text in (alone, *whole))
        raise ValueError("the chat template renders the prompt differently alone than with its answers; save a "
                         f"chat_template.jinja that renders them alike beside the tokenizer:\n  {shown}")  # fmt: skip
    encode = functools.partial(tokenizer, add_special_tokens=False, return_attention_mask=False, verbose=False)
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    whole = [text if text.rstrip().endswith(special) else text + tokenizer.eos_token for text in whole]
    # special tokens part a text, so of the prompt only what follows the last one is tokenized again for each answer
    last = max([0, *map(alone.rfind, special)])
    prompt, tail, *both = encode([alone, *(text[last:] for text in (alone, *whole))]).input_ids
    # where tokens merge across the boundary, the answer is tokenized apart: in use, it starts with a new token
    answers = [ids[len(tail) :] if ids[: len(tail)] == tail else encode(text[len(alone) :]).input_ids
               for ids, text in zip(both, whole)]  # fmt: skip
    bos = [token for token in tokenizer("").input_ids if raw and token == tokenizer.bos_token_id]
    return [bos + prompt, *answers]  # a chat template writes its bos itself


def measure_pair(prompt: list[int], chosen: list[int], rejected: list[int], max_length: int | None) -> tuple:
    """The last three columns of PREPARED, from token ids: hash, distinct tokens, why the pair is dropped or ""."""
    first, second = ((prompt + answer)[:max_length] for answer in (chosen, rejected))
    shared = min(common_prefix_length(first, second), len(first) - 1, len(second) - 1)  # never a row's last token
    both = np.array([len(prompt), len(first), *first, *second], "<i4").tobytes()  # alike on every machine
    pair_hash = int.from_bytes(hashlib.blake2b(both, digest_size=8).digest(), "little", signed=True)
    reasons = {"chosen equals rejected": chosen == rejected,
               "prompt leaves no room": len(prompt) >= (max_length or sys.maxsize),
               "equal after truncation": first == second}  # fmt: skip
    return pair_hash, len(first) + len(second) - shared, next(filter(reasons.get, reasons), "")


def prepare_pair(row: dict, index: int, layout: str, tokenizer, raw: bool, max_length: int | None) -> dict:
    """A row as it was read to the columns PREPARED; a pair dropped before it is tokenized has no tokens."""
    row = trl.trainer.utils.remove_none_values(row)  # arrow gives every struct of a column the keys of all of them
    try:
        *pair, reason = canonical_pair(row, layout)
        ids = [[], [], []] if reason else tokenize_pair(*pair, row, tokenizer, raw)
    except Exception as error:  # also jinja's, and whatever a template raises to refuse a conversation
        raise ValueError(f"row {index + 1}: {error}") from error  # a class of ours would not come back from a worker
    measured = (0, 0, reason) if reason else measure_pair(*ids, max_length)
    return dict(zip(PREPARED, (*ids, *map(len, ids), *measured)))


def prepare_split(dataset, split: str, s: argparse.Namespace, tokenizer) -> tuple:
    """One split, tokenized and without its bad pairs; and the report on it, with row numbers from 1."""
    source = f"{s.dataset_name} ({split})"
    layout = recognise_layout(dataset, source)
    read = sorted({*LAYOUTS[layout], *sum(SCORES, ()), "tools", "chat_template_kwargs"}.intersection(dataset.features))
    if not (tokenizer.chat_template or (layout == "standard" and not s.chat_strings)):
        fix = "start from the instruct version, or save a chat_template.jinja beside the tokenizer"
        raise UserError(f"{source} needs a chat template, and the tokenizer has none; {fix}")
    given = {"layout": layout, "tokenizer": tokenizer, "raw": layout == "standard" and not s.chat_strings}
    try:
        table = dataset.select_columns(read).map(
            prepare_pair, with_indices=True, remove_columns=read, features=datasets.Features(PREPARED),
            fn_kwargs=given | {"max_length": s.max_length}, desc=f"Tokenizing {split}",
            num_proc=s.dataset_num_proc or (min(8, os.cpu_count()) if len(dataset) > 5000 else None))  # fmt: skip
    except ValueError as error:
        raise UserError(f"{source}, {error}") from None
    counts = table.select_columns([*SIDES, "dropped"]).to_pandas()
    rows = counts.groupby("dropped").indices
    good = rows.pop("", np.array([], int))
    unread = sorted({*dataset.features}.difference(read))
    report = {"layout": layout, "columns not read": unread, "read": len(table), "kept": len(good)}
    report["dropped"] = {reason: len(bad) for reason, bad in rows.items()}
    report["first rows of them"] = {reason: (bad[:5] + 1).tolist() for reason, bad in rows.items()}
    if len(good) * 2 < len(table):
        raise UserError(f"{source}: too few pairs can be used\n{as_yaml(report)}")
    pairs, whole = table.select(good).remove_columns("dropped"), counts[SIDES[1:]].add(counts["prompt"], axis=0).values
    report["duplicates"] = len(pairs) - len({*pairs["pair_hash"]})
    report["share of answers cut"] = round(float((whole[good] > (s.max_length or np.inf)).mean()), 4)
    report["max_length that cuts less than 1%"] = int(np.quantile(whole[whole > 0], 0.99, method="higher"))
    return pairs, report


def find_bad_row(path: Path) -> str:
    """Where the JSON file at `path`, or one in the folder, is broken; empty when none is."""
    for file in [path] if re.search(r"\.jsonl?$", path.name) else sorted(path.rglob("*.json*")):
        text = file.read_bytes()
        for number, line in enumerate([text] if re.match(rb"\s*(\[|\{\s*\n)", text) else text.splitlines(), 1):
            try:
                json.loads(line.strip() or "{}")
            except ValueError as error:
                return f"{file}, row {number}: {error}"
    return ""


def read_splits(s: argparse.Namespace) -> dict:
    """{split name: data set}: the one to train on and, where there is one, the one held out."""
    name, path, splits = s.dataset_name, Path(s.dataset_name), (s.dataset_train_split, s.dataset_test_split)
    kind = path.suffix[1:].lower().removesuffix("l") if path.is_file() else None  # json reads jsonl too
    kinds = {kind, *(file.suffix[1:] for file in path.rglob("*.*"))} & {"csv", "json", "jsonl", "parquet"}
    options = {"keep_default_na": False} if kinds == {"csv"} else {}  # an answer "None" is text
    try:
        found = datasets.load_dataset(path=kind or name, name=s.dataset_config, data_files=kind and name, **options)
    except Exception as error:  # the network's, the hub's, arrow's, pandas'
        fix = "a hub name: check it, network and `hf auth login`; local files are jsonl, json, parquet or csv"
        raise UserError(
            f"The data set {name} cannot be read: {find_bad_row(path) or repr(error.__cause__ or error)}\n{fix}"
        ) from error
    train, test = (split if split in found else f"{split}_prefs" for split in splits)  # HuggingFaceH4's names
    if train not in found or test not in {*found, "test_prefs"}:
        fix = f"not both dataset_train_split ({splits[0]}) and dataset_test_split ({splits[1]})"
        raise UserError(f"The data set {name} has the splits {', '.join(found)}, but {fix}")
    return {split: found[split] for split in (train, test) if split in found}


def load_preferences(s: argparse.Namespace, tokenizer) -> tuple:
    """(train, held_out or None, report): the pairs, read, checked, tokenized to the columns PREPARED, and split."""
    with trl.trainer.utils.global_then_local_main_first():  # the other processes find the main one's work in the cache
        parts = {split: prepare_split(data, split, s, tokenizer) for split, data in read_splits(s).items()}
    train, held_out, *_ = *(pairs for pairs, _ in parts.values()), None
    if held_out is None:  # a fifth at most; picked by their hashes, equal pairs stay on one side
        drawn = np.array(train["pair_hash"][:]) ^ np.random.default_rng(s.seed).integers(-(2**63), 2**63)
        held = drawn < np.sort(drawn)[min(s.eval_pairs, len(train) // 5)]
        train, held_out = train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held)) or None
    both = len({*train["pair_hash"]}.intersection(held_out["pair_hash"] if held_out else []))
    counts = f"{s.dataset_name}, {len(train)} pairs to train on, {len(held_out or [])} held out, {both} in both"
    return train, held_out, {"data": counts, "splits": {split: report for split, (_, report) in parts.items()}}


def describe_pair(tokenizer, pair: dict, max_length: int | None) -> str:
    """One pair as the model sees it, special tokens and all; long texts are shortened in the middle."""
    lines, room = [], max_length or sys.maxsize
    for side in SIDES:
        ids = pair[f"{side}_ids"]
        text = re.sub(r"(?s)^(.{320}).+(.{160})$", r"\1 [...] \2", tokenizer.decode(ids[:room]))
        cut = f" | {len(ids) - room} tokens cut by max_length {max_length}" * (len(ids) > room)
        lines.append(f"{side:<9}{len(ids):>6} tokens  {text!r}{cut}")
        room -= len(ids) * (side == "prompt")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ policy and reference
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names of the reference's log-probs in a batch, in nats
PAIR_METRICS = ("loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
                "logps/chosen", "logps/rejected")  # fmt: skip
BOUNDS = ("rewards/accuracies_low", "rewards/accuracies_high")


def load_start(s: argparse.Namespace) -> argparse.Namespace:
    """What a run starts from: config, tokenizer, adapter (None unless the model is one), kind of reference."""
    name, own = s.model_name_or_path, {"revision": s.model_revision}
    try:
        adapter = find_adapter_config_file(name, **own) and peft.PeftConfig.from_pretrained(name, **own)
        base, its = (adapter.base_model_name_or_path, {"revision": adapter.revision}) if adapter else (name, own)
        config = transformers.AutoConfig.from_pretrained(base, **its, trust_remote_code=False)
        bare = os.path.isdir(name) and not Path(name, "tokenizer_config.json").exists()
        source, its = (base, its) if bare else (name, own)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **its, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fix = "check its spelling and the network; a gated or private one needs `hf auth login`"
        raise UserError(f"model_name_or_path={name}: {str(error).strip().splitlines()[0]}; {fix}") from error
    places = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    if (s.max_length or 0) > places:
        raise UserError(f"max_length={s.max_length}: {name} has positions for {places} tokens; lower it")
    if not adapter and (s.reference == "adapter" or s.fresh_adapter):
        raise UserError(f"{name} is no adapter; leave `reference: adapter` and `fresh_adapter` out")
    if adapter and adapter.is_prompt_learning:
        raise UserError(f"{name} is a prompt-learning adapter; start from its base, or from a LoRA")
    tokenizer.pad_token = s.pad_token or tokenizer.pad_token or tokenizer.eos_token
    continues = bool(adapter) and not s.fresh_adapter
    kind = "adapter" if continues and s.reference == "auto" else s.reference
    told = {"auto": "the policy with its adapter switched off", "adapter": "a frozen copy of the starting adapter",
            "copy": f"a second, frozen model ({s.ref_model_name_or_path or name})"}  # fmt: skip
    return argparse.Namespace(config=config, tokenizer=tokenizer, adapter=adapter and name, continues=continues,
                              reference=kind, told=told[kind])  # fmt: skip


def load_model(s, args, name: str, trainable: bool = False) -> tuple:
    """(The model, or an adapter on top of its base, on this process's one device; the causal LM in it)."""
    revision = s.model_revision if name == s.model_name_or_path else None
    options = {"dtype": s.dtype, "attn_implementation": s.attn_implementation, "trust_remote_code": False,
               "use_safetensors": True, "quantization_config": trl.get_quantization_config(s)}  # fmt: skip
    options |= {"device_map": {"": args.device}} if args.device.type == "cuda" and not is_sharded() else {}
    kind, adapter = transformers.AutoModelForCausalLM, find_adapter_config_file(name, revision=revision)
    if adapter:
        kind, options["is_trainable"] = peft.AutoPeftModelForCausalLM, trainable
    model = kind.from_pretrained(name, revision=revision, **options)
    causal_lm = model.get_base_model() if adapter else model
    if why_not_shared(causal_lm, s) is None:
        share_prefixes(causal_lm)
    return model, causal_lm


def build_trainer(s, args, start, train, held_out) -> "PreferenceTrainer":
    """Policy, reference and pairs in a trainer; without `ref_model` it switches the adapter off, or copies it."""
    policy, causal_lm = load_model(s, args, s.model_name_or_path, trainable=start.continues)
    other = s.ref_model_name_or_path or s.model_name_or_path
    reference = load_model(s, args, other)[1] if start.reference == "copy" else None
    lora = None if start.continues else replace(trl.get_peft_config(s), revision=s.model_revision)
    if s.fresh_adapter:  # its base is the merged model
        policy = policy.merge_and_unload()
        policy.name_or_path = f"{s.output_dir}/base"
        for part in (policy, start.tokenizer) if is_main() else ():
            part.save_pretrained(policy.name_or_path)
    shared = {model.config._attn_implementation for model in (causal_lm, reference) if model} == {"shared_prefixes"}
    trainer = PreferenceTrainer(
        policy, reference, args, PreferenceCollator(start.tokenizer.pad_token_id, s.max_length, share_prefixes=shared),
        train, held_out, start.tokenizer, compute_metrics=pair_metrics, peft_config=lora,
    )  # fmt: skip
    trainer.precompute_ref_logps = True  # every batch brings them
    if not is_sharded():  # TRL makes QLoRA's bf16, which rounds most steps of a learning rate of 5e-6 away
        peft.tuners.tuners_utils.cast_adapter_dtype(trainer.model, "default")
    for module in trainer.model.modules():
        if args.bf16 and args.device.type == "cuda":  # PEFT casts up and autocast down again: lossless, not free
            module.cast_input_dtype_enabled = False
        if s.torch_compile and isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
            module.compile(backend=s.torch_compile_backend or "inductor", mode=s.torch_compile_mode, dynamic=True)
    return trainer


class BalancedSampler(torch.utils.data.DistributedSampler):
    """Random order in whole steps, an epoch's last one filled up with pairs from its start. The passes of a step have
    alike much to do, so that no process waits long; which pairs it has does not depend on the number of processes."""

    def __init__(self, needed: np.ndarray, size: int, passes: int, seed: int):
        self.needed, self.shape = needed, (math.ceil(len(needed) / (size * passes)), size, passes)
        super().__init__(range(math.prod(self.shape)), num_replicas=1, rank=0, seed=seed)  # for set_epoch, __len__

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.needed))
        for pairs in np.resize(order, self.shape):
            ranked = pairs.flat[np.argsort(-self.needed[pairs], axis=None, kind="stable")].reshape(pairs.shape)
            hands = ranked[:0].T
            for row in ranked:  # the largest to who has least so far
                hands = np.c_[hands[np.argsort(self.needed[hands].sum(1), kind="stable")], row]
            yield from hands.flatten().tolist()  # accelerate gives pass k to process k mod their number


class PreferenceTrainer(trl.DPOTrainer):
    """trl.DPOTrainer on tokenised pairs, with an exact evaluation, and checkpoints that are whole or do not count."""

    def _prepare_dataset(self, dataset, *_):
        return dataset  # load_preferences has tokenised and checked it

    def get_train_dataloader(self):
        loader, args, needed = super().get_train_dataloader(), self.args, np.array(self.train_dataset["needed_tokens"])
        passes = args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        # set into all layers of the loader, or a run that two processes resume in its second epoch has another order
        loader.set_sampler(BalancedSampler(needed, args.per_device_train_batch_size, passes, seed))
        loader.dataset.total_dataset_length = len(loader.get_sampler())  # else accelerate cuts the last step's sums
        return loader

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:  # transformers looks only after a step
            super()._run_epoch(**kwargs)

    def _prepare_inputs(self, inputs):
        """The batch on this device, with the reference's log-probs, (B,) each, unless the cache has put them there."""
        inputs = super()._prepare_inputs(inputs)
        if REFERENCE[0] not in inputs:
            inputs |= zip(REFERENCE, self.compute_ref_log_probs(self.ref_model or self.model, inputs))
        return inputs

    def require_finite(self, value, what: str, inputs: dict) -> None:
        if not math.isfinite(value):
            text = f"the {what} is not finite at step {self.state.global_step + 1}, the last checkpoint is kept: " \
                f"lower learning_rate ({self.args.learning_rate:g}), raise beta, or use bf16, not fp16"  # fmt: skip
            rows = [row[:60] for row in inputs["input_ids"].chunk(2)[0].tolist()] if inputs else []
            raise UserError("\n  ".join([text, *map(repr, self.processing_class.batch_decode(rows))]), status=1)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.require_finite(loss.detach(), "loss", inputs)
        self._metrics["train"]["loss"].append(self.accelerator.gather(loss.detach()).mean().item())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # fp16's looks for an overflow itself, and skips that step
            self.require_finite(norm, "gradient", {})
        return norm

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(B, 7) in place of logits: TRL's PAIR_METRICS of each pair alone, from the model's output for all. Trainer
        gathers them without the pairs that only fill up the last batch; TRL would log means of batch means."""
        inputs, alone, same = self._prepare_inputs(inputs), copy.copy(self), lambda values: values
        alone.accelerator = argparse.Namespace(device=self.args.device, gather=same, gather_for_metrics=same)
        alone._metrics = {"eval": self._metrics["eval"].copy()}  # which is empty
        alone.aux_loss_enabled = False  # a router's loss is of a batch
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        passed = {name: v for name, v in inputs.items() if name not in ("completion_mask", *REFERENCE)}
        with self.compute_loss_context_manager():
            output = model(**passed, labels=labels, use_cache=False, fused_lm_head=True)
        rows = {name: value.unflatten(0, (-1, len(inputs[REFERENCE[0]])))  # (1 or 2, B, ...)
                for name, value in (inputs | output).items() if torch.is_tensor(value) and value.ndim}  # fmt: skip
        for i in range(len(inputs[REFERENCE[0]])):
            pair = {name: value[:, i] for name, value in rows.items()}
            loss = alone._compute_loss(lambda pair=pair, **_: argparse.Namespace(**pair), pair, False)
            alone._metrics["eval"]["loss"].append(loss.item())
        scores = torch.tensor([alone._metrics["eval"][name] for name in PAIR_METRICS], device=self.args.device).T
        return None, scores, scores[:, :1]

    def _save_checkpoint(self, model, trial):
        """A checkpoint is whole once its manifest, written last, lists every file."""
        averages = self._total_train_tokens, self.args.gradient_accumulation_steps, dict(self._metrics["train"])
        self.state.stateful_callbacks["averages"] = averages
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if is_main():
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            write_file(folder / MANIFEST, json.dumps(digest_files(folder), indent=1).encode())

    def save_model(self, output_dir=None, _internal_call=False):
        """The adapter alone, gathered where FSDP shards it: transformers would gather all weights, or none."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        self._save(output_dir, get_model_state_dict(self.model, options=options))


def pair_metrics(scores) -> dict[str, float]:
    """Means over the held-out pairs, each counted once; accuracies with their 95% interval (Wilson, 1927)."""
    means = pd.DataFrame(scores.predictions, columns=PAIR_METRICS, dtype=float).mean().to_dict()
    p, spread = means["rewards/accuracies"], 1.96**2 / len(scores.predictions)
    low, high = sorted(np.roots([1 + spread, -2 * p - spread, p * p]).tolist())  # (q - p)^2 = spread * q * (1 - q)
    return means | dict(zip(BOUNDS, (min(low, p), max(high, p))))


def cache_reference(trainer: PreferenceTrainer, s) -> None:
    """The reference's log-probs as columns, from a file that runs share; what it lacks is computed, and kept in it."""
    train, held_out = trainer.train_dataset, trainer.eval_dataset or trainer.train_dataset.select([])
    pairs = datasets.concatenate_datasets([train, held_out])
    hashes, first, place = np.unique(pairs["pair_hash"], return_index=True, return_inverse=True)
    model = trainer.ref_model or trainer.model
    weights = {name: torch.hash_tensor(weight.cpu()).item() for name, weight in model.state_dict().items()
               if ".default." not in name}  # the adapter that is trained  # fmt: skip
    what = repr([hashes.tolist(), weights, model.config.to_json_string(), s.ld_alpha, s.bf16, s.fp16])
    key = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    path = Path(datasets.config.HF_CACHE_HOME, "dpotrainer", f"reference-{key}")
    known = None
    if is_main():  # its file is (N, 2) float32, nats of N pairs by order of their hashes; not known if not below 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # never emptied: another run may be filling it
        known = np.memmap(path, "<f4", "r+", shape=(len(hashes), 2))
    (known,) = accelerate.utils.broadcast_object_list([known])
    todo = np.flatnonzero(~(known < 0).all(1))
    say(f"reference log-probs: {len(hashes) - len(todo)} of {len(hashes)} pairs are in {path}")
    size = s.precompute_ref_batch_size or s.per_device_eval_batch_size
    loader = torch.utils.data.DataLoader(pairs.select(first[todo]), size, collate_fn=trainer.data_collator)
    for batch in tqdm(trainer.accelerator.prepare(loader), desc="reference", disable=not is_main() or None):
        batch = trainer._prepare_inputs(batch)
        logps = torch.stack([batch[name] for name in REFERENCE], dim=1)
        trainer.require_finite(logps.sum(), "reference's log-prob", batch)
        logps = trainer.accelerator.gather_for_metrics(logps).cpu()
        known[todo[: len(logps)]], todo = logps, todo[len(logps) :]
        known.flush()  # a kill costs one batch
    for name, values in zip(REFERENCE, known[place].T):
        pairs = pairs.add_column(name, values)
    trainer.train_dataset = pairs.take(len(train))
    trainer.eval_dataset = pairs.select(np.arange(len(train), len(pairs)))


# ---------------------------------------------------------------------------------------------------- shared prefixes
# A pair is two rows with the same beginning. Here every distinct token of a batch runs once, without padding, in one
# packed row: all of chosen, then what is left of rejected (its tail), pair after pair. B pairs make 2B sequences of
# queries. Chosen attends to itself; a tail attends to the prefix it shares with chosen, and to itself.


def plan_shared_prefixes(input_ids, attention_mask):
    """Lay out pairs, given as ids and mask (2B, L) padded on the right (rejected of row i is row i + B), on the CPU.

    Returns ids and positions (1, T) of the packed row; the places in it of the sequences' K keys (K,) and of the
    padded batch (2B, L); the sequences' bounds (2B + 1,), and their lengths as integers: no reader waits for the GPU.
    """
    pairs, length = input_ids.shape[0] // 2, input_ids.shape[1]
    order = torch.arange(2 * pairs).view(2, pairs).T.flatten()  # chosen 0, rejected 0, chosen 1, rejected 1, ...
    ids, real = input_ids[order], attention_mask[order].bool()
    last = real.sum(1).view(pairs, 2).amin(1, keepdim=True) - 1  # never shared, so that every rejected has a tail
    same = (ids[0::2] == ids[1::2]) & (torch.arange(length) < last)
    shared = same.cumprod(1).bool()  # (B, L): the longest run of equal tokens from the left
    packed = real.clone()
    packed[1::2] &= ~shared
    total = int(packed.sum())
    # Padding is never scored; spread over the row, its zero gradients do not all queue up at the same place.
    place = torch.arange(2 * pairs * length).remainder(total).view(2 * pairs, length)
    place[packed] = torch.arange(total)
    place[1::2][shared] = place[0::2][shared]
    plan = {"input_ids": ids[packed][None], "position_ids": packed.nonzero()[:, 1][None], "key_index": place[real],
            "row_index": place[order.argsort()]}  # fmt: skip
    for name, sizes in (("query", packed.sum(1)), ("key", real.sum(1))):
        plan |= {f"{name}_bounds": F.pad(sizes.cumsum(0), (1, 0)).int(), f"{name}_lengths": sizes.tolist()}
    return plan


@dataclass
class PreferenceCollator(trl.trainer.dpo_trainer.DataCollatorForPreference):
    """TRL's collator for pairs; with `share_prefixes` the batch carries the plan of the packed row as well."""

    share_prefixes: bool = True

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        if self.share_prefixes:
            batch["plan"] = plan_shared_prefixes(batch["input_ids"], batch["attention_mask"])
        return batch


@functools.cache
def varlen_kernel():
    """torch's variable-length attention, causal and with grouped heads, which torch 2.10 to 2.13 name differently."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    known = inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, **{name: options[name] for name in options if name in known})


def kernel_takes(query, value):
    """Whether that kernel runs here: half precision on a recent NVIDIA card, heads of one size."""
    size, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    recent = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return recent and half and size == value.shape[-1] <= 256 and size % 8 == 0


@torch.compiler.disable
def shared_prefix_attention(module, query, key, value, attention_mask, shared_prefixes=None, **kwargs):
    """Attention of a packed row: query (1, Hq, T, D), key and value (1, Hkv, T, D) to (1, T, Hq, D).

    Causal, aligned at the bottom right: a sequence's last query sees all its keys, the one before all but the last.
    Calls without a plan, such as those of generation, go to SDPA as they came.
    """
    if shared_prefixes is None:
        attend = transformers.integrations.sdpa_attention.sdpa_attention_forward
        return attend(module, query, key, value, attention_mask, **kwargs)
    plan, scale, device = shared_prefixes, kwargs.get("scaling"), query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype  # as SDPA casts
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    key, value = (x.index_select(0, plan["key_index"]) for x in (key, value))  # (K, Hkv, D)
    if not kernel_takes(query, value):
        return attend_one_by_one(query, key, value, plan, scale)[None], None
    longest = max(plan["query_lengths"]), max(plan["key_lengths"])
    scaled = {} if scale in (None, query.shape[-1] ** -0.5) else {"scale": scale}  # torch 2.10 has one scale only
    return varlen_kernel()(query, key, value, plan["query_bounds"], plan["key_bounds"], *longest, **scaled)[None], None


def attend_one_by_one(query, key, value, plan, scale):
    """SDPA sequence after sequence: (T, Hq, D), (K, Hkv, D) twice to (T, Hq, D)."""
    outputs, sizes = [], (plan["query_lengths"], plan["key_lengths"], plan["key_lengths"])
    for parts in zip(*map(torch.split, (query, key, value), sizes), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in parts)  # (1, heads, tokens, D)
        queries, keys, mask = q.shape[2], k.shape[2], None
        if queries < keys:  # a tail; chosen is plainly causal, which has the faster kernel
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def share_prefixes(model):
    """Let a causal language model, not yet wrapped by PEFT, run batches that carry a plan as one packed row."""

    def pack(backbone, args, kwargs):
        plan = kwargs.pop("plan", None)
        if plan is not None:
            kwargs |= {"input_ids": plan["input_ids"], "position_ids": plan["position_ids"], "shared_prefixes": plan}
            kwargs["attention_mask"] = plan["input_ids"][None, None]  # a 4-D mask is handed on as it is; none reads it
        return args, kwargs

    def unpack(backbone, args, kwargs, output):  # hidden states (1, T, H) to the padded (2B, L, H) that TRL expects
        plan = kwargs.pop("shared_prefixes", None)
        if plan is not None:
            hidden = output.last_hidden_state[0].index_select(0, plan["row_index"].flatten())
            output.last_hidden_state = hidden.view(*plan["row_index"].shape, -1)
        return output

    transformers.AttentionInterface.register("shared_prefixes", shared_prefix_attention)
    transformers.AttentionMaskInterface.register("shared_prefixes", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("shared_prefixes")
    model.base_model.register_forward_pre_hook(pack, with_kwargs=True)
    model.base_model.register_forward_hook(unpack, with_kwargs=True)


def why_not_shared(model, settings=None):
    """The reason, in one line, why `model` must run its rows apart and padded; None where it can share prefixes."""
    config = model.config.get_text_config()
    own, asked = functools.partial(getattr, config), functools.partial(getattr, settings)
    layers, router = set(own("layer_types", None) or ()), asked("router_aux_loss_coef", None)
    special = [name for name in ("attn_logit_softcapping", "attention_dropout", "attn_pdrop") if own(name, None)]
    special += [name for name, _ in model.named_parameters() if "sinks" in name]
    reasons = {
        "`share_prefixes: false` asks for it": not asked("share_prefixes", True),
        "`attn_implementation` asks for another attention": asked("attn_implementation", None) is not None,
        "it is a vision-language model, whose rows hold images": config is not model.config,
        "its attention cannot be replaced from outside": not getattr(model, "_supports_attention_backend", False),
        "not all of its layers are full attention":
            layers - {"full_attention"} or getattr(model, "_is_stateful", False),
        "its attention looks back over a sliding window only":
            not layers and own("sliding_window", None) and own("use_sliding_window", True),
        f"its attention is not the plain one ({', '.join(special)})": special,
        "its router loss counts each token of both rows":
            hasattr(config, "output_router_logits") and (config.router_aux_loss_coef if router is None else router),
    }  # fmt: skip
    return next((reason for reason, applies in reasons.items() if applies), None)


# ------------------------------------------------------------------------------------------------------------ the plan
def measure_model(s, start, shared: int, padded: int) -> tuple[int, int, dict[str, float], str | None]:
    """Weights in all, and trained; GiB at so many tokens a batch; why prefixes are not shared: from shapes alone."""
    dtype, config = getattr(torch, s.dtype, torch.bfloat16), start.config.get_text_config()
    with torch.device("meta"), transformers.modeling_utils.set_zero3_state():  # which would part out absent weights
        model = transformers.AutoModelForCausalLM.from_config(start.config, dtype=dtype)
        reason = why_not_shared(model, s)
        lora = peft.PeftConfig.from_pretrained(start.adapter) if start.continues else trl.get_peft_config(s)
        model = peft.get_peft_model(model, replace(lora, inference_mode=False))  # a starting adapter is trained on
    trained, total = model.get_nb_trainable_parameters()
    packed = 0.516 if s.load_in_4bit else 1 if s.load_in_8bit else dtype.itemsize  # bytes; NF4 with packed scales
    frozen = sum(w.numel() * (dtype.itemsize if w.ndim != 2 or re.search("embed|lm_head", name) else packed)
                 for name, w in model.named_parameters() if not w.requires_grad)  # fmt: skip
    # values that a layer keeps for its backward pass, per token: counted in Qwen3's, in bf16 with LoRA
    layer = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    kept = config.num_hidden_layers * (config.hidden_size if s.gradient_checkpointing else layer) + 2 * layer
    sizes = {"weights": frozen, "gradients": 4 * trained, "adapter": 4 * trained,
             "optimizer": trained * (2 if "8bit" in str(s.optim) else 8),
             "reference": {"copy": frozen, "adapter": 4 * trained}.get(start.reference, 0),
             "activations (an estimate)": (padded if reason else shared) * kept * dtype.itemsize}  # fmt: skip
    return total, trained, {name: size / 2**30 for name, size in sizes.items()}, reason


def make_plan(s, args, start, train, held_out) -> list[str]:
    """What will happen, every derived number included; the last four lines in a dry run only. No weights are read."""
    needed, size = np.sort(train["needed_tokens"]), s.per_device_train_batch_size
    lengths = {side: np.array(train[side]) for side in SIDES}
    longest = (lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"])).clip(max=s.max_length)
    batches = np.maximum.reduceat(np.random.default_rng(s.seed).permutation(longest), range(0, len(longest), size))
    padded = 2 * len(longest) * batches.mean()
    total, trained, gib, reason = measure_model(s, start, int(needed[-size:].sum()), int(2 * size * longest.max()))
    terms = zip(s.loss_weights or [1] * len(s.loss_type), s.loss_type)
    goal = " + ".join(f"{weight:g} x {OBJECTIVES[name]}" for weight, name in terms).removeprefix("1 x ")
    spread = {side: np.quantile(counts, [0.05, 0.5, 0.95, 1]).astype(int).tolist() for side, counts in lengths.items()}
    disk = gib["adapter"] * (3 * (s.save_total_limit or 1) + 1) + gib["weights"] * (s.merge + s.fresh_adapter)
    text = f"""\
    policy  {s.model_name_or_path}, {total:,} weights in {s.dtype}{", 4-bit" * s.load_in_4bit}, {trained:,} trainable
 reference  {start.told}
 objective  {goal}, beta {s.beta:g}\
{", label_smoothing 0, where robust equals sigmoid" * ("robust" in s.loss_type and not s.label_smoothing)}
     pairs  {len(train):,} to train, {len(held_out or []):,} held out, max_length {s.max_length}
     batch  {s.global_batch_size} pairs = {size} per device x {s.gradient_accumulation_steps} accumulation \
x {args.world_size} process{"es" * (args.world_size > 1)} on {args.device}
     steps  {s.planned_steps:,}, learning rate {s.learning_rate:g}, {s.lr_scheduler_type}
  prefixes  {f"not shared: {reason}" if reason else "shared, and no padding"}
    output  {s.output_dir}
    tokens  5%, median, 95%, longest: {", ".join(f"{side} {counts}" for side, counts in spread.items())}
 per epoch  {needed.sum():,} tokens with shared prefixes, {padded:,.0f} in padded rows ({padded / needed.sum():.2f} x)
    memory  {", ".join(f"{name} {part:.2f}" for name, part in gib.items())}: {sum(gib.values()):.2f} GiB
      disk  {disk:.2f} GiB in {s.output_dir}"""
    return text.splitlines()[: None if s.dry_run else 8]


# ------------------------------------------------------------------------------------------------------------- insight
LN2 = math.log(2)  # the sigmoid loss where policy and reference are equal
RECENT = 5  # log lines that make "now": fewer are noise, more hide a turn
COLUMNS = {"step": "d", "loss": ".4f", "rewards/margins": ".4f", "rewards/accuracies": ".3f", "rewards/chosen": ".4f",
           "rewards/rejected": ".4f", "pairs/s": ".2f", "learning_rate": ".2e"}  # fmt: skip
HEADER = " ".join(f"{name.removeprefix('rewards/'):>10}" for name in COLUMNS)
ADVICE = {  # kind: (when, and why there; what to say), in the numbers of `advise`; no comparison with nan holds
    "flat": (lambda n: n.done >= 0.25 and abs(n.loss - LN2) < 0.005 and abs(n.margins) < 0.01,  # healthy: 0.1
        "loss stays at {loss:.4f}, margins at {margins:.4f}: learning_rate {lr:g} is too small for LoRA, try ten "
        "times that, or the adapter is frozen"),
    "labels": (lambda n: n.done >= 0.33 and n.accuracies < 0.55 and abs(n.margins) >= 0.01,  # healthy: 0.65
        "accuracies stay at {accuracies:.2f}: are the pairs' sides swapped, alike or cut off? See `--dry_run true`"),
    "displacement": (lambda n: n.margins > 0.5 and n.chosen / n.beta < -25,  # healthy runs end above -20 nats
        "rewards/chosen fell to {chosen:.2f} as margins grew to {margins:.2f}: raise beta ({beta:g}), or add an SFT "
        "term, `loss_type: [sigmoid, sft]` with `loss_weights: [1.0, 0.2]`"),
    "overfitting": (lambda n: n.accuracies > 0.95 and n.best > n.eval_accuracies_high,  # beyond its 95% interval
        "train accuracies are {accuracies:.2f}, held-out ones fell from {best:.3f} to {eval_accuracies:.3f}: stop at "
        "the best, `max_steps: {best_step:g}`, or train fewer epochs"),
    "divergence": (lambda n: n.nats > 200,  # an answer e^200 times likelier or less likely: beta no longer holds it
        "{nats:.0f} nats per answer from the reference are too far: raise beta ({beta:g}), or lower learning_rate"),
    "longer": (lambda n: n.length_ratio > 1.5,  # half as long again is more than sampling noise
        "answers grew {length_ratio:.1f} times as long as the pairs ask for: try `loss_type: sigmoid_norm`"),
    "runaway": (lambda n: n.loss > 3 * n.untrained or n.nats > 1000,  # far worse than having learned nothing
        "stopped at loss {loss:.3g}, {nats:.0f} nats per answer from the reference: learning_rate {lr:g} destroys the "
        "model, 5e-6 is usual for LoRA"),
}  # fmt: skip


def read_log(history: list[dict]) -> pd.DataFrame:
    """The log, one row a step: loss and rewards in training, and with eval_ before their names, held-out."""
    names = [part + name for part in ("", "eval_") for name in (*PAIR_METRICS, *BOUNDS)]
    return pd.DataFrame(history, columns=["step", *names], dtype=float).groupby("step").first()


def advise(history: list[dict], s: argparse.Namespace, given: dict[str, str], length_ratio: float = math.nan) -> None:
    """Say what the log calls for, each kind once: `given` keeps it. Raises UserError, status 1, on a runaway."""
    log = read_log(history).rename(columns=lambda name: name.replace("rewards/", ""))
    if log.loss.count() < RECENT:
        return
    n, step, shares = log.tail(RECENT).mean(), log.index.max(), log.eval_accuracies
    n["nats"], n["length_ratio"] = n[["chosen", "rejected"]].abs().max() / s.beta, length_ratio
    n["best"], n["best_step"] = shares.max(), (shares == shares.max()).idxmax()
    n["done"] = step / s.planned_steps if step >= 20 else 0
    n["lr"], n["beta"], n["untrained"] = s.learning_rate, s.beta, LN2 if s.loss_type == ["sigmoid"] else math.inf
    for kind, (when, text) in ADVICE.items():
        if kind not in given and when(n):
            given[kind] = f"! step {step:.0f} of {s.planned_steps}: {text.format(**n)}"
            if kind == "runaway":
                raise UserError(given[kind], status=1)
            say(given[kind])


def format_row(row: dict) -> str:
    """A log line, aligned below HEADER."""
    cells = {name.removeprefix("eval_"): value for name, value in row.items()}
    text = " ".join(f"{cells[name]:10{form}}" for name, form in COLUMNS.items() if name in cells)
    interval = " held-out, accuracies {rewards/accuracies_low:.3f} to {rewards/accuracies_high:.3f}"
    return text + interval.format_map(cells) if "eval_loss" in row else text


class Report(transformers.TrainerCallback):
    """What a run shows beside the bar: a row per log line, metrics.jsonl, rewards.png, advice."""

    def __init__(self, trainer: PreferenceTrainer, s: argparse.Namespace):
        self.trainer, self.s, self.folder = trainer, s, Path(s.output_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            state.compute_steps(args, state.max_steps)  # the checkpoint has the save_steps of the run that wrote it
            self.trainer._total_train_tokens, passes, averages = state.stateful_callbacks["averages"]
            for name, values in averages.items():  # the next log line is of the steps before the break too
                same = args.gradient_accumulation_steps == passes  # else a step would not weigh as much as one to come
                count = len(values) // passes * args.gradient_accumulation_steps
                self.trainer._metrics["train"][name] = values if same else [np.mean(values).item()] * count
        self.advice = state.stateful_callbacks.setdefault("advice", {})  # checkpoints keep it: nothing is said twice
        self.shown = state.global_step, time.perf_counter()
        say(HEADER)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs:  # the totals at the end
            return
        history, (step, then), self.shown = state.log_history, self.shown, (state.global_step, time.perf_counter())
        history[-1] = {name: v for name, v in history[-1].items() if not re.search("runtime|per_second|prep", name)}
        if is_main():
            rows = [json.dumps({"step": row["step"]} | dict(sorted(row.items()))) + "\n" for row in history]
            write_file(self.folder / "metrics.jsonl", "".join(rows).encode())  # all: a resume drops some
            if "eval_loss" in logs or len(history) % 20 == 1:  # a picture takes half a second
                draw_rewards(history, self.s, self.folder / "rewards.png")
        speed = (state.global_step - step) * self.s.global_batch_size / (self.shown[1] - then)
        with tqdm.external_write_mode():  # the bar steps aside
            say(format_row(history[-1] | ({"pairs/s": speed} if "loss" in logs else {})))
            advise(history, self.s, self.advice)


def draw_rewards(history: list[dict], s: argparse.Namespace, path: Path) -> None:
    """rewards.png: rewards with the margin between them, accuracies, loss; legible without colours."""
    log, share = read_log(history), "rewards/accuracies"
    log[share] = log[share].where(log["rewards/margins"] != 0).rolling(RECENT, min_periods=1).mean()  # ties come first
    train = log.interpolate("index")  # over steps that were evaluated, but not logged
    figure = Figure(figsize=(13, 4), layout="constrained")
    rewards, accuracies, losses = panels = figure.subplots(1, 3)
    rewards.fill_between(log.index, train["rewards/chosen"], train["rewards/rejected"], color="0.88", label="margin")
    accuracies.axhline(0.5, color="0.5", ls=":", label="chance")
    accuracies.vlines(log.index, log[f"eval_{share}_low"], log[f"eval_{share}_high"], color="k", label="95% interval")
    if s.loss_type == ["sigmoid"]:
        losses.axhline(LN2, color="0.5", ls=":", label="ln 2: policy = reference")
    for axes, names in zip(panels, (["rewards/chosen", "rewards/rejected"], [share], ["loss"])):
        train[names].plot(ax=axes, style=["C0-", "C3--"], lw=2)
        log[[f"eval_{name}" for name in names]].plot(ax=axes, style=["C0o", "C3s"], mec="k").legend(fontsize=8)
    names = f"{Path(s.model_name_or_path).name} on {Path(s.dataset_name).name}"
    figure.suptitle(f"DPO: {names}, beta {s.beta:g}, learning rate {s.learning_rate:g}; train accuracies smoothed")
    figure.savefig(path, dpi=110)


def generate_answers(trainer: PreferenceTrainer, model, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of a model's answers up to their end: greedy ones to all prompts, then sampled ones, from one seed."""
    config, tokenizer, rows = trainer.model.generation_config, trainer.processing_class, []
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    width = batch["input_ids"].shape[1]
    room = int(np.clip(getattr(model.config, "max_position_embeddings", math.inf) - width, 1, 256))
    transformers.set_seed(trainer.args.seed)
    for do_sample in (False, True):
        with trainer.accelerator.autocast():
            whole = model.generate(**batch, generation_config=config, max_new_tokens=room, do_sample=do_sample)
        rows += whole[:, width:].tolist()
    ends = np.atleast_1d(config.eos_token_id).tolist()  # training has added the tokenizer's
    return [row[: next((i for i, token in enumerate(row, 1) if token in ends), None)] for row in rows]


def show_samples(trainer: PreferenceTrainer, s: argparse.Namespace, report: Report) -> None:
    """samples.md, its first three on the console, and advice if answers grew longer than the pairs ask for."""
    if is_sharded():
        return say("no samples: the model is sharded over processes")
    if not (is_main() and s.sample_prompts and trainer.eval_dataset):
        return None
    policy, decode = trainer.model.eval(), trainer.processing_class.decode
    block = "\n\n``````text\n{}\n``````\n\n".format  # a longer fence than answers have
    prompts = trainer.eval_dataset["prompt_ids"][: s.sample_prompts]
    with trl.trainer.utils.use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
        before = generate_answers(trainer, trainer.ref_model or policy, prompts)
    after = generate_answers(trainer, policy, prompts)
    pairs = [dict(zip(PREPARED, pair)) for pair in zip(prompts * 2, before, after)]
    scores = trainer.prediction_step(policy, trainer.data_collator(pairs), False)[1].tolist()
    samples = [f"# Held-out prompts, greedy, then sampled (seed {s.seed}); reward = beta * (log pi - log pi_ref)\n\n"]
    for prompt, a, b, (_, x, y, *_) in zip(prompts * 2, before, after, scores):
        samples.append(f"## {'greedy' if len(samples) <= len(prompts) else 'sampled'}{block(decode(prompt))}"
                       f"**reference**, {len(a)} tokens, reward {x:.4f}{block(decode(a))}"
                       f"**policy**, {len(b)} tokens, reward {y:.4f}{block(decode(b))}")  # fmt: skip
    write_file(Path(s.output_dir, "samples.md"), "".join(samples).encode())
    say("", *samples[1:4])
    asked = max(1, sum(trainer.train_dataset["chosen"]) / sum(trainer.train_dataset["rejected"]))
    grown = sum(map(len, after)) / sum(map(len, before))
    advise(trainer.state.log_history, s, report.advice, grown / asked)


# ------------------------------------------------------------------------------------------------------------- the run
STAMP = "%Y%m%d-%H%M%S"  # ends the name of what is moved aside
MANIFEST = "manifest.json"  # in each whole checkpoint: the digests of its files
FREE = (  # lines of settings.yaml in which a run and its continuation may differ; the result then changes for aot, sft
    "# made|output_dir|per_device|merge|report_to|run_name|disable_tqdm|ddp_timeout|sample_prompts|share_prefixes|"
    "use_cpu|data.*_num_(workers|proc)|save_(steps|total_limit)|gradient_checkpointing|torch_compile|precompute_ref"
)
FAULTS = (  # kind and words of a library's error; exit status, 2 being a mistake found before training; what to do
    (torch.OutOfMemoryError, "", 1, "out of GPU memory: halve per_device_train_batch_size (only aot, aot_unpaired and "
     "sft then differ), turn gradient_checkpointing on, lower max_length, or use configs/qwen3_8b_qlora.yaml"),
    (BaseException, "No space left|quota exceeded|File too large|inline_container", 1,  # the last one is torch.save's
     "a file could not be written, older checkpoints are untouched: make room and run the same command again"),
    (OSError, "safetensors", 2, "model_name_or_path: give weights as safetensors: pickled ones can run code"),
    (KeyboardInterrupt, "", 130, "interrupted; the same command goes on from where output_dir stands"),
    (Timeout, r"/\.lock'", 2, "output_dir: another run is writing there; wait, or choose another"),
    ((OSError, ValueError, TypeError, ImportError, NotImplementedError), "", 2, "settings"),
)  # fmt: skip


def write_file(path: Path, content: bytes) -> None:
    """All or nothing: a crash leaves the old file or the new one."""
    Path(f"{path}.tmp").write_bytes(content)
    os.replace(f"{path}.tmp", path)


def settings_yaml(s: argparse.Namespace) -> str:
    """What makes the run what it is, a line each: versions, pairs, sharding, settings. `--config` repeats it."""
    left_out = ("config", "planned_steps", "pairs", "gradient_accumulation_steps", "overwrite", "dry_run")
    values = {name: value for name, value in vars(s).items() if name not in left_out and value != []}
    made = ", ".join(f"{x.__name__} {x.__version__}" for x in (torch, transformers, trl, peft, datasets, accelerate))
    sharding = [f"{name} {os.environ.get(f'ACCELERATE_USE_{name}', 'false')}" for name in ("FSDP", "DEEPSPEED")]
    head = f"# made with {made}\n# hash of the pairs: {s.pairs}\n# sharding: {', '.join(sharding)}\n"
    return head + yaml.safe_dump(values, allow_unicode=True, default_flow_style=None, width=math.inf)


def compare_output(s: argparse.Namespace) -> bool:
    """Whether output_dir holds this run, finished; with another run, or other files, it is refused."""
    folder, settings = Path(s.output_dir).absolute(), Path(s.output_dir, "settings.yaml")
    is_begun = not s.overwrite and {path.name for path in folder.glob("[!.]*")} - {"base", "settings.yaml.tmp"}
    texts = settings.read_text("utf-8") if is_begun and settings.exists() else "", settings_yaml(s)
    there, here = ({line for line in text.splitlines() if not re.match(FREE, line)} for text in texts)
    if is_begun and there != here:
        what = "a run with other settings or pairs" if there else "files that are no run of this program"
        ways = "choose another output_dir, or `--overwrite true`, which moves the old one aside"
        lines = [f"{'there' if line in there else 'here '}  {line}" for line in sorted(there ^ here) if there]
        raise UserError("\n  ".join([f"{folder} holds {what}; {ways}", *lines]))
    return bool(is_begun) and (folder / "adapter_config.json").exists()


@contextmanager
def open_output(s: argparse.Namespace):
    """Hold output_dir for this run, an earlier one moved aside if asked. Yields whether this run is finished."""
    folder = Path(s.output_dir).absolute()
    lock = FileLock(folder / ".lock", blocking=False)
    if s.overwrite and is_main() and any(folder.glob("[!.]*")):
        with lock:
            say(f"the earlier run was moved to {folder.rename(f'{folder}-old-{time.strftime(STAMP)}')}")
    folder.mkdir(parents=True, exist_ok=True)
    with lock if is_main() else nullcontext():
        yield compare_output(s)


def digest_files(folder: Path) -> dict[str, str]:
    """{file: digest} of what is in a checkpoint, but for its manifest."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


class Ending(transformers.TrainerCallback):
    """After SIGTERM or Ctrl-C all processes finish the step, save and stop; a second signal stops at once."""

    def __init__(self, accelerator):
        self.accelerator, self.heard, self.since = accelerator, 0, math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        if time.monotonic() > self.since + 1:  # sooner, it is the first one, passed on by a launcher
            os._exit(128 + number)
        self.heard, self.since = self.heard or number, min(self.since, time.monotonic())

    def on_step_end(self, args, state, control, **kwargs):
        if self.heard:  # not all processes hear a signal, or not at the same step
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            self.heard = self.heard or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)  # it may have come in the evaluation since, or in the save
        control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)  # a signal may have come in the last evaluation; all wait for all here
        if control.should_save:
            raise UserError(f"saved at step {state.global_step}; the same command continues", 128 + self.heard)
        self.since = -math.inf  # one signal stops at once now: what follows saves all or nothing, and is done again


def train_policy(s: argparse.Namespace, trainer: PreferenceTrainer) -> Report:
    """Train from the newest whole checkpoint, to the end or to a signal; those that are not whole are set aside."""
    folder, report = Path(s.output_dir), Report(trainer, s)
    if s.precompute_ref_log_probs:
        cache_reference(trainer, s)
    for path in folder.glob("checkpoint-*") if is_main() else ():
        with suppress(OSError, ValueError):  # no manifest, or a damaged one
            if json.loads((path / MANIFEST).read_bytes()).items() <= digest_files(path).items():
                continue
        say(f"{path} is not whole: moved to {path.rename(folder / f'incomplete-{path.name}-{time.strftime(STAMP)}')}")
    trainer.accelerator.wait_for_everyone()
    checkpoint = transformers.trainer_utils.get_last_checkpoint(folder)
    if checkpoint:
        say(f"continuing from {checkpoint}")
    for theirs in trainer.callback_handler.callbacks:
        if isinstance(theirs, (transformers.PrinterCallback, transformers.ProgressCallback)):
            theirs.on_log = lambda *_, **__: None  # the rows are Report's
    trainer.callback_handler.callbacks += [report, Ending(trainer.accelerator)]
    if is_main():  # from here on, the folder is this run's
        write_file(folder / "settings.yaml", settings_yaml(s).encode())
    trainer.args.eval_on_start &= not checkpoint  # a resume is no start
    trainer.train(resume_from_checkpoint=checkpoint)
    return report


def merge_adapter(trainer: PreferenceTrainer, folder: Path) -> None:
    """The merged model in `folder`, and how far its next-token logits are from those of adapter plus base."""
    policy, tokenizer = trainer.model.eval(), trainer.processing_class
    prompts = (trainer.eval_dataset or trainer.train_dataset)["prompt_ids"][:8]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(policy.device)
    with torch.no_grad(), trainer.accelerator.autocast():
        before = policy(**batch, logits_to_keep=1).logits
        merged = policy.merge_and_unload()
        gap = (merged(**batch, logits_to_keep=1).logits - before).abs().max()
    for part in (merged, tokenizer):
        part.save_pretrained(folder)
    say(f"merged: the logits after {len(prompts)} prompts differ by {gap:.2g} at most from adapter plus base")


def save_run(trainer: PreferenceTrainer, s: argparse.Namespace, report: Report) -> None:
    """What output_dir holds at the end, and a summary; the adapter is the last checkpoint's, whole or not there."""
    folder, (*rows, totals) = Path(s.output_dir), trainer.state.log_history
    held_out = [format_row(row) for row in rows if "eval_loss" in row]
    memory = f", peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" * torch.cuda.is_initialized()
    load = f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({s.output_dir!r})"
    summary = "\n".join([
        f"{trainer.state.global_step} steps of {s.global_batch_size} pairs in {s.output_dir}; this run: "
        f"{totals['train_runtime'] / 60:.1f} minutes, {totals['train_samples_per_second']:.2f} pairs/s{memory}",
        HEADER, *held_out[:1], *held_out[1:][-1:], *report.advice.values(),
        "" if s.merge else f"next: merge it, `python -c \"{load}.merge_and_unload().save_pretrained('merged')\"`",
    ])  # fmt: skip
    if is_main():
        if s.merge:
            merge_adapter(trainer, folder / "merged")
        draw_rewards(rows, s, folder / "rewards.png")
        trainer.create_model_card(model_name=folder.name, dataset_name=s.dataset_name)
        with open(folder / "README.md", "a", encoding="utf-8") as card:
            card.write(f"\n## This run\n\n![rewards, accuracies, loss](rewards.png)\n\n```text\n{summary}\n```\n")
        trainer.processing_class.save_pretrained(folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):  # the last one marks a finished run
            write_file(folder / name, (folder / f"checkpoint-{trainer.state.global_step}" / name).read_bytes())
        say("", summary)
    trainer.accelerator.wait_for_everyone()


def prepare(s: argparse.Namespace) -> tuple:
    """Process group, tokenizer, pairs and plan: (arguments, start, train, held-out); the plan is printed."""
    ours = "precompute_ref_log_probs|torch_compile.*"  # what we do ourselves
    given = {f.name: vars(s)[f.name] for f in fields(trl.DPOConfig) if f.init and not re.fullmatch(ours, f.name)}
    given["use_cpu"] |= s.dry_run and not torch.cuda.is_available()  # a plan can be made anywhere
    given["disable_tqdm"] = s.disable_tqdm or not sys.stderr.isatty()
    args, start = trl.DPOConfig(**given), load_start(s)
    s.gradient_checkpointing = args.gradient_checkpointing  # which has a second name, activation_checkpointing
    train, held_out, counts = load_preferences(s, start.tokenizer)
    s.pairs = hashlib.blake2b(np.array(train["pair_hash"]).tobytes(), digest_size=8).hexdigest()
    epoch = math.ceil(len(train) / s.global_batch_size)
    s.planned_steps = s.max_steps if s.max_steps > 0 else math.ceil(s.num_train_epochs * epoch)
    args.eval_delay *= epoch if args.eval_strategy == "epoch" else 1
    for kind in ("eval", "logging", "save"):  # by steps, each comes before the checkpoint of its step, and is in it
        if vars(args)[f"{kind}_strategy"] == "epoch":
            vars(args).update({f"{kind}_strategy": "steps", f"{kind}_steps": epoch})
    args.eval_strategy = args.eval_strategy if held_out is not None else "no"
    shown = [describe_pair(start.tokenizer, train[0], s.max_length)] if s.dry_run else []
    say(as_yaml(counts), *make_plan(s, args, start, train, held_out), *shown)
    return args, start, train, held_out


def main(argv: list[str] | None = None) -> int:
    """Settings, preferences, plan, trainer, train, report, save; exit status 0, 2: a mistake, 128 + signal, else 1."""
    warnings.simplefilter("ignore", FutureWarning)  # of the pinned libraries among themselves
    trainer = None
    try:
        s, problems = parse_settings(sys.argv[1:] if argv is None else argv)
        problems, lacking = problems + check_settings(s), find_broken(s, MACHINE_RULES)
        if problems or (lacking and not s.dry_run):
            raise UserError("\n".join(problems + lacking))
        args, start, train, held_out = prepare(s)
        if lacking:  # for a run, not for a plan
            raise UserError("\n".join(lacking))
        if s.dry_run:
            compare_output(s)
            return 0
        with open_output(s) as is_finished:
            if is_finished:
                say(
                    f"{s.output_dir}: finished, nothing to do (`--overwrite true` repeats it; to merge it, see README)"
                )
                return 0
            trainer = build_trainer(s, args, start, train, held_out)
            report = train_policy(s, trainer)
            with torch.compiler.set_stance("force_eager"):  # what follows is too little to compile for
                show_samples(trainer, s, report)
                save_run(trainer, s, report)
        return 0
    except BaseException as error:
        is_new = trainer is None or not trainer.state.global_step  # nothing is trained yet
        known = [error] if isinstance(error, UserError) else [
            UserError(f"{fix}: {error!r}"[:700], status) for kinds, words, status, fix in FAULTS
            if isinstance(error, kinds) and re.search(words, str(error)) and (is_new or status != 2)
        ]  # fmt: skip
        if not known:  # only its traceback explains it
            raise
    told = known[0]
    if is_main() or told.status == 1:  # a mistake is everybody's, a fault may be one process's alone
        tqdm.write(f"dpotrainer{'' if is_main() else ', process ' + os.environ['RANK']}: {told}", file=sys.stderr)
    return told.status


if __name__ == "__main__":
    sys.exit(main())
