"""Align a language model with human preferences by Direct Preference Optimization (DPO), in one file.

    python dpotrainer.py                                      edit the constants below, run
    python dpotrainer.py --config FILE.yaml --beta 0.05       constants < YAML < command line
    accelerate launch --config_file configs/accelerate/ddp.yaml dpotrainer.py          several GPUs

Over pairs of a prompt x with a chosen answer y_w and a rejected answer y_l, DPO (Rafailov et al., 2023, arXiv
2305.18290, equation 7) minimises

    loss = -log sigmoid(reward(x, y_w) - reward(x, y_l)),    reward(x, y) = beta * (log pi(y | x) - log pi_ref(y | x)).

The log shows the mean of reward(x, y_w) as rewards/chosen, of reward(x, y_l) as rewards/rejected, of their difference
as rewards/margins, and the share of pairs with a positive difference as rewards/accuracies. trl.DPOTrainer does the
training; this file decides what a good run is, checks it before it costs anything (`--dry_run true` shows the plan and
one pair as the model sees it), computes each pair's common prefix once, shows what happened, and loses nothing.

OUTPUT_DIR gets the adapter with tokenizer and model card, settings.yaml (`--config OUTPUT_DIR/settings.yaml` repeats
the run), metrics.jsonl, rewards.png, samples.md, checkpoint-N. The same command again continues an interrupted run.
"""

import argparse
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import uuid
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from numbers import Number
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import peft
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import transformers
import trl
import yaml
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from matplotlib.figure import Figure
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import set_zero3_state
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import global_then_local_main_first, use_adapter

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

# A constant is the setting of the same name in lower case, but for these.
RENAMED = {"MODEL_NAME": "model_name_or_path", "PER_DEVICE_BATCH_SIZE": "per_device_train_batch_size"}
OUR_DEFAULTS = {  # where a good run differs from TRL's defaults
    "use_peft": True, "lora_target_modules": "all-linear", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True,
    "eval_strategy": "steps", "save_total_limit": 2, "logging_first_step": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "logging_nan_inf_filter": False,  # it would hide a loss that is not finite; we stop at one
    "ddp_find_unused_parameters": False,  # every adapter weight gets a gradient
    "ddp_timeout": 7200,  # seconds: a slow first tokenization must not trip the processes that wait for it
}


# ------------------------------------------------------------------------------------------------------------ settings
@dataclass
class Settings:
    """What TRL has no name for; all else is in trl.ScriptArguments, trl.ModelConfig and trl.DPOConfig."""

    global_batch_size: int | None = HfArg(default=None, help="pairs per optimizer step over all processes")
    eval_pairs: int | None = HfArg(default=None, help="pairs held out when the data set has no test split")
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


OBJECTIVES = {  # loss_type: what it does to the margin or the rewards, and where it is from
    "sigmoid": "logistic loss, DPO (arXiv 2305.18290, eq. 7)", "hinge": "hinge loss, SLiC (arXiv 2305.10425)",
    "ipo": "squared distance of the mean gap from 1/(2 beta), IPO (arXiv 2310.12036, eq. 17)",
    "robust": "logistic loss unbiased by flipped labels, equals sigmoid if label_smoothing is 0 (arXiv 2403.00409)",
    "exo_pair": "reverse KL, EXO (arXiv 2402.00856)", "nca_pair": "noise contrast, NCA (arXiv 2402.05369)",
    "bco_pair": "binary classifier, BCO (arXiv 2404.04656)", "aot": "sorted margins, AOT (arXiv 2406.05882)",
    "sppo_hard": "squared distance to win or loss, SPPO (arXiv 2405.00675)", "sft": "cross-entropy of chosen",
    "aot_unpaired": "sorted rewards, AOT (arXiv 2406.05882)", "apo_down": "both down, APO (arXiv 2408.06266)",
    "apo_zero": "chosen up, rejected down, APO (arXiv 2408.06266)", "discopop": "DiscoPOP (arXiv 2406.08414)",
    "sigmoid_norm": "logistic loss per token (arXiv 2405.14734)",
}
RANGES = {  # setting: lowest, highest, usual
    "beta": (1e-6, 100, 0.1), "learning_rate": (1e-12, 1e6, 5e-6), "warmup_steps": (0, 1e9, 0.1), "seed": (0, 2e9, 42),
    "label_smoothing": (0, 0.4999, 0.1), "num_train_epochs": (1e-6, 1e6, 1), "max_steps": (-1, 1e12, -1),
    "lora_r": (1, 1e5, 32), "lora_alpha": (1, 1e6, 32), "lora_dropout": (0, 0.999, 0), "max_length": (2, 1e9, 2048),
    "global_batch_size": (1, 1e9, 64), "per_device_train_batch_size": (1, 1e6, 4), "eval_pairs": (0, 1e9, 500),
    "per_device_eval_batch_size": (1, 1e6, 4), "gradient_accumulation_steps": (1, 1e6, 1),
    "max_grad_norm": (0, 1e9, 1), "sample_prompts": (0, 1e6, 8), "logging_steps": (1e-6, 1e9, 10),
    "eval_steps": (1e-6, 1e9, 100), "save_steps": (1e-6, 1e9, 100),
}
PATHS = ("model_name_or_path", "dataset_name", "ref_model_name_or_path", "output_dir")
LOCAL = r"^$|^[./~]|/.*/|\.(jsonl?|parquet|csv)$"  # what else names a model or a data set is the hub's owner/name
RULES = (  # setting, when its value v is wrong beside all settings s, why, and what to do
    ("loss_type", lambda v, s: not v or set(v) - set(OBJECTIVES), f"is unknown; one of {', '.join(OBJECTIVES)}"),
    ("loss_weights", lambda v, s: v and (len(v) != len(s.loss_type) or not np.isfinite(v).all()),
     "must be one number for each loss_type; mend the list"),
    ("label_smoothing", lambda v, s: v and not {"robust", "exo_pair", "aot", "aot_unpaired"}.intersection(s.loss_type),
     "is for robust, exo_pair, aot and aot_unpaired; leave it out"),
    ("label_smoothing", lambda v, s: not v and "exo_pair" in s.loss_type, "must be above 0; 1e-3"),
    ("discopop_tau", lambda v, s: v != 0.05 and "discopop" not in s.loss_type, "is for discopop; leave it out"),
    ("lora_dropout", lambda v, s: v and s.disable_dropout, "has no effect; add `disable_dropout: false`"),
    ("ref_model_name_or_path", lambda v, s: v and s.reference != "copy", "has no effect; add `reference: copy`"),
    ("reference", lambda v, s: v == "adapter" and s.fresh_adapter, "copies what fresh_adapter merges; auto"),
    ("use_peft", lambda v, s: not v, "is another program's work; `trl dpo` trains all weights"),
    ("merge", lambda v, s: v and (s.load_in_4bit or s.load_in_8bit), "needs a bf16 base; README, 'Merging', says how"),
    ("precompute_ref_log_probs", lambda v, s: v and (is_sharded() or s.fsdp or s.deepspeed),
     "needs a model in one piece; leave it out"),
    ("train_sampling_strategy", lambda v, s: v not in ("random", "sequential"), "weighs pairs unequally; random"),
    ("truncation_mode", lambda v, s: v != "keep_start", "would cut prompts; keep_start"),
    ("eval_do_concat_batches", lambda v, s: not v, "breaks the exact evaluation; leave it out"),
    ("trust_remote_code", lambda v, s: v, "would run its author's code; use a model that transformers knows"),
    ("hub_token", lambda v, s: v, "would be written to a file; use `hf auth login`, or the environment's HF_TOKEN"),
    ("dataset_streaming", lambda v, s: v, "cannot be checked and split beforehand; leave it out"),
    ("auto_find_batch_size", lambda v, s: v, "would change the global batch; lower per_device_train_batch_size"),
    ("resume_from_checkpoint", lambda v, s: v, "follows from what output_dir holds; the same command continues"),
    ("padding_free", lambda v, s: v, "is ignored by TRL; `share_prefixes: true` pads nothing"),
    ("save_strategy", lambda v, s: v not in ("steps", "epoch"), "would leave nothing to resume from; steps"),
    ("push_to_hub", lambda v, s: v, "would push before all is written; afterwards, `hf upload NAME OUTPUT_DIR`"),
    *((f"torch_compile_{part}", lambda v, s: v and not s.torch_compile, "has no effect; add `torch_compile: true`")
      for part in ("backend", "mode")),
    ("save_only_model", lambda v, s: v, "would leave nothing to resume from; leave it out"),
    ("use_liger_kernel", lambda v, s: v, "is deprecated in TRL; leave it out"),
    ("model_init_kwargs", lambda v, s: v, "is for models that TRL loads; dtype, attn_implementation, model_revision"),
    ("report_to", lambda v, s: {*np.atleast_1d(v).tolist()} - {"none", "all", "tensorboard", "wandb", "trackio"},
     "is unknown; tensorboard, wandb, trackio, all or none"),
    ("sync_ref_model", lambda v, s: v, "cannot work with an adapter; leave it out"),
    *((name, lambda v, s: v is None, "is empty; give a value, or leave it out")
      for name in ("model_name_or_path", "dataset_name", "reference", "dtype")),
    *((name, lambda v, s: v is not None and re.search(LOCAL, v) and not os.path.exists(v),
       "there is no such file or folder; check the path") for name in PATHS[:3]),
    ("output_dir", lambda v, s: not v or not can_write(v), "is not a folder that can be written; choose another"),
)
MACHINE_RULES = (  # the same, of what the machine must have
    ("use_cpu", lambda v, s: not v and not torch.cuda.is_available(),
     "no CUDA GPU; `python dpotrainer.py --config configs/quickstart.yaml` runs anywhere, "
     "`--use_cpu true` serves tiny models"),
    ("use_cpu", lambda v, s: not v and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ,
     "several GPUs but one process; CUDA_VISIBLE_DEVICES=0 uses one, "
     "`accelerate launch --config_file configs/accelerate/ddp.yaml dpotrainer.py` all"),
    ("bf16", lambda v, s: v and not s.use_cpu and torch.cuda.is_available()
     and not torch.cuda.is_bf16_supported(including_emulation=False),
     "needs an Ampere GPU (2020) or newer; `--bf16 false --fp16 true --dtype float16`"),
    *(("report_to", lambda v, s, name=name: name in np.atleast_1d(v) and not importlib.util.find_spec(name),
       f"is not installed; `pip install {name}`") for name in ("tensorboard", "wandb", "trackio")),
    *((name, lambda v, s: (v is True or re.search(r"bnb|paged|lion|ademamix|adamw_8bit", str(v)))
       and not importlib.util.find_spec("bitsandbytes"), "needs bitsandbytes; `pip install bitsandbytes`")
      for name in ("load_in_4bit", "load_in_8bit", "optim")),
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


def can_write(folder: str) -> bool:
    there = next(path for path in Path(folder, "new").absolute().parents if path.exists())
    return os.access(f"{there}/", os.W_OK | os.X_OK)  # with a slash, a file is refused


def as_flags(settings: dict[str, Any]) -> list[list[str]]:
    """A mapping as the flags that say the same, [["--beta=0.1"], ...], so that all layers pass the same checks."""
    texts = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in settings.items()}
    return [[f"--{name}", *map(str, v)] if isinstance(v, list) else [f"--{name}={v}"] for name, v in texts.items()]


def read_flag(parser, s: argparse.Namespace, layer: str, words: list[str]) -> str:
    """Set in s what one flag such as ["--beta", "0.1"] says, or return what is wrong with it."""
    flag, _, value = words[0].partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    s.given[name] = layer
    if value == "None" and flag in parser._option_string_actions:  # null in YAML, for which not all types have a word
        setattr(s, name, None)
        return ""
    try:
        unknown = parser.parse_known_args(words, s)[1]
    except argparse.ArgumentError as error:
        return f"{layer}: {error}"
    match = difflib.get_close_matches(name.lower(), vars(s), n=1, cutoff=0.5)
    hint = f"did you mean {match[0]}?" if match else "`--help` lists all"
    return f"{layer}: {unknown[0]!r} is not a setting; {hint}" if unknown else ""


def read_yaml(config: str) -> dict[str, Any]:
    """The settings in a YAML file; what it has under `env` is put into the environment, as `trl dpo` does."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        os.environ |= {name: str(value) for name, value in content.pop("env", {}).items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--config {config}: {why}; give a file of lines such as `beta: 0.1`") from None
    return content


def parse_settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Constants, then the YAML file, then flags, as one flat namespace, and all problems found on the way.

    It holds every field of Settings, ScriptArguments, ModelConfig and DPOConfig; `given` tells which layer set it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file of settings, by the names below")
    file, argv = first.parse_known_args(argv)
    kinds = (Settings, trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig)
    parser = trl.TrlParser(kinds, parents=[first], allow_abbrev=False, exit_on_error=False)
    parser.set_defaults_with_config(**OUR_DEFAULTS)
    parser._option_string_actions["--report_to"].nargs = "+"  # its type is a text or a list of texts
    s = parser.parse_args([], argparse.Namespace(given={}))
    source = Path(__file__).read_text(encoding="utf-8").split("\nRENAMED = ")[0]
    names = re.findall(r"^([A-Z]\w*) *[:=]", source, flags=re.M)  # misspelt ones too, to be refused like any setting
    constants = {RENAMED.get(name, name.lower()): vars(sys.modules[__name__])[name] for name in names}
    parser.set_defaults_with_config(**constants)  # for --help
    starts = [i for i, word in enumerate(argv) if i == 0 or word.startswith("--")]
    layers = {
        "constants": as_flags(constants),
        file.config: as_flags(read_yaml(file.config) if file.config else {}),
        "command line": [argv[i:j] for i, j in itertools.pairwise([*starts, len(argv)])],
    }
    problems = [read_flag(parser, s, layer, words) for layer, flags in layers.items() for words in flags]
    for name in PATHS:
        setattr(s, name, getattr(s, name) and os.path.expanduser(getattr(s, name)))
    del s.config
    return s, list(filter(None, problems))


def find_broken(s: argparse.Namespace, rules: tuple) -> list[str]:
    shown = vars(s) | {"hub_token": "***"}
    return [f"{name}={shown[name]}: {text}" for name, is_wrong, text in rules if is_wrong(getattr(s, name), s)]


def check_batch(s: argparse.Namespace) -> list[str]:
    """Derive gradient accumulation from global_batch_size, or say which sizes would divide it."""
    world, given = int(os.environ.get("WORLD_SIZE", "1")), s.given.get("gradient_accumulation_steps")
    per_pass = s.per_device_train_batch_size * world
    if "per_device_eval_batch_size" not in s.given:
        s.per_device_eval_batch_size = s.per_device_train_batch_size
    if given not in (None, "constants") and s.given.get("global_batch_size") in (None, "constants"):
        s.global_batch_size = per_pass * s.gradient_accumulation_steps  # a file for `trl dpo` keeps its meaning
    steps, rest = divmod(s.global_batch_size, per_pass)
    if rest:
        sizes = [n for n in range(1, min(s.global_batch_size, 999) + 1) if s.global_batch_size % (n * world) == 0]
        fix = f"per_device_train_batch_size one of {sizes}" if sizes else f"a multiple of {world}"
        passes = f"{s.per_device_train_batch_size} per device x {world} processes"
        return [f"global_batch_size={s.global_batch_size}: is no multiple of {passes}; {fix}"]
    if given and s.gradient_accumulation_steps != steps:
        text = f"is {steps} by global_batch_size; leave one of them out"
        return [f"gradient_accumulation_steps={s.gradient_accumulation_steps}: {text}"]
    s.gradient_accumulation_steps = steps
    return []


def check_settings(s: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the settings, each with its fix, before anything is downloaded or written."""
    s.loss_type = s.loss_type or []  # null in YAML
    off = [name for name in ("max_length", "eval_steps") if getattr(s, name) is None]
    problems = [f"{name}={value}: must lie between {low:g} and {high:g}; {usual:g} is usual"
                for name, (low, high, usual) in RANGES.items() if name not in off
                and ((value := getattr(s, name)) is None or not low <= value <= high)]  # fmt: skip
    problems += (check_batch(s) if not problems else []) + find_broken(s, RULES)
    if not problems:
        trl.ModelConfig.__post_init__(s)  # a single one of lora_target_modules may be a pattern, or "all-linear"
    return problems


# ------------------------------------------------------------------------------------------------------ preferences
LAYOUTS = {  # what each column must hold; a column not named may be there or not
    "standard": {"prompt": "text", "chosen": "text", "rejected": "text"},
    "conversational": {"prompt": "messages", "chosen": "messages", "rejected": "messages"},
    "prompt beside conversations": {"prompt": "text", "chosen": "messages", "rejected": "messages"},
    "conversations": {"prompt": "nothing", "conversations": "nothing", "chosen": "messages", "rejected": "messages"},
    "ShareGPT": {"conversations": "messages", "chosen": "messages", "rejected": "messages"},
    "transcripts": {"chosen": "transcript text", "rejected": "transcript text"},
}
SCORES = [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating")]
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "bot": "assistant"}
PREPARED = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), datasets.List(datasets.Value("int32")))
PREPARED |= dict.fromkeys(("pair_hash", "needed_tokens"), datasets.Value("int64"))
PREPARED |= dict.fromkeys(("dropped", "template"), datasets.Value("string"))


def kind_of(cell) -> str:
    """What a cell holds: "text", "transcript text" (it opens with a Human turn), "messages", or its type."""
    if isinstance(cell, str):
        return "transcript text" if re.match(r"\s*Human:", cell) else "text"
    turns = cell if isinstance(cell, list) else [cell]
    return "messages" if all(isinstance(t, dict) and {"role", "from"} & {*t} for t in turns) else type(cell).__name__


def recognise_layout(dataset, source: str) -> str:
    """The one layout that fits the columns, each judged by its first filled cell of the first 100 rows."""
    found = {column: kind_of(next(filter(None, cells), None)) for column, cells in dataset[:100].items()}
    fits = [name for name, kinds in LAYOUTS.items()
            if all(found.get(column, "nothing").endswith(kind) for column, kind in kinds.items())]  # fmt: skip
    if len(fits) == 1:
        return fits[0]
    problem = f"more than one known layout ({', '.join(fits)})" if fits else "no known layout"
    table = "".join(f"\n  {name:<28}{', '.join(map(': '.join, kinds.items()))}"
                    for name, kinds in {"columns found": found, **LAYOUTS}.items())  # fmt: skip
    raise UserError(f"{source}, {len(dataset)} rows: the columns fit {problem}; rename or remove some.{table}")


def read_side(cell, column: str, kind: str, as_chat: bool, where: str) -> str | list[dict]:
    r"""Text, or [{role, content, ...}] made of such, of {from, value}, or of "\n\nHuman: ...\n\nAssistant: ..."."""
    if not kind_of(cell).endswith(kind.split()[-1]):
        raise ValueError(f"{where}: {column} holds {kind_of(cell)}, not {kind}.")
    if kind == "text":
        return [{"role": "user" if column == "prompt" else "assistant", "content": cell}] if as_chat else cell
    if isinstance(cell, str):
        parts = re.split(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):", cell)
        cell = [{"role": name, "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2])]
    messages = []
    for turn in [cell] if isinstance(cell, dict) else cell:
        names = {"from": "role", "value": "content"} if "from" in turn else {}
        turn = {"content": "" if turn.get("tool_calls") else None} | {names.get(key, key): turn[key] for key in turn}
        if (role := str(turn.get("role")).lower()) not in ROLES:
            raise ValueError(f"{where}: unknown role {turn.get('role')!r}; known are {', '.join(ROLES)}.")
        if not isinstance(turn["content"], str):
            raise ValueError(f"{where}: the content of a message is {type(turn['content']).__name__}, not text.")
        messages.append(turn | {"role": ROLES[role]})
    return messages


def canonical_pair(row: dict, layout: str, chat_strings: bool, where: str) -> tuple | str:
    """One row as (prompt, chosen, rejected), all text or all lists of messages; or why it is dropped."""
    sides = [read_side(row.get(column), column, kind, chat_strings and layout == "standard", where)
             for column, kind in LAYOUTS[layout].items() if kind != "nothing"]  # fmt: skip
    prompt, chosen, rejected = sides if len(sides) == 3 else [None, *sides]
    if isinstance(chosen, list):
        if not isinstance(prompt, list):  # it is what both share, up to the last turn that is not the assistant's
            shared = [i for i in range(1, len(chosen) + 1) if chosen[:i] == rejected[:i]]
            history = chosen[: max((i for i in shared if chosen[i - 1]["role"] != "assistant"), default=0)]
            asked = [turn["content"].strip() for turn in history if turn["role"] == "user"]
            prompt = history if asked and (prompt is None or prompt.strip() in asked) else None
        size = len(prompt or [])
        chosen, rejected = (side[size:] if side[:size] == prompt != side else side for side in (chosen, rejected))
    ends = [side[-1] if side and isinstance(side, list) else {"role": "assistant", "content": side or ""}
            for side in (prompt, chosen, rejected) if side is not None]  # fmt: skip
    reasons = {
        "empty side": not all(turn["content"].strip() or turn.get("tool_calls") for turn in ends),
        "chosen equals rejected": chosen == rejected,
        "tied scores": any(row.get(a) not in (None, "") and row[a] == row.get(b) for a, b in SCORES),
        "no final assistant turn": any(turn["role"] != "assistant" for turn in ends[-2:]),
        "histories differ": prompt is None,
    }
    return next(filter(reasons.get, reasons), (prompt, chosen, rejected))


def render_pair(pair: tuple, row: dict, tokenizer, where: str) -> tuple[list[str] | str, str]:
    """([prompt, prompt + chosen, prompt + rejected], the template's arguments) or (why it is dropped, "")."""
    prompt, chosen, rejected = pair
    if isinstance(prompt, str):
        return [prompt, prompt + chosen, prompt + rejected], "none"
    # Qwen3's empty think block belongs to the prompt unless an answer carries reasoning: the first that fits is taken
    for choice in [{"enable_thinking": False}, {}] if "enable_thinking" in str(tokenizer.chat_template) else [{}]:
        try:
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
            options = {"tokenize": False, "tools": tools, **choice, **row.get("chat_template_kwargs", {})}
            alone = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
            whole = [tokenizer.apply_chat_template(prompt + answer, **options) for answer in (chosen, rejected)]
        except Exception as error:  # jinja's own errors, and whatever a template raises to refuse a conversation
            raise ValueError(f"{where}: the chat template refuses this pair: {error}") from error
        other = next((text for text in whole if not text.startswith(alone)), None)
        if other is None:
            return [alone, *whole], ", ".join(f"{key}={value}" for key, value in choice.items()) or "defaults"
    if len(chosen + rejected) > 2:
        return "histories differ", ""
    parted = next((i for i, (a, b) in enumerate(zip(alone, other)) if a != b), len(other))
    alone, other = (repr(text[max(0, parted - 80) : parted + 80]) for text in (alone, other))
    raise ValueError(f"{where}: the chat template renders the prompt differently alone than with its answer:\n  "
                     f"alone        {alone}\n  with answer  {other}\nSave a chat_template.jinja that renders both "
                     "alike beside the tokenizer.")  # fmt: skip


def measure_pair(prompt: list[int], chosen: list[int], rejected: list[int], max_length: int | None) -> tuple:
    """Columns PREPARED, short of the last, from the token ids of a prompt and its answers."""
    first, second = (np.array(prompt + answer, "<i4")[:max_length] for answer in (chosen, rejected))
    short = min(len(first), len(second))
    shared = int(np.cumprod(first[:short] == second[:short]).sum())
    reasons = {"chosen equals rejected": chosen == rejected,
               "prompt leaves no room": len(prompt) >= (max_length or np.inf),
               "equal after truncation": shared == len(first) == len(second)}  # fmt: skip
    both = np.r_[len(prompt), len(first), first, second].astype("<i4").tobytes()  # alike on every machine
    pair_hash = int.from_bytes(hashlib.blake2b(both, digest_size=8).digest(), "little", signed=True)
    needed = len(first) + len(second) - min(shared, short - 1)  # distinct tokens; the last of a row is never shared
    return prompt, chosen, rejected, pair_hash, needed, next(filter(reasons.get, reasons), "")


def prepare_pair(row: dict, index: int, tokenizer, layout: str, options: dict, source: str) -> dict:
    """A row as it was read to the columns PREPARED; a pair dropped before it is tokenized has no tokens."""
    # arrow gives every struct of a column the keys of all of them, with None for those it had not
    text = json.dumps(dict(row), default=lambda cell: float(cell) if isinstance(cell, Number) else str(cell))
    row = json.loads(text, object_hook=lambda cell: {key: cell[key] for key in cell if cell[key] is not None})
    where = f"{source}, row {index + 1}"
    pair = canonical_pair(row, layout, options["chat_strings"], where)
    texts, form = (pair, "") if isinstance(pair, str) else render_pair(pair, row, tokenizer, where)
    if not form:
        return dict(zip(PREPARED, ([], [], [], 0, 0, texts, "")))
    encode = functools.partial(tokenizer, add_special_tokens=False, return_attention_mask=False, verbose=False)
    alone, *whole = texts
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = tuple(token.content for token in special)
    whole = [text if text.rstrip().endswith(ends) else text + tokenizer.eos_token for text in whole]
    # these tokens part a text: what precedes the prompt's last one is tokenized once instead of three times
    parts = [token.content for token in special if not (token.lstrip or token.normalized)]
    size = max([0, *map(alone.rfind, parts)])
    head, tail, *both = encode([alone[:size], *(text[size:] for text in texts[:1] + whole)]).input_ids
    # where tokens merge across the boundary, the answer is tokenized apart: in use, it starts with a new token
    answers = [ids[len(tail) :] if ids[: len(tail)] == tail else encode(text[len(alone) :]).input_ids
               for ids, text in zip(both, whole)]  # fmt: skip
    prompt = head + tail
    if form == "none":  # raw text gets the bos, which a template writes itself
        marked = tokenizer("x").input_ids
        prompt = marked[: marked.index(encode("x").input_ids[0])] + prompt
    return dict(zip(PREPARED, (*measure_pair(prompt, *answers, options["max_length"]), form)))


def prepare_split(dataset, split: str, settings, tokenizer) -> tuple:
    """One split, tokenized and without its bad pairs; and the report: row numbers from 1, of the first five."""
    source, limit = f"{settings.dataset_name} ({split})", settings.max_length
    layout = recognise_layout(dataset, source)
    if tokenizer.chat_template is None and (layout != "standard" or settings.chat_strings):
        fix = "start from the instruct version, or save a chat_template.jinja beside the tokenizer"
        raise UserError(f"{source} needs a chat template, and the tokenizer has none: {fix}.")
    read = sorted({*LAYOUTS[layout], *sum(SCORES, ()), "tools", "chat_template_kwargs"}.intersection(dataset.features))
    options = {"chat_strings": settings.chat_strings, "max_length": limit}
    # our own key for the cache: the default one pickles the tokenizer, which differs from run to run
    code = re.search(r"(?s)- preferences\n.*- policy and reference\n", Path(__file__).read_text("utf-8")).group()
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab())
    key = [code, dataset._fingerprint, read, options, words, tokenizer.special_tokens_map, tokenizer.chat_template]
    try:
        table = dataset.select_columns(read).map(
            prepare_pair, with_indices=True, remove_columns=read, desc=f"Tokenizing {split}",
            fn_kwargs={"tokenizer": tokenizer, "layout": layout, "options": options, "source": source},
            num_proc=settings.dataset_num_proc or (min(8, os.cpu_count()) if len(dataset) > 5000 else None),
            new_fingerprint=hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest(),
            features=datasets.Features(PREPARED))  # fmt: skip
    except ValueError as error:  # a class of our own would not come back from a worker process
        raise UserError(str(error)) from None
    frame, lengths = table.select_columns(["dropped", "template", "pair_hash"]).to_pandas(), token_lengths(table)
    good, bad = frame[frame.dropped == ""], frame[frame.dropped != ""].groupby("dropped").groups
    rows = np.stack([lengths["prompt"] + lengths[side] for side in ("chosen", "rejected")])  # (2, N) tokens
    tokenized = np.sort(rows[:, frame.template != ""], axis=None)  # with those whose prompt left no room
    report = {
        "layout": layout, "ignored columns": ", ".join(sorted({*dataset.features}.difference(read))) or "none",
        "template arguments": good.template.value_counts().to_dict(), "read": len(frame), "kept": len(good),
        "dropped": {reason: (len(numbers), (numbers[:5] + 1).tolist()) for reason, numbers in bad.items()},
        "duplicates": int(good.pair_hash.duplicated().sum()), "max_length": limit,
        "answers cut": float((rows[:, good.index] > (limit or np.inf)).sum() / max(2 * len(good), 1)),
        "max_length for less than 1%": int(tokenized[-len(tokenized) // 100]) if len(tokenized) else None,
    }  # fmt: skip
    if len(good) * 2 < len(frame):
        raise UserError(f"{source}: too few pairs can be used.\n{format_report(report)}")
    return table.remove_columns(["dropped", "template"]).select(good.index), report


def token_lengths(dataset) -> dict[str, np.ndarray]:
    """Tokens before truncation, (N,) each: of prompt, and of chosen and rejected without it. No ids are read."""
    rows = slice(None) if dataset._indices is None else dataset._indices.column(0).to_numpy()
    columns = {side: dataset.data.column(f"{side}_ids") for side in ("prompt", "chosen", "rejected")}
    return {side: pc.list_value_length(column).to_numpy()[rows] for side, column in columns.items()}


def format_report(report: dict) -> str:
    """The report on the data, or on one of its splits, as aligned lines."""
    if "splits" in report:
        both = f" ({report['in both']} of them among those held out)" * (report["in both"] > 0)
        head = f"{report['data']}: {report['train']} pairs to train on{both}, {report['held out']} held out"
        return head + "".join(f"\n split {name}\n{format_report(part)}" for name, part in report["splits"].items())
    lines = {name: f"{value:.1%}" if isinstance(value, float) else value for name, value in report.items()}
    for reason, (count, rows) in lines.pop("dropped").items():
        lines[f"dropped: {reason}"] = f"{count} (rows {', '.join(map(str, rows))}{', ...' * (count > len(rows))})"
    return "\n".join(f"    {name:<34}{value}" for name, value in lines.items())


def find_bad_row(path: Path) -> str:
    """Where the JSON file at `path`, or one in the folder, is broken; empty when none is."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.json*")):
        text = file.read_bytes()
        for number, line in enumerate([text] if text[:1] == b"[" else text.split(b"\n"), 1):
            try:  # encoding finds lone surrogates, which arrow refuses and json lets pass
                json.dumps(json.loads(line.strip() or b"{}"), ensure_ascii=False).encode()
            except ValueError as error:
                return f"{file}, row {number}: {error}"
    return ""


def read_splits(settings) -> dict:
    """{split name: data set}: the one to train on and, where there is one, the one held out."""
    name, path = settings.dataset_name, Path(settings.dataset_name).expanduser()
    known = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    is_local = path.is_file() or path.suffix in known or name[:1] in "./~"
    if is_local and not path.is_dir() and not (path.is_file() and path.suffix in known):
        raise UserError(f"dataset_name: {name} is no folder, and no file of a known type ({', '.join(known)}).")
    source = {"path": str(path) if path.is_dir() else name, "name": settings.dataset_config}
    if path.is_file():
        source = {"path": known[path.suffix], "data_files": str(path)}
        source |= {"keep_default_na": False} if path.suffix == ".csv" else {}  # an answer "None" is text
    try:
        found = datasets.load_dataset(**source)
    except Exception as error:  # the network's, the hub's, arrow's, pandas'
        reason = (find_bad_row(path) if path.exists() else "") or f"{type(error).__name__}: {error}"
        fix = f"from the hub: check name, network and `hf auth login`; a folder must hold {', '.join(known)} files"
        raise UserError(f"The data set {name} cannot be read: {reason}\n{fix}") from error
    train, test = settings.dataset_train_split, settings.dataset_test_split
    if (train, test) == ("train", "test") and train not in found and "train_prefs" in found:
        train, test = "train_prefs", "test_prefs"
    if train not in found or test not in {*found, "test", "test_prefs"}:
        wanted = f"dataset_train_split ({train}) and dataset_test_split ({test})"
        raise UserError(f"The data set {name} has the splits {', '.join(found)}, but not both {wanted}.")
    return {split: found[split] for split in (train, test) if split in found}


def load_preferences(settings, tokenizer) -> tuple:
    """(train, held_out or None, report): the pairs, read, checked, tokenized to PREPARED's first five, and split."""
    with global_then_local_main_first():  # the other processes find the main one's work in the cache
        splits = {name: prepare_split(data, name, settings, tokenizer) for name, data in read_splits(settings).items()}
    train, held_out, *_ = *(pairs for pairs, _ in splits.values()), None
    hashes = np.array(train["pair_hash"][:])
    if held_out is None:  # a fifth at most; picked by their hashes, equal pairs stay on one side
        drawn = hashes ^ np.random.default_rng(settings.seed).integers(-(2**63), 2**63)
        held = drawn < np.sort(drawn)[min(settings.eval_pairs, len(train) // 5)]
        held_out = train.select(np.flatnonzero(held)) if held.any() else None
        train, hashes = train.select(np.flatnonzero(~held)), hashes[~held]
    report = {"data": settings.dataset_name, "splits": {name: part for name, (_, part) in splits.items()},
              "train": len(train), "held out": len(held_out or []),
              "in both": int(np.isin(hashes, held_out["pair_hash"][:]).sum()) if held_out else 0}  # fmt: skip
    return train, held_out, report


def describe_pair(tokenizer, pair: dict, max_length: int | None) -> str:
    """One pair as the model sees it, special tokens and all; long texts are shortened in the middle."""
    lines, room = [], max_length or sys.maxsize
    for side in ("prompt", "chosen", "rejected"):
        ids = pair[f"{side}_ids"]
        text = re.sub(r"(?s)^(.{320}).+(.{160})$", r"\1 [...] \2", tokenizer.decode(ids[:room]))
        cut = f" | {len(ids) - room} tokens cut by max_length {max_length}" * (len(ids) > room)
        lines.append(f"{side:<9}{len(ids):>6} tokens  {text!r}{cut}")
        room -= len(ids) * (side == "prompt")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ policy and reference
HUB_FIXES = {  # what the error of a hub or a file says: what to do
    r"gated|restricted|401|403": "accept its licence on its page, then log in with `hf auth login`",
    r"connect|offline|resolve|timed? ?out|network|LocalEntry": "connect to the network, or give a local folder",
    r"safetensors": "give weights as safetensors: pickled ones can run code",
    r"": "check the spelling; a private one needs `hf auth login`",
}


def fetch(s: argparse.Namespace, load, name: str, **options):
    """load(name, ...), with every way in which a hub or a file can fail told in one line."""
    try:
        return load(name, revision=s.revisions.get(name, "main"), **options)
    except (OSError, ValueError, KeyError) as error:
        text = f"{type(error).__name__} {type(error.__cause__).__name__} {error}"
        fix = next(fix for pattern, fix in HUB_FIXES.items() if re.search(pattern, text, re.IGNORECASE))
        setting = ("ref_" if name == s.ref_model_name_or_path else "") + "model_name_or_path"
        raise UserError(f"{setting}={name}: cannot be loaded: {str(error).strip().splitlines()[0]}; {fix}") from error


def load_start(s: argparse.Namespace) -> argparse.Namespace:
    """What a run starts from: base, adapter (None unless the model is one), tokenizer, config, kind of reference."""
    name = s.model_name_or_path
    s.revisions = {name: s.model_revision or "main"}
    path = fetch(s, find_adapter_config_file, name)
    adapter = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    base = adapter.get("base_model_name_or_path", name)
    s.revisions.setdefault(base, adapter.get("revision") or "main")
    if not path and (s.reference == "adapter" or s.fresh_adapter):
        asked = f"reference={s.reference}, fresh_adapter={s.fresh_adapter}"
        raise UserError(f"{asked}: {name} is no adapter; leave them out")
    if adapter.get("peft_type", "LORA") in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"):
        raise UserError(
            f"model_name_or_path={name}: is a prompt-learning adapter; start from its base, or from a LoRA"
        )
    continues = bool(path) and not s.fresh_adapter
    kind = "adapter" if continues and s.reference == "auto" else s.reference
    told = {"auto": f"the policy with its adapter switched off{' (base and SFT adapter, merged)' if path else ''}",
            "copy": f"a second, frozen model ({s.ref_model_name_or_path or name})",
            "adapter": f"a frozen copy of the starting adapter ({name})"}  # fmt: skip
    bare = path and Path(name).exists() and not Path(name, "tokenizer_config.json").exists()
    own = base if bare else name
    tokenizer = fetch(s, transformers.AutoTokenizer.from_pretrained, own, trust_remote_code=False)
    tokenizer.pad_token = s.pad_token or tokenizer.pad_token or tokenizer.eos_token
    config = fetch(s, transformers.AutoConfig.from_pretrained, base, trust_remote_code=False)
    return argparse.Namespace(base=base, adapter=name if path else None, adapter_file=path, continues=continues,
                              tokenizer=tokenizer, config=config, reference=kind, told=told[kind])  # fmt: skip


def load_model(s, args, base: str, adapter: str | None, trainable: bool) -> tuple:
    """(causal LM on this process's one device, why it shares no prefixes or None), its adapter on top, or merged."""
    if adapter and not trainable and is_deepspeed_zero3_enabled():
        raise UserError(f"{adapter}: cannot be merged while ZeRO-3 shards its base; use fsdp2.yaml, or merge it first")
    options = {"dtype": s.dtype, "attn_implementation": s.attn_implementation, "trust_remote_code": False,
               "use_safetensors": True, "quantization_config": trl.get_quantization_config(s)}  # fmt: skip
    options |= {"device_map": {"": args.device}} if args.device.type == "cuda" and not is_sharded() else {}
    model = fetch(s, transformers.AutoModelForCausalLM.from_pretrained, base, **options)
    reason = why_not_shared(model, s)
    if reason is None:
        share_prefixes(model)
    if adapter:
        model = fetch(s, functools.partial(peft.PeftModel.from_pretrained, model), adapter, is_trainable=trainable)
    return (model.merge_and_unload() if adapter and not trainable else model), reason


def build_trainer(s, args, start, train, held_out) -> "PreferenceTrainer":
    """Policy, reference and pairs in a trainer; without `ref_model` it switches the adapter off, or copies it."""
    transformers.set_seed(s.seed)
    policy, reason = load_model(s, args, start.base, start.adapter, trainable=start.continues)
    if s.fresh_adapter:  # the new adapter is one of the merged model, so that model has to be there
        folder = Path(s.output_dir, "base")
        if is_main() and not folder.exists():
            for part in (policy, start.tokenizer):
                part.save_pretrained(f"{folder}.incomplete")
            os.rename(f"{folder}.incomplete", folder)
        policy.name_or_path = policy.config._name_or_path = str(folder)
    reference = None
    if start.reference == "copy":
        other = (s.ref_model_name_or_path, None) if s.ref_model_name_or_path else (start.base, start.adapter)
        reference, why = load_model(s, args, *other, trainable=False)
        reason = reason or why
    lora = None if start.continues else trl.get_peft_config(s)
    if lora and not s.fresh_adapter:
        lora.revision = s.revisions[start.base]  # so that whoever loads the adapter loads this base
    collator = PreferenceCollator(start.tokenizer.pad_token_id, s.max_length, share_prefixes=reason is None)
    trainer = PreferenceTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=train, eval_dataset=held_out,
        data_collator=collator, processing_class=start.tokenizer, compute_metrics=pair_metrics,
        peft_config=lora,
    )  # fmt: skip
    for weight in trainer.model.parameters() if (s.load_in_4bit or s.load_in_8bit) and not is_sharded() else ():
        if weight.requires_grad:  # TRL makes them bf16, which rounds most steps of a learning rate of 5e-6 away
            weight.data = weight.data.float()
    for module in trainer.model.modules() if args.bf16 and args.device.type == "cuda" else ():
        if hasattr(module, "cast_input_dtype_enabled"):  # PEFT casts up and autocast down again: lossless, not free
            module.cast_input_dtype_enabled = False
    for layer in trainer.model.modules() if s.torch_compile else ():
        if isinstance(layer, GradientCheckpointingLayer):  # transformers' mark of a decoder layer: alike, so one graph
            layer.compile(backend=s.torch_compile_backend or "inductor", mode=s.torch_compile_mode, dynamic=True)
    return trainer


class BalancedSampler(torch.utils.data.Sampler):
    """The pairs in `order`, those of each optimizer step dealt out so that its forward passes have alike much to do.

    Which pairs make a step stays as it was, and so does its gradient (but for aot, aot_unpaired and sft, which look at
    all pairs of a pass); but no process waits long for another, and no pass needs much more memory than the others.
    """

    def __init__(self, order, needed: np.ndarray, size: int, passes: int):
        self.order, self.needed, self.size, self.passes = order, needed, size, passes

    def __len__(self):
        return len(self.order)

    def set_epoch(self, epoch: int):
        self.order.set_epoch(epoch)

    def __iter__(self):
        order, step = np.array(list(self.order)), self.size * self.passes
        for pairs in np.split(order, range(step, len(order), step)):
            if len(pairs) == step:  # accelerate gives pass k to process k mod their number
                ranked = pairs[np.argsort(-self.needed[pairs], kind="stable")]
                hands = np.empty((self.passes, self.size), int)
                for i, row in enumerate(ranked.reshape(self.size, self.passes)):  # the largest to who has least so far
                    hands[np.argsort(self.needed[hands[:, :i]].sum(1), kind="stable"), i] = row
                pairs = hands.flatten()
            yield from pairs.tolist()


class PreferenceTrainer(trl.DPOTrainer):
    """trl.DPOTrainer on tokenised pairs, with an exact evaluation, and checkpoints that are whole or do not count."""

    def _prepare_dataset(self, dataset, *_):
        return dataset  # load_preferences has tokenised and checked it

    def get_train_dataloader(self):
        loader, args = super().get_train_dataloader(), self.args
        if self.data_collator.share_prefixes and args.train_sampling_strategy == "random":
            passes, needed = args.gradient_accumulation_steps * args.world_size, self.train_dataset["needed_tokens"]
            sampler = BalancedSampler(loader.get_sampler(), np.array(needed), args.per_device_train_batch_size, passes)
            loader.set_sampler(sampler)  # in all of accelerate's layers, so that a resumed epoch has its own order
        return loader

    def require_finite(self, value, what: str, inputs: dict):
        if not math.isfinite(value):
            text = f"the {what} is not finite at step {self.state.global_step + 1}, the last checkpoint is kept: " \
                f"lower learning_rate ({self.args.learning_rate:g}), raise beta, or use bf16, not fp16"  # fmt: skip
            rows = [row[:60] for row in inputs["input_ids"].chunk(2)[0].tolist()] if inputs else []
            raise UserError("\n  ".join([text, *map(repr, self.processing_class.batch_decode(rows))]), status=1)
        return value

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.require_finite(super().training_step(model, inputs, num_items_in_batch), "loss", inputs)

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)  # in fp16 the scaler looks for an overflow, and skips that step
        return norm if self.accelerator.scaler is not None else self.require_finite(norm, "gradient", {})

    def pair_logps(self, model, inputs) -> tuple:
        """Log-probs of the answers, (B,) each: policy's chosen, rejected, reference's chosen, rejected; the output."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        passed = {k: v for k, v in inputs.items() if k != "completion_mask" and not k.startswith("ref_")}
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**passed, labels=labels, use_cache=False, fused_lm_head=True)
            policy = self.compute_ref_log_probs(lambda **_: output, inputs)  # it sums up the answers of any model
            if "ref_chosen_logps" in inputs:
                return *policy, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], output
            return *policy, *self.compute_ref_log_probs(self.ref_model or model, inputs), output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(B, 5) in place of logits: each pair's loss, rewards of chosen and rejected, log-probs of both.

        Trainer gathers them, drops the pairs that only fill up the last batch, and hands all to `pair_metrics`; TRL
        would log means of batch means. A pair's loss is TRL's own, computed from the model's output for that pair.
        """
        inputs = self._prepare_inputs(inputs)
        *logps, output = self.pair_logps(model, inputs)
        losses, before = [], (self.precompute_ref_logps, self.aux_loss_enabled)
        self.precompute_ref_logps, self.aux_loss_enabled = True, False  # a router's loss is of a batch, not of a pair
        for rows in torch.arange(2 * len(logps[0])).view(2, -1).T:
            one = type(output)(**{k: v[rows] for k, v in output.items() if v is not None and v.ndim == 2})
            pair = {k: inputs[k][rows] for k in ("input_ids", "attention_mask", "completion_mask")}
            pair |= {f"ref_{side}_logps": values[rows[:1]] for side, values in zip(("chosen", "rejected"), logps[2:])}
            losses.append(self._compute_loss(lambda one=one, **_: one, pair, return_outputs=False).detach().float())
        self.precompute_ref_logps, self.aux_loss_enabled = before
        self._metrics["eval"].clear()
        rewards = [self.beta * (policy - reference) for policy, reference in zip(logps[:2], logps[2:])]
        scores = torch.stack([torch.stack(losses), *rewards, *logps[:2]], dim=1)
        return None, scores, scores[:, :1]

    def _save_checkpoint(self, model, trial):
        """A checkpoint is whole once its manifest, written last, lists every file; only then do older ones go."""
        averages = {name: vars(self)[name] for name in ("_globalstep_last_logged", "_total_train_tokens")}
        averages |= {"metrics": dict(self._metrics["train"])}  # so far, of the log line to come
        averages |= {"loss": self.accelerator.gather(self._tr_loss).mean().item()}
        self.state.stateful_callbacks["averages"] = averages
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if is_main():
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            manifest = {"trained on": self.trained_on, "files": digest_files(folder)}
            write_file(folder / MANIFEST, json.dumps(manifest, indent=1))
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)

    def restore_averages(self) -> None:
        """So that the first log line after a resume averages over the steps before it too."""
        averages = dict(self.state.stateful_callbacks["averages"])
        self._tr_loss += averages.pop("loss")
        self._metrics["train"].update(averages.pop("metrics"))
        vars(self).update(averages)

    def save_model(self, output_dir=None, _internal_call=False):
        """The adapter alone, gathered where FSDP shards it: transformers would gather all weights, or none."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        self._save(output_dir, get_model_state_dict(self.model, options=options))


def pair_metrics(scores) -> dict[str, float]:
    """Means over the held-out pairs, each counted once; accuracies with their 95% interval (Wilson, 1927)."""
    loss, chosen, rejected, logps_chosen, logps_rejected = np.asarray(scores.predictions, dtype=np.float64).T
    n, p, z = len(loss), float((chosen > rejected).mean()), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    values = {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected, "logps/chosen": logps_chosen,
              "logps/rejected": logps_rejected, "rewards/margins": chosen - rejected, "rewards/accuracies": [p],
              "rewards/accuracies_low": [min(low, p)], "rewards/accuracies_high": [max(high, p)]}  # fmt: skip
    return {name: float(np.mean(value)) for name, value in values.items()}


def reference_folder(s: argparse.Namespace, start: argparse.Namespace) -> Path:
    """Where log-probs lie that depend on the same weights, dtype, quantisation and ld_alpha."""
    merged = bool(start.adapter) and (s.fresh_adapter or start.reference == "copy")
    what = [s.ld_alpha, s.dtype, s.bf16, s.fp16, s.load_in_4bit, s.load_in_8bit, s.bnb_4bit_quant_type,
            s.use_bnb_nested_quant, merged]  # fmt: skip
    sources = {start.base: getattr(start.config, "_commit_hash", None), start.adapter: start.adapter_file}
    if s.ref_model_name_or_path:
        config = fetch(s, transformers.AutoConfig.from_pretrained, s.ref_model_name_or_path, trust_remote_code=False)
        sources = {s.ref_model_name_or_path: getattr(config, "_commit_hash", None)}
    for name, commit in sources.items():
        files = [path.stat() for path in sorted(Path(name or os.devnull).glob("*.safetensors"))]
        what += [name, [(file.st_size, file.st_mtime_ns) for file in files] or commit]
    key = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    return Path(HF_HOME, "dpotrainer", f"reference-{key}")


KNOWN = np.dtype([("pair", "<i8"), ("logps", "<f8", 2)])  # of a pair, by its hash: chosen and rejected, in nats


def cache_reference(trainer: PreferenceTrainer, s: argparse.Namespace, folder: Path) -> None:
    """The reference's log-probs as columns, from files that runs share; what is missing is computed and kept."""

    def read() -> dict[int, list[float]]:  # a torn end is no whole entry, and a lost block is zeros
        known = np.concatenate([np.empty(0, KNOWN), *(np.fromfile(file, KNOWN) for file in folder.iterdir())])
        known = known[(known["pair"] != 0) & (known["logps"] <= 0).all(1)]
        return dict(zip(known["pair"].tolist(), known["logps"].tolist()))

    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in ("train_dataset", "eval_dataset") if getattr(trainer, name) is not None]
    pairs, known = datasets.concatenate_datasets([getattr(trainer, name) for name in names]), read()
    todo = [(i, pair) for i, pair in enumerate(pairs["pair_hash"]) if pair not in known]
    trainer.accelerator.wait_for_everyone()  # all count before the first adds
    say(f"reference log-probs: {len(pairs) - len(todo)} of {len(pairs)} pairs are in {folder}")
    # by hash, so that all divide alike whatever others add meanwhile; per host, as HF_HOME may be each host's own
    local, world = trainer.accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = [i for i, pair in todo if pair % world == local]
    size = s.precompute_ref_batch_size or s.per_device_eval_batch_size
    with open(folder / uuid.uuid4().hex, "xb") if mine else nullcontext() as file:  # one's own: needs no lock
        for at in tqdm(range(0, len(mine), size), desc="reference", disable=None if is_main() and todo else True):
            rows = [pairs[i] for i in mine[at : at + size]]
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            logps = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch), dim=1)
            trainer.require_finite(logps.sum().item(), "reference's log-prob", batch)
            entries = [(row["pair_hash"], both) for row, both in zip(rows, logps.tolist())]
            file.write(np.array(entries, KNOWN).tobytes())
            file.flush()  # a kill costs one batch
    trainer.accelerator.wait_for_everyone()
    known = read()
    for name in names:
        data = getattr(trainer, name)
        logps = np.array([known[pair] for pair in data["pair_hash"]])
        for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), logps.T):
            data = data.add_column(column, values)
        setattr(trainer, name, data)
    trainer.precompute_ref_logps = True


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
class PreferenceCollator(DataCollatorForPreference):
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
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
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
    transformers.AttentionMaskInterface.register("shared_prefixes", sdpa_mask)
    model.set_attn_implementation("shared_prefixes")
    model.base_model.register_forward_pre_hook(pack, with_kwargs=True)
    model.base_model.register_forward_hook(unpack, with_kwargs=True)


def why_not_shared(model, settings=None):
    """The reason, in one line, why `model` must run its rows apart and padded; None where it can share prefixes."""
    config = model.config.get_text_config()
    own, asked = functools.partial(getattr, config), functools.partial(getattr, settings)
    layers, router = set(own("layer_types", None) or ()), asked("router_aux_loss_coef", None)
    router = own("router_aux_loss_coef", 0) if router is None else router
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    # fmt: off
    reasons = {
        "`attn_implementation` asks for another attention": asked("attn_implementation", None) is not None,
        "it is a vision-language model, whose rows hold images": config is not model.config,
        "its attention cannot be replaced from outside": not getattr(model, "_supports_attention_backend", False),
        "not all of its layers are full attention":
            layers - {"full_attention"} or getattr(model, "_is_stateful", False),
        "its attention looks back over a sliding window only":
            not layers and own("sliding_window", None) and own("use_sliding_window", True),
        "its attention logits are capped": own("attn_logit_softcapping", None) is not None,
        "its attention has sinks": any("sinks" in name for name, _ in model.named_parameters()),
        "its attention has dropout": any(own(name, 0) for name in ("attention_dropout", "attn_pdrop")),
        "its router loss counts each token of both rows": hasattr(config, "output_router_logits") and router,
        "its adapter adds virtual tokens to each row": virtual,
        "`share_prefixes: false` asks for it": not asked("share_prefixes", True),
    }
    # fmt: on
    return next((reason for reason, applies in reasons.items() if applies), None)


# ------------------------------------------------------------------------------------------------------------ the plan
def measure_model(s, start, shared: int, padded: int) -> tuple[int, int, dict[str, float], str | None]:
    """Weights in all, and trained; GiB at so many tokens a batch; why prefixes are not shared: from shapes alone."""
    dtype, config = getattr(torch, s.dtype, torch.bfloat16), start.config.get_text_config()
    with torch.device("meta"), set_zero3_state():  # ZeRO-3 would part out weights that are not there
        model = transformers.AutoModelForCausalLM.from_config(start.config, dtype=dtype)
        reason = why_not_shared(model, s)
        lora = peft.PeftConfig.from_pretrained(start.adapter) if start.continues else trl.get_peft_config(s)
        lora.inference_mode = False  # a starting adapter is trained on
        model = peft.get_peft_model(model, lora)
    trained, total = model.get_nb_trainable_parameters()
    whole = dtype.itemsize  # bytes a weight; 0.516: NF4 with doubly packed scales
    packed = 0.516 if s.load_in_4bit else 1 if s.load_in_8bit else whole
    frozen = sum(weight.numel() * (whole if weight.ndim != 2 or re.search("embed|lm_head", name) else packed)
                 for name, weight in model.named_parameters() if not weight.requires_grad)  # fmt: skip
    # values that a layer keeps for its backward pass, per token: counted in Qwen3's, in bf16 with LoRA
    layer = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    kept = config.num_hidden_layers * (config.hidden_size if s.gradient_checkpointing else layer) + 2 * layer
    sizes = {"weights": frozen, "gradients": 4 * trained, "adapter": 4 * trained,
             "optimizer": trained * (2 if "8bit" in str(s.optim) else 8),
             "reference": {"copy": frozen, "adapter": 4 * trained}.get(start.reference, 0),
             "activations (an estimate)": (padded if reason else shared) * kept * whole}  # fmt: skip
    return total, trained, {name: size / 2**30 for name, size in sizes.items()}, reason


def make_plan(s, args, start, train, held_out) -> list[str]:
    """What will happen, every derived number included; the last four lines in a dry run only. No weights are read."""
    lengths, needed, size = token_lengths(train), np.sort(train["needed_tokens"]), s.per_device_train_batch_size
    longest = (lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"])).clip(max=s.max_length)
    batches = np.maximum.reduceat(np.random.default_rng(s.seed).permutation(longest), range(0, len(longest), size))
    padded = 2 * len(longest) * batches.mean()
    total, trained, gib, reason = measure_model(s, start, int(needed[-size:].sum()), int(2 * size * longest.max()))
    terms = zip(s.loss_weights or [1] * len(s.loss_type), s.loss_type)
    goal = " + ".join(f"{weight:g} x {OBJECTIVES[name]}" for weight, name in terms).removeprefix("1 x ")
    spread = {side: np.quantile(counts, [0.05, 0.5, 0.95, 1]).astype(int).tolist() for side, counts in lengths.items()}
    disk = gib["adapter"] * (3 * (s.save_total_limit or 1) + 1) + gib["weights"] * (s.merge + s.fresh_adapter)
    lines = f"""\
    policy  {s.model_name_or_path}, {total:,} weights in {s.dtype}{", 4-bit" * s.load_in_4bit}, {trained:,} trainable
 reference  {start.told}
 objective  {goal}, beta {s.beta:g}
     pairs  {len(train):,} to train, {len(held_out or []):,} held out, max_length {s.max_length}
     batch  {s.global_batch_size} pairs = {size} per device x {s.gradient_accumulation_steps} accumulation \
x {args.world_size} process{"es" * (args.world_size > 1)} on {args.device}
     steps  {s.planned_steps:,}, learning rate {s.learning_rate:g}, {s.lr_scheduler_type}
  prefixes  {f"not shared: {reason}" if reason else "shared, and no padding"}
    output  {s.output_dir}
    tokens  5%, median, 95%, longest: {", ".join(f"{side} {counts}" for side, counts in spread.items())}
 per epoch  {needed.sum():,} tokens with shared prefixes, {padded:,.0f} in padded rows ({padded / needed.sum():.2f} x)
    memory  {", ".join(f"{name} {part:.2f}" for name, part in gib.items())}: {sum(gib.values()):.2f} GiB
      disk  {disk:.2f} GiB in {s.output_dir}""".splitlines()
    return lines if s.dry_run else lines[:8]


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
    rewards = ("chosen", "rejected", "margins", "accuracies", "accuracies_low", "accuracies_high")
    names = [part + name for part in ("", "eval_") for name in ("loss", *map("rewards/{}".format, rewards))]
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
        self.trainer, self.s, self.folder, self.written = trainer, s, Path(s.output_dir), 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            state.compute_steps(args, state.max_steps)  # the checkpoint has the save_steps of the run that wrote it
            self.trainer.restore_averages()
        self.advice = state.stateful_callbacks.setdefault("advice", {})  # checkpoints keep it: nothing is said twice
        self.shown = state.global_step, time.perf_counter()
        say(HEADER)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs:  # the totals at the end
            return
        history, (step, then), self.shown = state.log_history, self.shown, (state.global_step, time.perf_counter())
        history[-1] = {name: v for name, v in history[-1].items() if not re.search("runtime|per_second|prep", name)}
        if is_main():
            with open(self.folder / "metrics.jsonl", "a" if self.written else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in history[self.written :])
            self.written = len(history)  # all rows again after a resume: those after its checkpoint go
            if "eval_loss" in logs or len(history) % 20 == 1:  # a picture takes half a second
                draw_rewards(history, self.s, self.folder / "rewards.png")
        speed = (state.global_step - step) * self.s.global_batch_size / (self.shown[1] - then)
        with tqdm.external_write_mode():  # the bar steps aside
            say(format_row(history[-1] | ({"pairs/s": speed} if "loss" in logs else {})))
            advise(history, self.s, self.advice)


def draw_rewards(history: list[dict], s: argparse.Namespace, path: Path) -> None:
    """rewards.png: rewards with the margin between them, accuracies, loss; legible without colours."""
    log, share = read_log(history), "rewards/accuracies"
    log[share] = log[share].where(log["rewards/margins"] != 0)  # before the first update all pairs tie
    log[share] = log[share].rolling(RECENT, min_periods=1).mean()
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


def generate_answers(trainer: PreferenceTrainer, model, prompts: list[list[int]], do_sample: bool) -> list[list[int]]:
    """Tokens of a model's answer to each prompt, up to its end: one batch, and the same seed for all models."""
    config, tokenizer = trainer.model.generation_config, trainer.processing_class
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    transformers.set_seed(trainer.args.seed)
    with trainer.accelerator.autocast():
        rows = model.generate(**batch, generation_config=config, max_new_tokens=256, do_sample=do_sample)
    ends = np.atleast_1d(config.eos_token_id).tolist()  # training has added the tokenizer's
    rows = rows[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row, 1) if token in ends), None)] for row in rows]


def show_samples(trainer: PreferenceTrainer, s: argparse.Namespace, report: Report) -> None:
    """samples.md, its first three on the console, and advice if answers grew longer than the pairs ask for."""
    if is_sharded():
        return say("no samples: the model is sharded over processes")
    if not (is_main() and s.sample_prompts and trainer.eval_dataset is not None):
        return None
    policy, decode, block = trainer.model.eval(), trainer.processing_class.decode, "\n\n```text\n{}\n```\n\n".format
    prompts, tokens = trainer.eval_dataset["prompt_ids"][: s.sample_prompts], np.zeros(2)
    samples = [f"# Held-out prompts, greedy, then sampled (seed {s.seed}); reward = beta * (log pi - log pi_ref)\n\n"]
    for mode in ("greedy", "sampled"):
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):  # of no effect on a second model
            before = generate_answers(trainer, trainer.ref_model or policy, prompts, mode == "sampled")
        after = generate_answers(trainer, policy, prompts, mode == "sampled")
        pairs = [dict(zip(PREPARED, pair)) for pair in zip(prompts, before, after)]
        scores = trainer.prediction_step(policy, trainer.data_collator(pairs), False)[1].tolist()
        for prompt, a, b, (_, x, y, *_) in zip(prompts, before, after, scores):
            samples.append(
                f"## {mode}{block(decode(prompt))}"
                f"**reference**, {len(a)} tokens, reward {x:.4f}{block(decode(a))}"
                f"**policy**, {len(b)} tokens, reward {y:.4f}{block(decode(b))}"
            )
            tokens += len(a), len(b)
    write_file(Path(s.output_dir, "samples.md"), "".join(samples))
    say("", *samples[1:4])
    asked = token_lengths(trainer.train_dataset)
    expected = tokens[0] * max(1, asked["chosen"].sum() / asked["rejected"].sum())
    advise(trainer.state.log_history, s, report.advice, tokens[1] / expected)


def summarize(trainer: PreferenceTrainer, s: argparse.Namespace, report: Report) -> str:
    """Steps, time, speed, memory, held-out figures first and last, advice, files, and the next command."""
    *rows, totals = trainer.state.log_history
    held_out = [format_row(row) for row in rows if "eval_loss" in row]
    load = f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({s.output_dir!r})"
    return "\n".join([
        f"{trainer.state.global_step} steps of {s.global_batch_size} pairs; this run: "
        f"{totals['train_runtime'] / 60:.1f} minutes, {totals['train_samples_per_second']:.2f} pairs/s, "
        f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; all files are in {s.output_dir}",
        HEADER, *held_out[:1], *held_out[1:][-1:], *report.advice.values(),
        f"next: merge it, `python -c \"{load}.merge_and_unload().save_pretrained('merged')\"`",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the run
MANIFEST = "manifest.json"  # in each whole checkpoint: the digests of its files, and what it was trained on
FREE = (  # settings in which a run and its continuation may differ: its result does not, but for aot and sft
    "output_dir|per_device_.*_batch_size|merge|fsdp|fsdp_config|deepspeed|report_to|run_name|disable_tqdm|log_level|"
    "dataloader_num_workers|dataset_num_proc|sample_prompts|ddp_timeout|local_rank|use_cpu|save_steps|"
    "save_total_limit|precompute_ref_log_probs|share_prefixes|torch_compile.*|gradient_checkpointing(_kwargs)?"
)
FAULTS = (  # kind and words of a library's error; exit status, 2 being a mistake found before training; what to do
    (torch.OutOfMemoryError, "", 1, "out of GPU memory: halve per_device_train_batch_size (only aot, aot_unpaired and "
     "sft then differ), turn gradient_checkpointing on, lower max_length, or use configs/qwen3_8b_qlora.yaml"),
    (BaseException, "No space left|quota exceeded|File too large|inline_container", 1,  # the last one is torch.save's
     "a file could not be written, older checkpoints are untouched: make room and run the same command again"),
    (KeyboardInterrupt, "", 130, "interrupted before training began; the same command starts again"),
    (Timeout, r"/\.lock'", 2, "output_dir: another run is writing there; wait, or choose another"),
    ((ValueError, TypeError, ImportError, NotImplementedError), "", 2, "settings"),
)  # fmt: skip


def write_file(path: Path, text: str) -> None:
    """All or nothing: a crash leaves the old file or the new one."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def set_aside(path: Path, name: str) -> str:
    """Rename to the first free one of name, name-2, name-3, ...: nothing is deleted."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return path.rename(next(target for target in map(path.with_name, names) if not target.exists())).name


def settings_yaml(s: argparse.Namespace) -> str:
    derived = {"given", "revisions", "planned_steps", "gradient_accumulation_steps"}
    left_out = derived | {"overwrite", "dry_run"}  # repeated, they would do harm
    values = {name: value for name, value in vars(s).items() if name not in left_out and value != []}
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    made = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    head = f"# `python dpotrainer.py --config {s.output_dir}/settings.yaml` repeats this run; made with {made}\n"
    return head + yaml.safe_dump(values, allow_unicode=True)


def require_same(folder: Path | str, there: dict, here: dict) -> None:
    """Refuse to go on with what was begun otherwise, or not by this program: then nothing is known of it."""
    names = sorted(name for name in {*there, *here} if not re.fullmatch(FREE, name))
    changes = [f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names
               if there.get(name) != here.get(name)]  # fmt: skip
    if changes:
        what = "a run with other settings" if there else "files that are no run of this program"
        ways = "choose another output_dir, or `--overwrite true`, which moves the old one aside"
        raise UserError("\n  ".join([f"{folder} holds {what}; {ways}", *(changes if there else [])]))


@contextmanager
def open_output(s: argparse.Namespace):
    """Hold output_dir for this run alone, and leave nothing behind where no training began."""
    folder = Path(s.output_dir).absolute()
    lock, settings = FileLock(folder / ".lock", blocking=False), folder / "settings.yaml"
    if s.overwrite and any(folder.glob("[!.]*")):
        with lock:
            say(f"the earlier run was moved to {set_aside(folder, f'{folder.name}-old')}")
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with lock:
        used = bool({*os.listdir(folder)} - {".lock", "settings.yaml.tmp"})
        before = settings.read_text(encoding="utf-8") if settings.exists() else ""
        if used:
            require_same(folder, yaml.safe_load(before) or {}, yaml.safe_load(settings_yaml(s)))
        try:
            yield
        finally:
            if not used and not (folder / "metrics.jsonl").exists():
                shutil.rmtree(folder, ignore_errors=True)
                if was_there:
                    folder.mkdir(exist_ok=True)


def digest_files(folder: Path) -> dict[str, str]:
    """{file: digest} of what is in a checkpoint, but for its manifest."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def resume_point(trainer: PreferenceTrainer, folder: Path) -> str | None:
    """The newest checkpoint, once those without the files of their manifest are set aside."""
    for path in folder.glob("checkpoint-*") if is_main() else ():
        whole = False
        with suppress(OSError, ValueError):  # no manifest, or a damaged one
            files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
            whole = files.items() <= digest_files(path).items()
        if not whole:
            say(f"{path.name} is not whole: renamed to {set_aside(path, f'incomplete-{path.name}')}")
    trainer.accelerator.wait_for_everyone()
    newest = get_last_checkpoint(folder)
    if newest:
        manifest = json.loads(Path(newest, MANIFEST).read_text(encoding="utf-8"))
        require_same(newest, manifest["trained on"], trainer.trained_on)
        say(f"continuing from {newest}")
    return newest


class Ending(transformers.TrainerCallback):
    """The last step is evaluated; after SIGTERM or Ctrl-C all processes finish the step, save and stop."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer, self.heard, self.signal = trainer, 0, 0
        self.answer_with(self.hear)

    def answer_with(self, handler):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def hear(self, number, frame):
        if self.heard and time.monotonic() - self.since > 1:  # sooner, it is the first, passed on by a launcher
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.heard:
            self.heard, self.since = number, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.signal = self.heard
        if args.world_size > 1:  # not all hear it, or not at the same step
            heard = torch.tensor(self.signal, device=args.device)
            self.signal = int(self.trainer.accelerator.gather(heard).max())
        if self.signal:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch":  # which evaluates there anyway
            control.should_evaluate = self.trainer.eval_dataset is not None

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.signal:  # saved at its step; again, with its evaluation, where the epoch is over
            control.should_save = state.epoch % 1 == 0
            control.should_evaluate &= control.should_save

    def on_train_end(self, *args, **kwargs):
        self.answer_with(signal.SIG_DFL)
        self.on_step_end(*args, **kwargs)


def train_policy(s: argparse.Namespace, trainer: PreferenceTrainer, start: argparse.Namespace) -> Report:
    """Train from where output_dir stands, to the end or to a signal."""
    pairs = hashlib.blake2b(np.array(trainer.train_dataset["pair_hash"]).tobytes(), digest_size=8).hexdigest()
    sharding = ["FSDP"] * trainer.is_fsdp_enabled + ["DeepSpeed"] * trainer.is_deepspeed_enabled
    trainer.trained_on = {"hash of the pairs": pairs, "sharded by": sharding}
    if s.precompute_ref_log_probs:
        cache_reference(trainer, s, reference_folder(s, start))
    checkpoint = resume_point(trainer, Path(s.output_dir))
    report, ending = Report(trainer, s), Ending(trainer)
    ProgressCallback.on_log = PrinterCallback.on_log = lambda *args, **kwargs: None  # Report shows the rows
    trainer.callback_handler.callbacks += [report, ending]
    trainer.train(resume_from_checkpoint=checkpoint)
    if ending.signal:
        text = f"interrupted and saved at step {trainer.state.global_step}; the same command continues"
        raise UserError(text, status=128 + ending.signal)
    return report


def merge_adapter(trainer: PreferenceTrainer, folder: Path) -> None:
    """The merged model in `folder`, and how far its logits are from those of adapter plus base."""
    if is_sharded():
        return say("not merged: the model is sharded over processes")
    policy = trainer.accelerator.unwrap_model(trainer.model).eval()
    prompts = (trainer.eval_dataset or trainer.train_dataset)["prompt_ids"][:8]
    prompts = [torch.tensor([ids], device=policy.device) for ids in prompts]
    with torch.no_grad(), trainer.accelerator.autocast():
        before = torch.stack([policy(prompt).logits[0, -1].float() for prompt in prompts])
        merged = policy.merge_and_unload()
        after = torch.stack([merged(prompt).logits[0, -1].float() for prompt in prompts])
    for part in (merged, trainer.processing_class):
        part.save_pretrained(folder)
    say(f"merged: after {len(prompts)} prompts, its next-token logits differ by {(before - after).abs().max():.2g} at "
        "most from those of adapter plus base")  # fmt: skip


def save_run(trainer: PreferenceTrainer, s: argparse.Namespace, report: Report) -> None:
    """Save the model whole or not at all: the adapter's config, which marks a finished run, comes last."""
    folder, staged = Path(s.output_dir), Path(s.output_dir, "final.incomplete")
    trainer.save_model(str(staged))
    if is_main():
        if s.merge:
            merge_adapter(trainer, folder / "merged")
        draw_rewards(trainer.state.log_history, s, folder / "rewards.png")
        summary = summarize(trainer, s, report)
        trainer.create_model_card(model_name=folder.name, dataset_name=s.dataset_name)
        with open(folder / "README.md", "a", encoding="utf-8") as card:
            card.write(f"\n## This run\n\n![rewards, accuracies, loss](rewards.png)\n\n```text\n{summary}\n```\n")
        for path in sorted(staged.iterdir(), key=lambda path: path.name == "adapter_config.json"):
            if path.name not in ("ref", "training_args.bin", "README.md"):  # the start's copy, a pickle, an empty card
                os.replace(path, folder / path.name)
        shutil.rmtree(staged)
        say("", summary)
    trainer.accelerator.wait_for_everyone()


def prepare(s: argparse.Namespace) -> tuple:
    """Process group, tokenizer, pairs and plan: (arguments, start, train, held-out); the plan is printed."""
    ours = {"precompute_ref_log_probs": False}  # what we do ourselves
    ours |= {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
    ours["disable_tqdm"] = s.disable_tqdm or not sys.stderr.isatty()
    ours["use_cpu"] = s.use_cpu or (s.dry_run and not torch.cuda.is_available())  # a plan can be made anywhere
    args = trl.DPOConfig(**{f.name: vars(s)[f.name] for f in fields(trl.DPOConfig) if f.init} | ours)
    start = load_start(s)
    train, held_out, counts = load_preferences(s, start.tokenizer)
    args.eval_strategy = args.eval_strategy if held_out is not None else "no"
    epoch = math.ceil(len(train) / s.global_batch_size)
    s.planned_steps = s.max_steps if s.max_steps > 0 else math.ceil(s.num_train_epochs * epoch)
    say(format_report(counts), *make_plan(s, args, start, train, held_out))
    say(*([describe_pair(start.tokenizer, train[0], s.max_length)] if s.dry_run else []))
    return args, start, train, held_out


def explain(error: BaseException, preparing: bool) -> UserError:
    """The error as one message that says what to do; one that only its traceback explains is raised again."""
    for kinds, words, status, fix in FAULTS:
        if isinstance(error, kinds) and re.search(words, str(error)) and (preparing or status == 1):
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{' '.join(str(error).split())[:500]} ({Path(place.filename).name}, line {place.lineno})"
            return UserError(f"{fix}: {text}", status)
    raise error


def main(argv: list[str] | None = None) -> int:
    """Settings, preferences, plan, trainer, train, report, save.

    Returns the exit status: 0, 2 for a mistake in the settings or the data, 128 + signal, else 1.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of the pinned libraries among themselves
    trainer = None
    try:
        s, problems = parse_settings(sys.argv[1:] if argv is None else argv)
        problems, lacking = problems + check_settings(s), find_broken(s, MACHINE_RULES)
        if problems or (lacking and not s.dry_run):
            raise UserError("\n".join(problems + lacking))
        with open_output(s) if is_main() and not s.dry_run else nullcontext():
            # with overwrite, the main process may not yet have moved the other run aside
            if Path(s.output_dir, "adapter_config.json").exists() and not (s.dry_run or s.overwrite):
                say(f"{s.output_dir} holds this run, finished: nothing to do (`--overwrite true` starts afresh; its "
                    "README.md has the command that merges it)")  # fmt: skip
                return 0
            args, start, train, held_out = prepare(s)
            if s.dry_run and lacking:
                raise UserError("\n".join(lacking))
            if s.dry_run:
                return 0
            if is_main():
                write_file(Path(s.output_dir, "settings.yaml"), settings_yaml(s))
            trainer = build_trainer(s, args, start, train, held_out)
            report = train_policy(s, trainer, start)
            with torch.compiler.set_stance("force_eager"):  # what follows is too little to compile for
                show_samples(trainer, s, report)
                save_run(trainer, s, report)
            return 0
    except BaseException as error:
        told = error if isinstance(error, UserError) else explain(error, preparing=trainer is None)
    if is_main() or told.status == 1:  # a mistake is everybody's, a fault may be one process's alone
        who = "dpotrainer" if is_main() else f"dpotrainer, process {os.environ['RANK']}"
        print(f"{who}: {told}", file=sys.stderr, flush=True)
    return told.status


if __name__ == "__main__":
    sys.exit(main())
