"""Align a language model with human preferences: Direct Preference Optimization (DPO) in one file.

    python dpotrainer.py                                     edit the constants below, run
    python dpotrainer.py --config FILE.yaml --beta 0.05      constants < YAML < command line
    accelerate launch --config_file configs/accelerate/ddp.yaml dpotrainer.py    several GPUs

Over pairs of a prompt x with a chosen answer y_w and a rejected one y_l, DPO (arXiv 2305.18290,
eq. 7) minimises

    loss = -log sigmoid(reward(x, y_w) - reward(x, y_l))
    reward(x, y) = beta * (log pi(y | x) - log pi_ref(y | x))

The log shows the means of reward(x, y_w) as rewards/chosen, of reward(x, y_l) as rewards/rejected,
of their difference as rewards/margins, and the share of pairs where that is positive as
rewards/accuracies. trl.DPOTrainer trains. This file decides what a good run is, checks it before
it costs anything (`--dry_run true` rehearses the run in miniature), computes each pair's common
prefix once, shows what happened, and loses nothing.

OUTPUT_DIR gets the adapter with tokenizer and model card, settings.yaml (`--config` with it repeats
the run), metrics.jsonl, rewards.png, samples.md and checkpoint-N. The same command again continues
an interrupted run.

In reading order: constants, main, settings, preferences, policy and trainer, the plan, insight,
the run, shared prefixes, the command.
"""

import signal
import sys

if __name__ == "__main__":
    print("dpotrainer: loading torch, transformers and trl ...", file=sys.stderr, flush=True)
    # Ctrl-C meanwhile ends the program at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import gc
import glob
import gzip
import hashlib
import heapq
import importlib.metadata
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import accelerate
import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import peft
import torch
import transformers
import trl
import yaml
from datasets import Dataset
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils.peft_utils import find_adapter_config_file
from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, ModelConfig, ScriptArguments
from trl.data_utils import common_prefix_length
from trl.scripts.utils import DatasetConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import (
    add_fused_lm_head,
    global_then_local_main_first,
    remove_none_values,
    use_adapter,
)

# fmt: off
# ---------------------------------------------------------------------------- constants: edit these
MODEL_NAME = "Qwen/Qwen3-8B"  # hub name or folder of an instruct model, or of an SFT adapter
DATASET_NAME = "trl-lib/ultrafeedback_binarized"  # hub name, folder or file (jsonl, csv, ...)
OUTPUT_DIR = "qwen3-8b-dpo"  # everything that the run writes

BETA = 0.1  # weight of staying near the reference: 0.05 moves further, 0.5 less; 0.1 is the paper's
LOSS_TYPE = "sigmoid"  # sigmoid (DPO), hinge, ipo, robust, ...: any of TRL's fifteen, or a list
MAX_LENGTH = 2048  # tokens of prompt plus answer; what is longer loses its end

LEARNING_RATE = 5e-6  # ten times full fine-tuning's ("LoRA Without Regret", 2025)
LR_SCHEDULER_TYPE = "cosine"  # cosine (the zephyr-7b recipes'), linear, constant_with_warmup, ...
WARMUP_STEPS = 0.1  # below 1: share of all steps; 0.1 is the zephyr-7b recipes'
NUM_TRAIN_EPOCHS = 1.0  # passes over the pairs; a second one mostly overfits
GLOBAL_BATCH_SIZE = 64  # pairs per optimizer step over all GPUs, the paper's; sets the accumulation
PER_DEVICE_BATCH_SIZE = 4  # pairs per forward on one GPU: memory and speed, not the result

LORA_R = 32  # rank, 8 to 128; preferences need little capacity
LORA_ALPHA = 32  # the update is scaled by alpha / r, here 1, as in zephyr-7b-dpo-qlora
LORA_DROPOUT = 0.0  # [0, 1); above 0 the log-probs get noise, and needs `disable_dropout: false`
DTYPE = "bfloat16"  # of the frozen weights: bfloat16, float16, float32
BF16 = True  # bf16 autocast: Ampere GPUs (2020) and newer
GRADIENT_CHECKPOINTING = True  # recompute activations: a third more compute, far less memory

EVAL_PAIRS = 500  # pairs held out when the data set has no test split
EVAL_STEPS = 100  # optimizer steps between evaluations
SAVE_STEPS = 100  # optimizer steps between checkpoints
LOGGING_STEPS = 10  # optimizer steps between log lines
SEED = 42  # of adapter, order and held-out pairs
# ------------------------------------------------------------------------------------- end of edits
# fmt: on

# all of the above, and what a user adds to them
CONSTANTS = {name: value for name, value in globals().items() if name.isupper()}


def main(argv: list[str] | None = None) -> None:
    """Read settings and preferences, show the plan; then rehearse, or train, save and show.

    `argv` are the flags, without the program's name; those of the command line if None. Raises
    UserError for whatever the user can mend.
    """
    job = read_settings(argv)
    start = load_start(job)
    preferences = load_preferences(job, start.tokenizer)
    check_pairs(job, start, preferences)
    check_architecture(job, start, preferences)
    sharing = check_sharing(job, start, preferences)
    print_plan(job, start, preferences, sharing)
    if job.settings.dry_run:
        refuse_other_run(job, preferences)
        rehearse(job, start, preferences)
        return

    with open_output(job, preferences) as is_finished:
        if not is_finished:
            trainer = build_trainer(job, start, preferences, sharing)
            report = train_policy(trainer, job, preferences)
            save_adapter(trainer)  # first of all: nothing that comes after it can lose it
            show_samples(trainer, job)
            save_report(trainer, job, start, report)
            del trainer  # merging needs its memory
        if job.settings.merge and is_main_process():
            merge_adapter(job, start, preferences)
        if job.training_args.push_to_hub and is_main_process():
            push_run(job)


class UserError(Exception):
    """Ends the program with this message, without a traceback; status 2 is the user's to mend."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def is_main_process() -> bool:
    """Whether this is the process that prints and writes, one of all hosts."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Print on the main process; a line that begins with `! ` is what the user should know."""
    if is_main_process():
        print(*lines, sep="\n", flush=True)


def wrap(label: str, text: str) -> list[str]:
    """A labelled line, wrapped to the screen; the label "!" marks what the user should know."""
    begin = "! " if label == "!" else f"{label:<11}"
    return textwrap.wrap(
        begin + text,
        width=79,
        subsequent_indent=" " * len(begin),
        break_long_words=False,
        break_on_hyphens=False,
    )


def first_line(error: Exception) -> str:
    """What a library says about an error, without its second thoughts."""
    return str(error).strip().partition("\n")[0]


def write_file(path: Path, content: bytes) -> None:
    """All or nothing: a crash leaves the old file or the new one."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)


# ----------------------------------------------------------------------------------------- settings
@dataclass
class Settings:
    """What TRL has no name for; all else is in its ScriptArguments, ModelConfig and DPOConfig."""

    columns: dict | str | None = HfArg(
        default=None,
        help="which columns hold what: '{prompt: question, chosen: good, rejected: bad}'; dots "
        "reach into structs",
    )
    chat_strings: bool = HfArg(default=False, help="wrap plain strings in the chat template")
    eval_pairs: int = HfArg(default=0, help="pairs held out when there is no test split")
    global_batch_size: int | None = HfArg(
        default=None, help="pairs per optimizer step over all processes"
    )
    share_prefixes: bool = HfArg(
        default=True, help="compute each pair's common prefix once, and no padding"
    )
    reference: Literal["auto", "copy", "adapter"] = HfArg(
        default="auto",
        help="auto: adapter off, or the SFT adapter if that is the start; copy: a second, frozen "
        "model; adapter: a frozen copy of the starting adapter",
    )
    ref_model_name_or_path: str | None = HfArg(
        default=None, help="the frozen model of `reference: copy`; else the start"
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="evaluations without a better held-out loss before the run stops; keeps the best",
    )
    sample_prompts: int = HfArg(
        default=8, help="held-out prompts answered by reference and policy at the end; 0: none"
    )
    merge: bool = HfArg(default=False, help="also write the merged model, of a finished run too")
    dry_run: bool = HfArg(
        default=False, help="check everything, print the plan, rehearse in miniature, then stop"
    )
    overwrite: bool = HfArg(
        default=False, help="move a finished or different run in output_dir aside"
    )


class Job(NamedTuple):
    """All settings of a run, checked, with what follows from them filled in."""

    settings: Settings
    script_args: ScriptArguments
    model_args: ModelConfig
    training_args: DPOConfig
    mixture_args: DatasetMixtureConfig
    missing_gpu: str  # why this machine has no GPU, where a dry run only says so; else ""
    # setting: where it was given, as "constant BETA", "file my.yaml" or "flag --beta"
    origins: dict[str, str]


CONSTANT_NAMES = {  # constants of the file, and the settings that they are
    "MODEL_NAME": "model_name_or_path",
    "DATASET_NAME": "dataset_name",
    "OUTPUT_DIR": "output_dir",
    "BETA": "beta",
    "LOSS_TYPE": "loss_type",
    "MAX_LENGTH": "max_length",
    "LEARNING_RATE": "learning_rate",
    "LR_SCHEDULER_TYPE": "lr_scheduler_type",
    "WARMUP_STEPS": "warmup_steps",
    "NUM_TRAIN_EPOCHS": "num_train_epochs",
    "GLOBAL_BATCH_SIZE": "global_batch_size",
    "PER_DEVICE_BATCH_SIZE": "per_device_train_batch_size",
    "LORA_R": "lora_r",
    "LORA_ALPHA": "lora_alpha",
    "LORA_DROPOUT": "lora_dropout",
    "DTYPE": "dtype",
    "BF16": "bf16",
    "GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "EVAL_PAIRS": "eval_pairs",
    "EVAL_STEPS": "eval_steps",
    "SAVE_STEPS": "save_steps",
    "LOGGING_STEPS": "logging_steps",
    "SEED": "seed",
}
OUR_DEFAULTS = {  # where a good run differs from TRL's defaults
    "use_peft": True,
    "lora_target_modules": ["all-linear"],
    "use_bnb_nested_quant": True,
    "eval_strategy": "steps",
    "save_total_limit": 2,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,  # it would hide a loss that is not finite; we stop at one
    "per_device_eval_batch_size": None,  # as in training
    "gradient_accumulation_steps": None,  # derived from global_batch_size
    "ddp_find_unused_parameters": False,  # every adapter weight gets a gradient
    "ddp_timeout": 7200,  # seconds: a slow first tokenization must not trip those that wait for it
}
UNSUPPORTED = {  # settings of TRL that are refused unless they have their default, and why
    "accelerator_config": "pairs are dealt to the processes by this file's own sampler",
    "auto_find_batch_size": "the step would change in the middle of a run",
    "average_tokens_across_devices": "DPO averages over pairs, not over tokens",
    "batch_eval_metrics": "held-out figures are means over all pairs at once",
    "bf16_full_eval": "held-out rewards would be rounded; bf16 autocast does enough",
    "dataloader_drop_last": "an epoch's last step is filled up, no pair is dropped",
    "dataloader_in_order": "a resumed run would see other pairs",
    "dataloader_multiprocessing_context": "workers only pad batches, however they start",
    "dataset_streaming": "pairs are counted and split before training",
    "debug": "a loss or a gradient that is not finite ends the run with a message anyway",
    "deepspeed": "`accelerate launch --config_file configs/accelerate/zero3.yaml` starts it",
    "do_predict": "there is nothing to predict; sample_prompts has held-out prompts answered",
    "enable_jit_checkpoint": "SIGTERM is answered with a checkpoint anyway",
    "eval_do_concat_batches": "held-out figures are means over all pairs",
    "eval_use_gather_object": "what an evaluation gathers are tensors",
    "fp16_full_eval": "held-out rewards would be rounded; fp16 autocast does enough",
    "fsdp": "`accelerate launch --config_file configs/accelerate/fsdp2.yaml` starts it",
    "fsdp_config": "`accelerate launch --config_file configs/accelerate/fsdp2.yaml` holds it",
    "hub_always_push": "the run is uploaded once, at its end",
    "ignore_bias_buffers": "no model that is trained today needs it",
    "ignore_data_skip": "a resumed run would see pairs twice",
    "include_for_metrics": "the metrics are DPO's",
    "label_names": "the labels are the answers' tokens",
    "label_smoothing_factor": "it is cross-entropy's; for noisy pairs there is `loss_type: robust`",
    "length_column_name": "passes are balanced by their tokens as it is",
    "liger_kernel_config": "share_prefixes and TRL's fused head do its work",
    "logging_nan_inf_filter": "it would hide a loss that is not finite",
    "lora_task_type": "what is trained here is a CAUSAL_LM",
    "model_init_kwargs": "dtype, attn_implementation, load_in_4bit, ... are settings themselves",
    "neftune_noise_alpha": "its noise would be in the rewards",
    "pad_to_multiple_of": "share_prefixes runs without padding",
    "padding_free": "TRL has it switched off; share_prefixes does more",
    "parallelism_config": "processes share pairs (ddp.yaml) or weights (fsdp2.yaml), no more",
    "prediction_loss_only": "held-out rewards are what an evaluation is for",
    "ref_model_mixup_alpha": "the reference stays as it was",
    "ref_model_sync_steps": "the reference stays as it was",
    "save_on_each_node": "all hosts share one output_dir",
    "save_only_model": "nothing could be resumed",
    "streaming": "pairs are counted and split before training",
    "sync_ref_model": "TRL cannot do it with LoRA",
    "train_sampling_strategy": "pairs come in random order, in passes of alike many tokens",
    "truncation_mode": "what is too long loses its end",
    "trust_remote_code": "it would run code of the model's author",
    "use_cache": "training needs no cache of keys and values",
    "use_liger_kernel": "share_prefixes and TRL's fused head do its work",
    "use_peft": "this file trains an adapter; `trl dpo` trains all weights",
}
NEEDS = {  # settings that have no effect unless another one has this value
    "bnb_4bit_quant_storage": ("load_in_4bit", True),
    "discopop_tau": ("loss_type", "discopop"),
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence"),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", True),
    "hub_model_id": ("push_to_hub", True),
    "hub_private_repo": ("push_to_hub", True),
    "hub_revision": ("push_to_hub", True),
    "precompute_ref_batch_size": ("precompute_ref_log_probs", True),
    "ref_model_name_or_path": ("reference", "copy"),
}
ABOVE_ZERO = (
    "beta learning_rate num_train_epochs logging_steps eval_steps save_steps global_batch_size "
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r "
    "lora_alpha max_length early_stopping_patience"
).split()
NOT_NEGATIVE = (
    "eval_pairs sample_prompts test_split_size warmup_steps max_grad_norm seed data_seed "
    "weight_decay"
).split()
INSTEAD = {  # advice: names of other trainers and of older libraries that it answers
    "model_name_or_path": "base_model model model_name model_init adapter_name_or_path",
    "dataset_name": "dataset",
    "learning_rate": "lr",
    "lora_r": "lora_rank lora_dim r",
    "lora_target_modules": "lora_target target_modules",
    "lora_modules_to_save": "modules_to_save",
    "max_length": "cutoff_len sequence_len max_seq_length max_seq_len",
    "max_length, which prompt and answer share": "max_prompt_length max_completion_length "
    "max_target_length",
    "dtype": "torch_dtype",
    "load_in_4bit or load_in_8bit": "quantization_bit",
    "attn_implementation, or leave it to share_prefixes": "flash_attn",
    "use_cpu": "no_cuda",
    "warmup_steps: below 1 it is a share of all steps": "warmup_ratio",
    "eval_strategy": "evaluation_strategy",
    "dataset_num_proc": "preprocessing_num_workers",
    "overwrite, which moves the old run aside": "overwrite_output_dir",
    "loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha]": "rpo_alpha pref_ftx",
    "beta": "pref_beta dpo_beta rl_beta",
    "loss_type": "pref_loss",
    "nothing: the tokenizer's own chat template is used": "template chat_template",
    "nothing: DPO needs a reference": "reference_free",
    "nothing: passes have alike many tokens as it is": "group_by_length",
    "sample_prompts, answered at the end": "generate_during_eval",
    "per_device_train_batch_size": "micro_batch_size",
    "global_batch_size or per_device_train_batch_size": "batch_size",
    "num_train_epochs": "num_epochs epochs",
    "eval_pairs": "val_set_size val_size",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "env: {WANDB_PROJECT: ...} in the file": "wandb_project",
}
GIVES_WAY = {  # settings of constants: those of a file or a flag that overrule them
    "global_batch_size": "gradient_accumulation_steps",
    "dataset_name": "datasets",
    "bf16": "fp16",
}
SAME = {  # transformers' new names for old settings
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
# in the order of the first fields of Job
PARTS = (Settings, ScriptArguments, ModelConfig, DPOConfig, DatasetMixtureConfig)
HINTS = {name: hint for part in PARTS for name, hint in get_type_hints(part).items()}


class Draft:
    """Settings by name as far as they are known, where each was given, and what is wrong."""

    def __init__(self) -> None:
        self.parser = trl.TrlParser(PARTS, add_help=False, prog="dpotrainer.py")
        self.parser.set_defaults_with_config(**OUR_DEFAULTS)
        self.defaults = vars(self.parser.parse_args([]))
        self.values = dict(self.defaults)
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []
        self.missing_gpu = ""

    def take(self, name: str, value: Any, origin: str) -> None:
        """Set a value, or note what is wrong with it."""
        if name not in HINTS:
            where = origin if origin.startswith("flag ") else f"{origin}, {name}"
            self.problems.append(f"{where}: {explain_unknown(name)}")
            return
        name = SAME.get(name, name)
        try:
            self.values[name] = convert(value, HINTS[name])
        except (TypeError, ValueError) as error:
            self.problems.append(f"{origin}, {format_setting(name, value)}: {error}")
        self.origins[name] = origin

    def refuse(self, name: str, reason: str) -> None:
        """Note what is wrong with the value of a setting."""
        problem = f"{format_setting(name, self.values[name])}: {reason}"
        if name in self.origins:
            problem = f"{self.origins[name]}, {problem}"
        self.problems.append(problem)


def is_constant(name: str, origins: dict[str, str]) -> bool:
    """Whether neither a file nor a flag gave this setting."""
    return origins.get(name, "constant ").startswith("constant ")


def format_setting(name: str, value: Any) -> str:
    """A setting in a message; a token is in none."""
    if name == "hub_token":
        value = "..."
    return f"{name}={value}"


def read_settings(argv: list[str] | None) -> Job:
    """Constants, then the YAML file, then flags.

    Raises UserError with every problem in one message. Prints the help and exits where the flags
    ask for it.
    """
    tell_other_versions()
    words = sys.argv[1:] if argv is None else argv
    draft = Draft()
    take_constants(draft)
    if "--help" in words or "-h" in words:
        print_help(draft, show_all="all" in words)
        sys.exit(0)

    take_file_and_flags(draft, words)
    let_constants_give_way(draft)
    fill_in(draft)
    unpack_mappings(draft)
    check_ranges(draft)
    check_choices(draft)
    check_places(draft)
    check_support(draft)
    check_loss(draft)
    check_combinations(draft)
    derive_batch(draft)
    check_packages(draft)
    check_output(draft)
    check_upload(draft)
    check_gpu(draft)
    if draft.problems:
        raise UserError("\n".join(draft.problems))
    return make_job(draft)


def make_job(draft: Draft) -> Job:
    """The settings as objects of their classes; what one of these finds wrong is a UserError."""
    # `accelerate launch` sets it from its file, and autocast would be on although bf16 is false
    if not draft.values["bf16"] and not draft.values["fp16"]:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    try:
        # beta, loss_type, max_length, learning_rate, bf16, gradient_checkpointing and 140 more
        training_args = DPOConfig(**pick(draft, DPOConfig))
        return Job(
            Settings(**pick(draft, Settings)),
            ScriptArguments(**pick(draft, ScriptArguments)),
            ModelConfig(**pick(draft, ModelConfig)),
            training_args,
            DatasetMixtureConfig(**pick(draft, DatasetMixtureConfig)),
            draft.missing_gpu,
            draft.origins,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"settings: {error}") from error


def pick(draft: Draft, part: type) -> dict[str, Any]:
    """The values that one of the five classes takes."""
    fields = dataclasses.fields(part)
    return {field.name: draft.values[field.name] for field in fields if field.init}


def take_constants(draft: Draft) -> None:
    """The constants at the top of this file; one that was added is the setting of that name."""
    for constant in CONSTANT_NAMES:
        if constant not in CONSTANTS:
            draft.problems.append(f"constant {constant}: is missing; write `{constant} = ...`")
    for constant, value in CONSTANTS.items():
        name = CONSTANT_NAMES.get(constant, constant.lower())
        draft.take(name, value, f"constant {constant}")


def take_file_and_flags(draft: Draft, words: list[str]) -> None:
    """The file after --config, then each flag with the words that belong to it."""
    flags = []
    for word in words:
        if re.match("--|-[a-z]", word) or not flags:
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        else:
            flags[-1][1].append(word)

    for flag, given in flags:
        if flag == "--config" and len(given) != 1:
            raise UserError("--config: give one file, such as configs/qwen3_8b_lora.yaml")
        if flag == "--config":
            take_file(draft, given[0])
    for flag, given in flags:
        if flag != "--config":
            take_flag(draft, flag, given)


def take_flag(draft: Draft, flag: str, given: list[str]) -> None:
    """A flag with its words: one is a value, several are a list, and none is `true`."""
    name = flag.removeprefix("--").replace("-", "_")
    origin = f"flag {flag}"
    positive = name.removeprefix("no_")
    if not flag.startswith("--"):
        draft.problems.append(f"{origin}: {explain_unknown(flag)}")
    elif name not in HINTS and positive in HINTS and given:
        draft.problems.append(f"{origin}: takes no value; it is `--{positive} false`")
    elif name not in HINTS and positive in HINTS:
        draft.take(positive, False, origin)
    elif not given:
        draft.take(name, True, origin)
    elif len(given) == 1:
        draft.take(name, given[0], origin)
    else:
        draft.take(name, given, origin)


def take_file(draft: Draft, path: str) -> None:
    """The values of a YAML file; its `env` is set as `trl dpo` sets it."""
    try:
        # read from a text, yaml would quote lines in its errors, and a token may be in one
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
            file.seek(0)
            written = yaml.compose(file, yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        draft.problems.append(f"--config {path}: {reason}; give lines such as `beta: 0.1`")
        return
    if not isinstance(content, dict):
        draft.problems.append(f"--config {path}: holds no lines such as `beta: 0.1`")
        return
    # of a name that is there twice, safe_load drops the first value without a word
    for name, count in Counter(key.value for key, _ in written.value).items():
        if count > 1:
            draft.problems.append(f"file {path}, {name}: is there {count} times; leave one")
    for new_name, name in SAME.items():
        if {new_name, name} <= content.keys():
            draft.problems.append(f"file {path}, {name}: {new_name} is the same; leave one")
    variables = content.pop("env", None) or {}
    if isinstance(variables, dict):
        set_environment(variables)
    else:
        draft.problems.append(f"file {path}, env: must hold lines such as `WANDB_PROJECT: dpo`")
    content.pop("made_from", None)  # of settings.yaml: what a run was made from
    for name, value in content.items():
        draft.take(str(name), value, f"file {path}")


def set_environment(variables: dict) -> None:
    """Set the variables under `env:`, and say which come too late."""
    for name, value in variables.items():
        too_early = str(name).startswith(("HF_", "TRANSFORMERS_", "OMP_", "MKL_"))
        if too_early and name != "HF_TOKEN" and os.environ.get(name) != str(value):
            say(f"! env {name}: was read while the libraries loaded; set it in the shell instead")
        os.environ[str(name)] = "" if value is None else str(value)


def split_hint(hint: Any) -> dict[Any, tuple]:
    """The types that a setting may have, each with what stands in its brackets."""
    kinds = (hint,)
    if get_origin(hint) in (Union, types.UnionType):
        kinds = get_args(hint)
    return {get_origin(kind) or kind: get_args(kind) for kind in kinds}


def convert(value: Any, hint: Any) -> Any:
    """A value of a constant, a file or a flag as the type of its setting; ValueError where it is
    another.

    A flag's is a text, and is read as YAML where the setting is none. YAML reads 5e-6 as a text,
    and `no` as false; one value may stand for a list of one.
    """
    kinds = split_hint(hint)
    if isinstance(value, str) and str not in kinds:
        value = read_yaml(value)
        if bool in kinds and value in (0, 1):  # a flag's, as argparse would take it
            value = bool(value)
    is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if isinstance(value, list) and list in kinds:
        return [convert(item, kinds[list][0]) for item in value]
    if isinstance(value, dict) and DatasetConfig in kinds and isinstance(value.get("path"), str):
        return DatasetConfig(**value)
    if type(value) in kinds or value in kinds.get(Literal, ()):
        return value
    if value is False and kinds.keys() & {IntervalStrategy, SaveStrategy}:
        return "no"
    if is_number and kinds.keys() & {int, float}:
        return convert_number(value, is_whole=int in kinds)
    if list in kinds and value is not None:
        return [convert(value, kinds[list][0])]
    raise ValueError(f"must be {describe_kinds(kinds)}")


def read_yaml(text: str) -> Any:
    """What a text means as YAML; the text itself where it means nothing."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def convert_number(value: int | float | str, is_whole: bool) -> int | float:
    """A number, or a text of one."""
    number = float(value)
    if not is_whole:
        return number
    if not number.is_integer():
        raise ValueError("must be a whole number")
    return int(number)


def describe_kinds(kinds: dict[Any, tuple]) -> str:
    """The types of split_hint in words."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        list: "a list",
        dict: "a mapping",
        DatasetConfig: "a mapping such as {path: trl-lib/ultrafeedback_binarized}",
        Literal: "one of " + ", ".join(map(str, kinds.get(Literal, ()))),
        types.NoneType: "null",
    }
    return " or ".join(words[kind] for kind in kinds if kind in words)


def explain_unknown(name: str) -> str:
    """Why a name is refused, and what was meant, where that is clear."""
    name = name.removeprefix("--").replace("-", "_")
    for instead, names_elsewhere in INSTEAD.items():
        if name in names_elsewhere.split():
            return f"is not a setting here; use {instead}"
    close = difflib.get_close_matches(name, HINTS, n=1, cutoff=0.75)
    if close:
        return f"is not a setting; did you mean {close[0]}?"
    return "is not a setting; `--help all` lists them"


def let_constants_give_way(draft: Draft) -> None:
    """A constant gives way to another setting of a file or a flag that says otherwise."""
    for name, other in GIVES_WAY.items():
        is_overruled = is_constant(name, draft.origins) and not is_constant(other, draft.origins)
        if is_overruled and draft.values[other]:
            draft.values[name] = None


def fill_in(draft: Draft) -> None:
    """What follows from a setting on its own."""
    values = draft.values
    if not values["report_to"]:
        values["report_to"] = "none"
    if values["early_stopping_patience"] is not None:
        values["load_best_model_at_end"] = True
        values["metric_for_best_model"] = values["metric_for_best_model"] or "loss"
    if values["hub_token"] is not None:
        os.environ["HF_TOKEN"] = values["hub_token"]  # where the hub's library looks for it
        values["hub_token"] = None
    for name in ("model_name_or_path", "dataset_name", "output_dir", "ref_model_name_or_path"):
        if values[name] is not None:
            values[name] = os.path.expanduser(values[name])
    for part in values["datasets"]:
        part.path = os.path.expanduser(part.path)


def unpack_mappings(draft: Draft) -> None:
    """Read the mappings that a flag gives as a text: '{prompt: question}', or JSON."""
    for name, value in draft.values.items():
        is_mapping = dict in split_hint(HINTS[name]) and name not in UNSUPPORTED
        if not is_mapping or not isinstance(value, str):
            continue
        unpacked = read_yaml(value)
        if isinstance(unpacked, dict):
            draft.values[name] = unpacked
        else:
            draft.refuse(name, "must be a mapping such as '{name: value}'")


def check_ranges(draft: Draft) -> None:
    """Numbers that are out of their range."""
    values = draft.values
    for name in ABOVE_ZERO:
        if values[name] is not None and not 0 < values[name] < math.inf:
            draft.refuse(name, "must be above 0")
    for name in NOT_NEGATIVE:
        if values[name] is not None and not 0 <= values[name] < math.inf:
            draft.refuse(name, "must be 0 or more")
    if values["max_steps"] == 0:
        draft.refuse("max_steps", "would train one step; -1 trains whole epochs")
    if not 0 <= values["lora_dropout"] < 1:
        draft.refuse("lora_dropout", "must lie in [0, 1)")
    if not 0 <= values["label_smoothing"] < 0.5:
        draft.refuse("label_smoothing", "must lie in [0, 0.5)")
    if values["ld_alpha"] is not None and not 0 <= values["ld_alpha"] <= 1:
        draft.refuse("ld_alpha", "must lie in [0, 1]")


def check_choices(draft: Draft) -> None:
    """Values that are no choice of their setting."""
    values = draft.values
    for part in PARTS:
        for field in dataclasses.fields(part):
            choices = field.metadata.get("choices")
            if choices is not None and values[field.name] not in (None, *choices):
                draft.refuse(field.name, f"must be one of {', '.join(choices)}")


def check_places(draft: Draft) -> None:
    """Names that are empty, paths that are not there."""
    values = draft.values
    for name in ("model_name_or_path", "output_dir", "dtype"):
        if not values[name]:
            draft.refuse(name, "is empty; give a value")
    if not values["dataset_name"] and not values["datasets"]:
        draft.refuse("dataset_name", "is empty; give a hub name, a folder or a file")
    for name in ("model_name_or_path", "dataset_name", "ref_model_name_or_path"):
        path = values[name] or ""
        is_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        is_file = find_ending(Path(path)) in READERS
        if (is_local or is_file) and not os.path.exists(path):
            draft.refuse(name, "there is no such file or folder; check the path")

    folder = Path(values["output_dir"] or ".").absolute()
    while not os.path.exists(folder):  # of Path, it raises an error where it may not look
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        draft.refuse("output_dir", "is not a folder that can be written; choose another")


def check_output(draft: Draft) -> None:
    """An output_dir that holds what the run reads: `overwrite` would move that away."""
    folder = Path(draft.values["output_dir"] or ".").resolve()
    if not os.path.isdir(folder):  # of Path, it raises an error where it may not look
        return
    names = ("model_name_or_path", "ref_model_name_or_path", "dataset_name")
    sources = [draft.values[name] for name in names]
    sources += [part.path for part in draft.values["datasets"]]
    for source in sources:
        if source and os.path.exists(source) and Path(source).resolve().is_relative_to(folder):
            draft.refuse("output_dir", f"holds {source}, which the run reads; choose another")


UPLOAD_LATER = "or leave push_to_hub out and upload the folder later with `hf upload`"


def check_upload(draft: Draft) -> None:
    """A name and a token for push_to_hub, while nothing has been paid for."""
    values = draft.values
    # once on each host: processes of another host would wait for one that has ended
    is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    if not values["push_to_hub"] or not values["output_dir"] or not is_first_of_host:
        return
    try:
        name = name_repository(values["hub_model_id"], values["output_dir"])
        huggingface_hub.utils.validate_repo_id(name)
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # whatever it is, the upload would fail as well
        advice = f"`hf auth login`, check hub_model_id and the network, {UPLOAD_LATER}"
        draft.refuse("push_to_hub", f"{first_line(error).rstrip('.')}; {advice}")


def name_repository(hub_model_id: str | None, output_dir: str) -> str:
    """The repository that a run is uploaded to; the user's who is logged in, if it has no owner."""
    return hub_model_id or Path(output_dir).resolve().name


def check_support(draft: Draft) -> None:
    """Settings that would be ignored."""
    values = draft.values
    for name, reason in UNSUPPORTED.items():
        if values[name] not in (None, "", draft.defaults[name]):
            draft.refuse(name, f"{reason}; leave it out")
    for name, (other, needed) in NEEDS.items():
        is_given = values[name] and values[name] != draft.defaults[name]
        is_used = values[other] == needed
        if isinstance(values[other], list):
            is_used = needed in values[other]
        if is_given and not is_used:
            draft.refuse(name, f"has no effect; add `{other}: {json.dumps(needed)}`")
    if values["hub_strategy"] in ("checkpoint", "all_checkpoints"):
        draft.refuse("hub_strategy", "the run is uploaded once, at its end; leave it out")


LOSSES = set(
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm".split()
)
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # losses that know label_smoothing
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# losses that know other divergences than reverse_kl
DIVERGING = set("sigmoid sigmoid_norm hinge ipo exo_pair robust discopop sft".split())


def check_loss(draft: Draft) -> None:
    """Losses that there are not, and what TRL would refuse them with after the weights are read."""
    values = draft.values
    losses = set(values["loss_type"])
    if not losses or not losses <= LOSSES:
        draft.refuse("loss_type", f"must be of {', '.join(sorted(LOSSES))}")
    if "exo_pair" in losses and not values["label_smoothing"]:
        draft.refuse("loss_type", "exo_pair needs a label_smoothing such as 0.001")
    if values["label_smoothing"] and not SMOOTHED & losses:
        draft.refuse("label_smoothing", "loss_type ignores it; use robust, or leave it out")
    divergence = values["f_divergence_type"]
    if divergence not in DIVERGENCES:
        draft.refuse("f_divergence_type", f"must be one of {', '.join(DIVERGENCES)}")
    elif divergence != "reverse_kl" and not losses <= DIVERGING:
        draft.refuse("f_divergence_type", f"is for {', '.join(sorted(DIVERGING))} alone")
    if values["use_weighting"] and losses & {"aot", "aot_unpaired"}:
        draft.refuse("use_weighting", "aot sorts the pairs, which would misalign their weights")


def check_combinations(draft: Draft) -> None:
    """Settings that do nothing beside others, or break what others promise."""
    values = draft.values
    if values["dataset_name"] and values["datasets"]:
        draft.refuse("dataset_name", "there are `datasets:` too; leave one out")
    if values["dataset_config"] and values["datasets"]:
        draft.refuse("dataset_config", "is the `name:` of one of the `datasets:`")
    # not one of NEEDS: TRL's default, 0.05, would be taken for one that was not given
    if values["lora_dropout"] and values["disable_dropout"]:
        draft.refuse("lora_dropout", "has no effect; add `disable_dropout: false`")
    if values["test_split_size"] and not values["datasets"]:
        draft.refuse("test_split_size", "is for `datasets:`; use eval_pairs")
    if values["save_total_limit"] is not None and values["save_total_limit"] < 2:
        draft.refuse("save_total_limit", "must be 2 or more: a kill may break the newest one")
    # true is what happens anyway
    if str(values["resume_from_checkpoint"]).lower() not in ("none", "true"):
        draft.refuse(
            "resume_from_checkpoint",
            "the newest whole checkpoint in output_dir is continued; leave it out, or choose "
            "another output_dir",
        )
    values["resume_from_checkpoint"] = None
    for name in ("precompute_ref_log_probs", "merge"):
        if values[name] and is_sharded():
            draft.refuse(
                name, "needs a model in one piece, and the launcher shards it; leave it out"
            )


def derive_batch(draft: Draft) -> None:
    """Fill in what global_batch_size, batch per device and accumulation leave open."""
    values = draft.values
    world = int(os.environ.get("WORLD_SIZE", "1"))
    size = values["per_device_train_batch_size"]
    accumulation = values["gradient_accumulation_steps"]
    total = values["global_batch_size"]
    if values["per_device_eval_batch_size"] is None:
        values["per_device_eval_batch_size"] = size
    if any(number is not None and number < 1 for number in (size, accumulation, total)):
        return  # told already
    if total is None:
        total = size * (accumulation or 1) * world
    if accumulation is None:
        accumulation = max(1, total // (size * world))
    values["gradient_accumulation_steps"] = accumulation
    values["global_batch_size"] = total
    if total == size * accumulation * world:
        return

    fitting = [str(n) for n in range(1, 65) if total % (n * world) == 0]
    advice = f"a global_batch_size that is a multiple of {world}"
    if fitting:
        advice = f"per_device_train_batch_size of {', '.join(fitting)}"
    draft.refuse(
        "global_batch_size",
        f"is not {size} per device x {accumulation} accumulation x {world} processes; leave "
        f"gradient_accumulation_steps out, and take {advice}",
    )


OF_BITSANDBYTES = (
    "bnb|paged|lion|ademamix|(?<!torch_)8bit"  # its optimizers; torch_8bit is torchao's
)


def check_packages(draft: Draft) -> None:
    """Packages that are not in requirements.txt, because few need them."""
    values = draft.values
    wanting = [name for name in ("load_in_4bit", "load_in_8bit") if values[name]]
    if re.search(OF_BITSANDBYTES, str(values["optim"])):
        wanting.append("optim")
    if find_spec("bitsandbytes") is None:
        for name in wanting:
            draft.refuse(name, "needs `pip install bitsandbytes`")
    trackers = values["report_to"]
    if isinstance(trackers, str):
        trackers = [trackers]
    known = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK
    installed = get_available_reporting_integrations()
    for tracker in sorted(set(trackers) - {"all", "none", *installed}):
        if tracker in known:
            draft.refuse("report_to", f"{tracker} is not installed; `pip install {tracker}`")
        else:
            draft.refuse("report_to", f"{tracker} is none of {', '.join(known)}")


def check_gpu(draft: Draft) -> None:
    """The GPU that a run needs; a dry run without one only says so."""
    values = draft.values
    if values["use_cpu"]:
        return
    if not torch.cuda.is_available():
        lacking = explain_missing_gpu()
        if values["dry_run"]:
            draft.missing_gpu = lacking
            values["use_cpu"] = True
            values["tf32"] = None
        else:
            draft.problems.append(lacking)
        return
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        draft.problems.append(
            "several GPUs but one process; `accelerate launch --config_file "
            "configs/accelerate/ddp.yaml dpotrainer.py`, or choose one: `CUDA_VISIBLE_DEVICES=0`"
        )
    if values["bf16"] and not torch.cuda.is_bf16_supported(including_emulation=False):
        draft.refuse("bf16", "needs an Ampere GPU (2020); `--fp16 true --bf16 false`")


def explain_missing_gpu() -> str:
    """Why torch finds no GPU, in its own words, and what to do."""
    reason = "it sees none"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        reason = "CUDA_VISIBLE_DEVICES hides them"
    elif "too old" in reason or torch.version.cuda is None:
        reason += (
            "; https://pytorch.org/get-started/previous-versions lists builds for older drivers, "
            "such as `pip install torch --index-url https://download.pytorch.org/whl/cu126`"
        )
    advice = "`python dpotrainer.py --config configs/quickstart.yaml` runs anywhere"
    return f"no CUDA GPU for torch {torch.__version__}: {reason}; {advice}"


def tell_other_versions() -> None:
    """Say in one line which libraries are not those of requirements.txt beside this file."""
    requirements = Path(__file__).with_name("requirements.txt")
    if not requirements.exists():
        return
    pins = re.findall(r"^(\w[\w.-]*)==([\w.]+)$", requirements.read_text("utf-8"), re.MULTILINE)
    others = []
    for name, pinned in pins:
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            others.append(f"{name} {installed} (tested: {pinned})")
    if others:
        say(f"! {', '.join(others)}; `pip install -r {requirements}` installs what is tested")


def flat_settings(job: Job) -> dict[str, Any]:
    """What settings.yaml keeps: every setting as resolved, readable by --config again.

    Without tokens, what this program does not honour, and what follows from the others.
    """
    left_out = {"gradient_accumulation_steps", "hub_token", "local_rank", "overwrite", "dry_run"}
    left_out |= {*SAME, *UNSUPPORTED}
    kept = {}
    for part in job[: len(PARTS)]:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Enum):
                value = value.value
            if field.init and field.name not in left_out:
                kept[field.name] = value
    kept["datasets"] = [dataclasses.asdict(dataset) for dataset in job.mixture_args.datasets]
    return kept


def print_help(draft: Draft, show_all: bool) -> None:
    """The constants and our settings on a page; with `--help all` every setting."""
    if show_all:
        draft.parser.set_defaults(**draft.values)
        draft.parser.print_help()
        return
    print(__doc__.partition("\n\nOver pairs")[0])
    print("\nConstants at the top of the file, and the settings that they are:\n")
    for constant, name in CONSTANT_NAMES.items():
        print(f"  {constant:<23}--{name} {CONSTANTS.get(constant)}")
    print("\nWhat TRL has no name for:\n")
    for field in dataclasses.fields(Settings):
        lead = f"  --{field.name:<24}"
        indent = " " * len(lead)
        text = field.metadata["help"]
        print(textwrap.fill(text, 79, initial_indent=lead, subsequent_indent=indent))
    print("\nAll settings of TRL and transformers work too: `--help all` lists them.")


# -------------------------------------------------------------------------------------- preferences
class Preferences(NamedTuple):
    """Tokenised pairs. Columns: prompt_ids, chosen_ids, rejected_ids (uncut, TRL's names);
    prompt_tokens, chosen_tokens, rejected_tokens (their lengths); packed_tokens (distinct tokens of
    the pair after the cut by max_length, its common prefix once); prompt_hash and pair_hash (int64,
    of the prompt's ids, and of the pair's after the cut).
    """

    train: Dataset
    held_out: Dataset | None
    report: list[str]  # what was read, dropped and may be wrong, as lines for the screen


def load_preferences(job: Job, tokenizer: PreTrainedTokenizerBase) -> Preferences:
    """Read, check, tokenize and split. Raises UserError for what cannot be read."""
    source = " + ".join(name_sources(job))
    # the other processes find the work of the first in the cache
    with global_then_local_main_first():
        splits, remarks = read_splits(job)
        try:
            prepared = [
                prepare_split(job, tokenizer, f"{source} ({split})", split, rows, remarks)
                for split, rows in splits.items()
            ]
        except UnicodeDecodeError as error:  # arrow finds it when a row is read, not before
            raise UserError(explain_failure(job, error)) from error
    if len(prepared) == 1:
        prepared = hold_out(job, prepared[0])
    train, held_out = prepared
    counts = f"{len(train):,} pairs to train on, {len(held_out or []):,} held out"
    report = wrap("data", f"{source}: {counts}")
    if held_out is not None:
        in_both = np.isin(held_out["prompt_hash"][:], train["prompt_hash"][:]).sum()
        if in_both:
            remarks += wrap("!", f"{in_both:,} held-out pairs have a prompt that is trained on")
    return Preferences(train, held_out, report + remarks)


def name_sources(job: Job) -> list[str]:
    """Hub name, folder or file of each data set."""
    if job.mixture_args.datasets:
        return [part.path for part in job.mixture_args.datasets]
    return [job.script_args.dataset_name]


def name_setting(job: Job) -> str:
    """The setting that says what the data is, with its value."""
    setting = "datasets" if job.mixture_args.datasets else "dataset_name"
    return f"{setting}={' + '.join(name_sources(job))}"


def hold_out(job: Job, pairs: Dataset) -> tuple[Dataset, Dataset | None]:
    """(train, held out): by the hashes of the prompts, so that all pairs of one stay together.

    Not as trl.get_dataset splits, which draws anew in each process and each run.
    """
    wanted = min(job.settings.eval_pairs, len(pairs) // 5)
    given = job.mixture_args.test_split_size
    if given is not None:
        wanted = int(given) if given >= 1 else math.ceil(given * len(pairs))
        wanted = min(wanted, len(pairs) - 1)
    key = np.random.default_rng(job.training_args.seed).integers(-(2**63), 2**63)
    drawn = np.array(pairs["prompt_hash"][:]) ^ key
    is_held_out = drawn < np.sort(drawn)[wanted]  # the least ones, in an order that the seed makes
    if not is_held_out.any():
        return pairs, None
    train = pairs.select(np.flatnonzero(~is_held_out))
    return train, pairs.select(np.flatnonzero(is_held_out))


# ---- files and hub names
READERS = {  # of `datasets`, by the ending of a file
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
SPLITS = {  # names of HuggingFaceH4's and others, in place of TRL's defaults
    "train": ("train", "train_prefs"),
    "test": ("test", "test_prefs", "validation"),
}
HUB_SECONDS = 5  # until the hub must have answered


def read_splits(job: Job) -> tuple[dict[str, Dataset], list[str]]:
    """{split: rows}, the first to train on, the second, if any, held out; and what was left out."""
    try:
        if job.mixture_args.datasets:
            for part in job.mixture_args.datasets:
                check_hub(part.path)
            found = trl.get_dataset(dataclasses.replace(job.mixture_args, test_split_size=None))
        else:
            found = read_source(job.script_args.dataset_name, job.script_args.dataset_config)
    except UserError as error:
        raise UserError(f"{name_setting(job)} cannot be read: {error}") from error
    except Exception as error:  # the network's, the hub's, arrow's, pandas'
        if is_disk_full(error):
            raise
        raise UserError(explain_failure(job, error)) from error
    return choose_splits(job, found)


def read_source(name: str, config: str | None) -> dict[str, Dataset]:
    """{split: rows} of a file, a folder or a hub name."""
    path = Path(name)
    if not path.exists():
        check_hub(name)
        return datasets.load_dataset(name, config)
    pattern = glob.escape(name)  # a bracket in a name would be a pattern
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if config is not None and (is_saved or path.is_file() or pattern != name):
        raise UserError(f"dataset_config={config} chooses nothing there; leave it out")
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(name)
    if (path / "state.json").exists():
        return {"train": datasets.load_from_disk(name)}
    files = find_files(name, config)
    endings = {find_ending(file) for file in files}
    readers = {READERS[ending] for ending in endings}
    if len(readers) > 1 or {".csv", ".tsv"} <= endings:
        told = ", ".join(sorted(endings))
        raise UserError(f"it holds files of several kinds, {told}; name one, or move the others")
    [reader] = readers
    options = {}
    if reader == "csv":
        options = read_as_text(files)
    if path.is_file():
        return datasets.load_dataset(reader, data_files=pattern, **options)
    if pattern != name:
        return datasets.load_dataset(reader, data_dir=pattern, **options)
    return datasets.load_dataset(name, config, **options)


def find_files(name: str, config: str | None) -> list[Path]:
    """A file, or those in a folder that are read for pairs; UserError where there is none."""
    path = Path(name)
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*.*")) if not is_hidden(file, path)]
    files = [file for file in files if find_ending(file) in READERS]
    files = [file for file in files if not file.name.startswith("dataset_info")]  # of `datasets`
    if not files:
        raise UserError(f"no file ends in {', '.join(READERS)} (or .gz)")
    if path.is_file() or glob.escape(name) != name:
        return files
    # `datasets` goes by the names of splits, or by what a README says
    splits = datasets.load_dataset_builder(name, config).config.data_files.values()
    chosen = {Path(file).resolve() for split in splits for file in split}
    unread = [file.name for file in files if file.resolve() not in chosen]
    if unread:
        say(*wrap("!", f"files that are not read: {', '.join(unread)}"))
    return [file for file in files if file.resolve() in chosen]


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether `datasets` passes a file in a folder over."""
    return any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def find_ending(path: Path) -> str:
    """The ending that says the format, also of a compressed file."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_as_text(files: list[Path]) -> dict:
    """Options to read tables as text: "None" and "007" are answers."""
    separator = {".csv": ",", ".tsv": "\t"}[find_ending(files[0])]
    names = read_names(files[0], separator)
    if len(names) == 1 and ";" in names[0]:  # Excel's, where a comma is in the numbers
        separator = ";"
        names = read_names(files[0], separator)
    for path in files:
        if sorted(read_names(path, separator)) != sorted(names):
            raise UserError(f"{path.name} and {files[0].name} have different columns")
    features = datasets.Features({name: datasets.Value("string") for name in names})
    options = {"sep": separator, "keep_default_na": False, "features": features}
    # pandas would read on to the next quote, over whole rows
    stray = find_stray_quote(files, separator)
    if stray:
        if separator != "\t" or not all(is_without_quoting(path, names) for path in files):
            raise UserError(f"{stray}; a quote inside a cell is written twice")
        options["quoting"] = csv.QUOTE_NONE
    return options


def open_file(path: Path, mode: str = "rt") -> Any:
    """A file of UTF-8 that may be compressed; line ends as they are. Or its bytes, with "rb"."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    if mode == "rb":
        return opener(path, mode)
    return opener(path, mode, encoding="utf-8-sig", newline="")


def read_names(path: Path, separator: str) -> list[str]:
    """The columns of a table."""
    with open_file(path) as file:
        rows = csv.reader(file, delimiter=separator)
        return next((row for row in rows if row), [])


def find_stray_quote(files: list[Path], separator: str) -> str:
    """The first quote that opens a cell and does not close it; "" where quotes are Excel's."""
    csv.field_size_limit(sys.maxsize)
    for path in files:
        with open_file(path) as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            try:
                for _ in reader:
                    pass
            except csv.Error as error:
                return f"{path.name}, line {reader.line_num}: {error}"
    return ""


def is_without_quoting(path: Path, names: list[str]) -> bool:
    """Whether each line of a tsv is a row: no cell has a line break or a tab in quotes."""
    with open_file(path) as file:
        tabs = {line.count("\t") for line in file if line.strip()}
    return tabs == {len(names) - 1}


def check_hub(name: str) -> None:
    """Go offline where the hub does not answer soon: what is cached is used, nothing waits."""
    if os.path.exists(name) or huggingface_hub.is_offline_mode():
        return
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever it is, there is no answer
            endpoint = huggingface_hub.constants.ENDPOINT
            answers.append(huggingface_hub.get_session().head(endpoint, timeout=HUB_SECONDS))

    # in a thread, as looking up the host's address knows no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answers:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def hub_advice() -> str:
    """What to do where a name cannot be read."""
    if not huggingface_hub.is_offline_mode():
        return "check the name and the network; a gated or private one needs `hf auth login`"
    return (
        f"{huggingface_hub.constants.ENDPOINT} cannot be reached; ways out: a mirror (`export "
        "HF_ENDPOINT=https://hf-mirror.com`), or a local folder in place of the name"
    )


def explain_failure(job: Job, error: Exception) -> str:
    """Why the data cannot be read, and what to do."""
    message = f"{name_setting(job)} cannot be read: "
    path = Path(" + ".join(name_sources(job)))  # several have no file of their own to look into
    if not path.exists():
        return f"{message}{first_line(error)}\n{hub_advice()}"
    for file in [path, *sorted(path.rglob("*.*"))]:
        if READERS.get(find_ending(file)) in ("json", "csv"):
            problem = find_bad_line(file)
            if problem:
                return f"{message}{file}, {problem}"
    return message + first_line(error.__cause__ or error)


def find_bad_line(path: Path) -> str:
    """The first line that is not UTF-8, not JSON, or has other keys than the first; or ""."""
    is_json = READERS[find_ending(path)] == "json"
    word = "row" if is_json else "line"  # a table has a line of names above its rows
    try:
        with open_file(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        return f"it is no whole gzip file: {error}"
    if not content:
        return "the file is empty"
    lines = content.splitlines()
    if content.startswith(b"["):  # one JSON value, not one a line
        lines = [content]
    keys = set()
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig")
            if not is_json or not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError:
            return f"{word} {number}: it is not UTF-8; save it as UTF-8"
        except ValueError as error:
            return f"{word} {number}: {error}"
        if not isinstance(row, dict):
            continue
        keys = keys or set(row)
        differing = ", ".join(sorted(keys.symmetric_difference(row)))
        if differing:
            return f"{word} {number}: {differing} is not in every row; give all rows the same keys"
    return ""


def choose_splits(job: Job, found: dict[str, Dataset]) -> tuple[dict[str, Dataset], list[str]]:
    """The split to train on and the one held out, if any; and a line on those that are not read."""
    train = job.script_args.dataset_train_split
    test = job.script_args.dataset_test_split
    trains = [name for name in SPLITS.get(train, [train]) if name in found]
    tests = [name for name in SPLITS.get(test, [test]) if name in found]
    if not trains or (not tests and test != "test"):
        raise UserError(
            f"{name_setting(job)}: has the splits {', '.join(found)}, but not "
            f"both dataset_train_split={train} and dataset_test_split={test}"
        )
    names = trains[:1] + tests[:1]
    unread = [f"{name} ({len(found[name]):,} rows)" for name in found if name not in names]
    remarks = []
    if unread:
        remarks = wrap("!", f"splits that are not read: {', '.join(unread)}")
    return {name: found[name] for name in names}, remarks


# ---- columns
SIDES = ("prompt", "chosen", "rejected")
OUR_NAMES = (*SIDES, "system", "tools", "chat_template_kwargs")
CONVERSATIONS = ("messages", "conversations", "conversation")  # the prompt where there is none
# what other programs call the same; a refusal ends with the setting that fits
OTHER_NAMES = {
    "prompt": "question instruction query input.messages input context user_input problem",
    "chosen": "response_j chosen_response response_chosen preferred_output preferred accepted "
    "better chosen_answer answer_chosen good positive win",
    "rejected": "response_k rejected_response response_rejected non_preferred_output dispreferred "
    "non_preferred rejected_answer answer_rejected worse bad negative lose",
    "system": "system_prompt sys",
    "tools": "input.tools",
}
WINNERS = set(
    "winner better_response_id preference choice winner_model_a labels preference_strength "
    "overall_preference".split()
)
# columns that may belong to the prompt; left out, the model would see half of the question
LIKE_A_PROMPT = set(
    "query question input instruction history context system system_prompt prompt documents images "
    "image videos audios tools".split()
)


def find_columns(sample: list[dict], given: dict | None, source: str) -> dict[str, str]:
    """{our name: column, or path into a struct}. Raises UserError where a side has none."""
    given = given or {}
    for ours, path in given.items():
        if ours not in OUR_NAMES:
            raise UserError(f"columns: {ours} is none of {', '.join(OUR_NAMES)}")
        if not isinstance(path, str):
            raise UserError(f"columns: {ours} must be the name of one column, not {path}")
        if path not in sample[0] and not is_filled(sample, path):
            names = ", ".join(sample[0])
            raise UserError(f"columns: {source} has no {path} for {ours}; it has {names}")
    columns = {ours: ours for ours in OUR_NAMES if ours in sample[0]} | given
    for name in CONVERSATIONS:
        if name in sample[0] and name not in given.values():
            columns.setdefault("conversation", name)
    missing = [side for side in SIDES if side not in columns]
    if missing == ["prompt"]:
        answers = [find_cell(row, columns["chosen"]) for row in sample]
        are_texts = all(is_text(answer) for answer in answers if answer is not None)
        if "conversation" in columns or not are_texts:
            return columns
    if missing:
        raise UserError(f"{source}: {explain_columns(sample, columns, missing, given)}")
    return columns


def find_cell(row: dict, path: str) -> Any:
    """What lies in a column, or at a dotted path in a struct; None where there is nothing."""
    if path in row:
        return row[path]
    column, _, rest = path.partition(".")
    if isinstance(row.get(column), dict):
        return find_cell(row[column], rest)
    return None


def is_filled(sample: list[dict], path: str) -> bool:
    """Whether some row has something at `path`."""
    return any(find_cell(row, path) not in (None, [], "") for row in sample)


def explain_columns(
    sample: list[dict], columns: dict[str, str], missing: list[str], given: dict[str, str]
) -> str:
    """Why the columns are no pairs: unpaired, no order, or called by other names."""
    message = f"no column is {' or '.join(missing)}; it has {', '.join(sample[0])}\n"
    if WINNERS.intersection(sample[0]):
        return f'{message}a winner column: README, "Your own data", makes pairs of it in five lines'
    if "label" in sample[0] and len(missing) > 1:
        return f"{message}unpaired answers with labels are for `trl kto`"
    fitting = given | dict.fromkeys(missing, "...")
    for ours, others in OTHER_NAMES.items():
        found = [name for name in others.split() if is_filled(sample, name)]
        if ours not in columns and found:
            fitting[ours] = found[0]
    return f"{message}say which columns hold what: --columns '{json.dumps(fitting)}'"


# ---- one row: cells to turns, turns to a pair
NAMES_OF_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user human prompter",
    "assistant": "assistant gpt bot model chatgpt function_call",
    "tool": "tool function observation",
}
ROLES = {name: role for role, names in NAMES_OF_ROLES.items() for name in names.split()}
OUR_KEYS = {"from": "role", "value": "content", "text": "content"}
TRANSCRIPT = re.compile(r"\s*Human:.*\n\r?\nAssistant:", re.DOTALL)
BROKEN_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](role|from)['"]\s*:""")
VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060\ufeff]+")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
)


class Pair(NamedTuple):
    """What was asked, and two answers, as messages."""

    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    remarks: list[str]  # what may be wrong


def is_text(cell: Any) -> bool:
    """Whether a cell is text, and neither a transcript nor messages as JSON."""
    return isinstance(cell, str) and find_turns(cell) is None


def find_turns(text: str) -> list | None:
    """Messages that a text holds, as a transcript or as JSON; None for any other text.

    An answer may be JSON too: messages have a role and a content.
    """
    if TRANSCRIPT.match(text):
        parts = re.split(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):", text)
        turns = zip(parts[1::2], parts[2::2])
        return [{"role": name, "content": said.strip()} for name, said in turns]
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        turns = json.loads(text)
    except ValueError:
        return None
    if isinstance(turns, dict):
        turns = [turns]
    if isinstance(turns, list) and turns and all(is_message(turn) for turn in turns):
        return remove_none_values(turns)
    return None


def is_message(value: Any) -> bool:
    """Whether something has a role and a content, by some name."""
    if not isinstance(value, dict):
        return False
    return bool(
        {"role", "from"} & value.keys() and {"content", "value", "tool_calls"} & value.keys()
    )


def read_turns(cell: Any, role: str) -> list[dict]:
    r"""Messages from such a list, one of them, JSON of them, "\n\nHuman: ...\n\nAssistant: ...", or
    a text, which is one turn of `role`. Raises ValueError for anything else.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        turns = find_turns(cell)
        if turns is None and BROKEN_TURNS.match(cell):
            raise ValueError(f"messages as text that is no JSON: {cell[:80]!r}")
        cell = turns or {"role": role, "content": cell}
    elif not isinstance(cell, (list, dict)):
        cell = {"role": role, "content": cell}
    if isinstance(cell, dict):
        cell = [cell]
    return [read_turn(turn) for turn in cell]


def read_turn(turn: Any) -> dict:
    """A message with our names of role and content; its other keys are the template's."""
    if not isinstance(turn, dict):
        raise ValueError(
            f"{str(turn)[:80]!r} stands where a message should be; where a cell holds several "
            'answers, make a pair of each: README, "Your own data"'
        )
    turn = {OUR_KEYS.get(key, key): value for key, value in turn.items()}
    name = str(turn.get("role")).lower()
    if name not in ROLES:
        raise ValueError(f"{name!r} is no role; one of {', '.join(ROLES)}")
    turn["role"] = ROLES[name]
    turn["content"] = join_parts(turn.get("content"))
    if name == "function_call":
        calls = read_json(name, turn["content"])
        if isinstance(calls, dict):
            calls = [calls]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"function_call must hold a call as JSON, not {turn['content']!r}")
        turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        turn["content"] = ""
    return turn


def join_parts(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if content is None:
        return ""
    if isinstance(content, (str, int, float)):
        return str(content)
    if not isinstance(content, list):
        raise ValueError(f"only text can be trained on, not {str(content)[:80]}")
    text = ""
    for part in content:
        if isinstance(part, dict) and "text" in part:
            part = part["text"]
        if not isinstance(part, str):
            raise ValueError(f"only text can be trained on, not {str(part)[:80]}")
        text += part
    return text


def read_pair(cells: dict) -> Pair:
    """Each turn of a row, once: in the prompt or in an answer."""
    remarks = []
    chosen = read_turns(cells.get("chosen"), "assistant")
    rejected = read_turns(cells.get("rejected"), "assistant")
    asked = read_turns(cells.get("prompt"), "user")
    end_transcript(asked, [chosen, rejected])
    has_prompt = bool(asked) and not is_blank(asked[-1])
    # the pair is complete without it
    may_be_unreadable = has_prompt or (is_conversation(chosen) and is_conversation(rejected))
    conversation = read_conversation(cells.get("conversation"), may_be_unreadable, remarks)
    if not has_prompt and conversation:
        end_transcript(conversation, [chosen, rejected])
        asked = conversation
    for answer in (chosen, rejected):  # what was asked may go on to an answer
        if answer and asked[-len(answer) :] == answer:
            asked = asked[: -len(answer)]

    # the prompt is what both whole conversations begin with: at least what was asked, and up to
    # the last turn that is not the assistant's
    whole_chosen = join_turns(asked, chosen)
    whole_rejected = join_turns(asked, rejected)
    prompt = whole_chosen[: common_prefix_length(whole_chosen, whole_rejected)]
    # one that was given stays whole: if it ends in an answer, the pair is dropped later
    while prompt and prompt != asked and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if not asked and all(turn["role"] != "user" for turn in prompt):
        prompt = []  # a system turn alone asks nothing
    chosen = whole_chosen[len(prompt) :]
    rejected = whole_rejected[len(prompt) :]
    if any(turn not in whole_chosen + whole_rejected for turn in asked + conversation):
        remarks.append("turns of the prompt or conversation that the answers are without")
    prompt = add_system(prompt, read_turns(cells.get("system"), "system"), remarks)
    return Pair(prompt, chosen, rejected, remarks)


def end_transcript(asked: list[dict], answers: list[list[dict]]) -> None:
    """Take the empty turn from "Human: ... Assistant:", and the blank after it from the answers."""
    if asked[-1:] != [{"role": "assistant", "content": ""}]:
        return
    asked.pop()
    for answer in answers:
        if len(answer) == 1:
            answer[0]["content"] = answer[0]["content"].strip()


def add_system(prompt: list[dict], system: list[dict], remarks: list[str]) -> list[dict]:
    """The prompt with the turn of the system column in front, if it has none of its own."""
    if not prompt or not system or is_blank(system[0]):
        return prompt
    if prompt[0]["role"] not in ("system", "developer"):
        return system + prompt
    if prompt[0]["content"] != system[0]["content"]:
        remarks.append("the system column contradicts the system turn, it is not read")
    return prompt


def read_conversation(cell: Any, may_be_unreadable: bool, remarks: list[str]) -> list[dict]:
    """The turns beside prompt and answers; none where they are unreadable and may be."""
    try:
        return read_turns(cell, "user")
    except ValueError:
        if not may_be_unreadable:
            raise
    remarks.append("a conversation column in a form that is not known is left out")
    return []


def join_turns(asked: list[dict], answer: list[dict]) -> list[dict]:
    """A whole conversation: the answer alone may be one."""
    begins_with_it = answer[: len(asked)] == asked  # also where nothing was asked
    if is_conversation(answer) or begins_with_it:
        return answer
    return asked + answer


def is_conversation(turns: list[dict]) -> bool:
    """Whether turns begin before the answer does."""
    return bool(turns) and turns[0]["role"] in ("system", "developer", "user")


def visible(text: str) -> str:
    """A text without white space and invisible characters."""
    return "".join(VISIBLE.findall(text))


def is_blank(turn: dict) -> bool:
    """Whether a turn says nothing."""
    return not VISIBLE.search(turn["content"]) and not turn.get("tool_calls")


def why_unusable(pair: Pair) -> str:
    """Why a pair teaches nothing, or "" if it is good."""
    prompt, chosen, rejected, _ = pair
    if not chosen or not rejected or is_blank(chosen[-1]) or is_blank(rejected[-1]):
        return "empty side"
    if is_conversation(chosen) or is_conversation(rejected):
        return "histories differ"
    if not prompt or is_blank(prompt[-1]):
        return "empty side"
    if prompt[-1]["role"] == "assistant":
        return "prompt ends in an answer"
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "no final assistant turn"
    return ""


def compare_scores(pair: Pair, row: dict) -> str:
    """Why the scores say that a pair has no order, or ""; marks those that contradict it."""
    margins = []
    for names in SCORES:
        with contextlib.suppress(TypeError, ValueError):  # no numbers
            chosen, rejected = (float(row.get(name)) for name in names)
            margins.append(chosen - rejected)
    is_tied = bool(margins) and not any(margins)
    if is_tied or str(row.get("status")).lower() == "tie":
        return "tied scores"
    if any(margin < 0 for margin in margins):
        pair.remarks.append("the rejected answer has the higher score: are the columns swapped?")
    return ""


# ---- a pair to texts, texts to tokens
class PairPreparer:
    """Rows to texts of prompt and answers, texts to tokens: for `Dataset.map`, in batches."""

    def __init__(
        self,
        job: Job,
        tokenizer: PreTrainedTokenizerBase,
        columns: dict[str, str],  # {our name: column, or path into a struct}
        sample: list[dict],  # the first rows
    ) -> None:
        needs_template = "system" in columns
        for name in ("tools", "chat_template_kwargs"):
            if name in columns and is_filled(sample, columns[name]):
                needs_template = True
        has_template = tokenizer.chat_template is not None
        # nothing else of the job, so that other settings leave the cache valid
        self.makes_chats = job.settings.chat_strings or (needs_template and has_template)
        self.max_length = job.training_args.max_length or sys.maxsize
        self.tokenizer = tokenizer
        self.columns = columns
        # whether answers of text repeat the prompt, and not by chance ("Hi", "Hi there")
        repeated = sum(repeats_prompt(read_cells(row, columns)) for row in sample)
        self.repeats = repeated * 2 > len(sample)
        added = tokenizer.added_tokens_decoder.values()
        special = [re.escape(token.content) for token in added if token.special]
        self.special = re.compile("|".join(special) or "(?!)")
        # what plain text begins with; a chat template writes it itself
        self.bos = []
        if tokenizer.bos_token_id in tokenizer("").input_ids:
            self.bos = [tokenizer.bos_token_id]
        # Tried in this order by apply_template: Qwen3's empty think block belongs to the prompt,
        # unless an answer carries reasoning.
        self.forms = [{"enable_thinking": False}, {}]
        if tokenizer.chat_template is not None:
            # TRL's form of a template, where it has one, renders a prompt alone as with its answer
            with contextlib.suppress(ValueError):
                template = trl.get_training_chat_template(tokenizer)
                self.forms += [{**form, "chat_template": template} for form in self.forms]

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The columns of Preferences, why a row is dropped, what may be wrong with it."""
        rows = [dict(zip(batch, cells)) for cells in zip(*batch.values())]
        rendered = [self.read(row, index) for row, index in zip(rows, indices)]
        prepared = self.tokenize(rendered)
        return {name: [pair[name] for pair in prepared] for name in prepared[0]}

    def read(self, row: dict, index: int) -> dict:
        """Cells to turns to a pair to texts. Raises ValueError for a row that cannot be read."""
        texts = ["", "", ""]
        try:
            cells = read_cells(row, self.columns)
            are_texts = all(is_text(cells.get(side)) for side in SIDES)
            if self.repeats and are_texts:
                cells["chosen"] = cells["chosen"].removeprefix(cells["prompt"])
                cells["rejected"] = cells["rejected"].removeprefix(cells["prompt"])
            pair = read_pair(cells)
            # a turn more than the question is a conversation
            is_raw = are_texts and not self.makes_chats and len(pair.prompt) == 1
            dropped = why_unusable(pair) or compare_scores(pair, row)
            if not dropped:
                self.remark_text(pair, is_raw)
                texts = self.render(pair, cells, is_raw)
                if "" in texts[1:]:
                    dropped = "empty once rendered"
                elif texts[1] == texts[2]:
                    dropped = "chosen equals rejected"
                elif visible(texts[1]) == visible(texts[2]):
                    dropped = "answers differ in white space alone"
        except Exception as error:  # also jinja's, and what a template raises to refuse a turn
            # an exception class of ours would not come back from a worker process
            raise ValueError(f"row {index + 1}: {error}") from error
        remarks = "\n".join(pair.remarks)
        return {"texts": texts, "is_raw": is_raw, "dropped": dropped, "remarks": remarks}

    def remark_text(self, pair: Pair, is_raw: bool) -> None:
        """What may be wrong with the text itself."""
        turns = pair.prompt + pair.chosen + pair.rejected
        inside = set(self.special.findall("\n".join(turn["content"] for turn in turns)))
        if inside:
            pair.remarks.append(f"special tokens inside the text: {' '.join(sorted(inside))}")
        elif is_raw and self.tokenizer.chat_template is not None:
            pair.remarks.append(
                "plain text without the chat template; `--chat_strings true` wraps it, as a chat "
                "model expects"
            )
        if any(turn["role"] == "user" for turn in pair.chosen + pair.rejected):
            pair.remarks.append("user turns inside the answers, which are then trained on")

    def render(self, pair: Pair, cells: dict, is_raw: bool) -> list[str]:
        """Texts of prompt, chosen and rejected; an empty answer stays empty."""
        if is_raw:
            texts = [turns[0]["content"] for turns in pair[:3]]
        else:
            texts = self.apply_template(pair, cells)
        for i in (1, 2):
            parts = self.special.split(texts[i])
            if not VISIBLE.search("".join(parts)):
                texts[i] = ""
            elif parts[-1].strip():  # the model must learn to stop
                texts[i] += self.tokenizer.eos_token
        return texts

    def apply_template(self, pair: Pair, cells: dict) -> list[str]:
        """By the first form of the template in which the prompt alone begins both whole texts."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "messages need a chat template, and the tokenizer has none; start from the "
                "instruct version, or save a chat_template.jinja beside the tokenizer"
            )
        tools = read_json("tools", cells.get("tools"))
        more = read_json("chat_template_kwargs", cells.get("chat_template_kwargs")) or {}
        if not isinstance(more, dict):
            raise ValueError(f"chat_template_kwargs must be a mapping, not {more}")
        for form in self.forms:
            render = functools.partial(
                self.tokenizer.apply_chat_template, tools=tools, tokenize=False, **form | more
            )
            prompt = render(pair.prompt, add_generation_prompt=True)
            chosen = render(pair.prompt + pair.chosen)
            rejected = render(pair.prompt + pair.rejected)
            if not chosen.startswith(prompt) or not rejected.startswith(prompt):
                continue
            if "chat_template" in form:
                pair.remarks.append(
                    "rendered by TRL's training form of the chat template; the tokenizer's own "
                    "renders the prompt differently alone"
                )
            if tools and render(pair.prompt, add_generation_prompt=True, tools=None) == prompt:
                pair.remarks.append("the chat template leaves the tools out")
            if leaves_out(pair.chosen[-1], chosen) or leaves_out(pair.rejected[-1], rejected):
                pair.remarks.append(
                    "the chat template leaves reasoning or tool calls of an answer out"
                )
            return [prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)]
        raise ValueError(explain_renderings([prompt, chosen, rejected]))

    def tokenize(self, rendered: list[dict]) -> list[dict]:
        """The tokens of each pair and what follows from them; a dropped one has none."""
        prompts, chosen, rejected = zip(*(pair["texts"] for pair in rendered))
        # special tokens part a text: with each answer, only what follows the last one of the
        # prompt has to be tokenized again
        tails = [self.special.split(prompt)[-1] for prompt in prompts]
        prompt_ids = self.encode(list(prompts))
        tail_ids = self.encode(tails)
        with_chosen = self.encode([tail + answer for tail, answer in zip(tails, chosen)])
        with_rejected = self.encode([tail + answer for tail, answer in zip(tails, rejected)])
        measured = []
        for i, pair in enumerate(rendered):
            chosen_ids = self.cut_tail(with_chosen[i], tail_ids[i], chosen[i])
            rejected_ids = self.cut_tail(with_rejected[i], tail_ids[i], rejected[i])
            measured.append(self.measure(pair, prompt_ids[i], chosen_ids, rejected_ids))
        return measured

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids

    def cut_tail(self, whole: list[int], tail: list[int], answer: str) -> list[int]:
        """Token ids of an answer, from those of the end of its prompt and the answer."""
        if whole[: len(tail)] == tail:
            return whole[len(tail) :]
        # tokens merge across the boundary; in use, the answer starts with a new token
        return self.encode([answer])[0]

    def measure(
        self, pair: dict, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> dict:
        """The columns of one pair."""
        if pair["is_raw"] and prompt[:1] != self.bos:
            prompt = self.bos + prompt
        chosen_row = (prompt + chosen)[: self.max_length]
        rejected_row = (prompt + rejected)[: self.max_length]
        dropped = pair["dropped"]
        if not dropped and len(prompt) >= self.max_length:
            dropped = "prompt leaves no room"
        elif not dropped and chosen_row == rejected_row:
            dropped = "equal after truncation"
        # each row computes its own last token
        shared = min(
            common_prefix_length(chosen_row, rejected_row),
            len(chosen_row) - 1,
            len(rejected_row) - 1,
        )
        return {
            "prompt_ids": np.array(prompt, "int32"),
            "chosen_ids": np.array(chosen, "int32"),
            "rejected_ids": np.array(rejected, "int32"),
            "prompt_tokens": len(prompt),
            "chosen_tokens": len(chosen),
            "rejected_tokens": len(rejected),
            "packed_tokens": len(chosen_row) + len(rejected_row) - shared,
            "prompt_hash": hash_tokens(prompt),
            "pair_hash": hash_tokens([len(prompt), len(chosen_row), *chosen_row, *rejected_row]),
            "dropped": dropped,
            "remarks": pair["remarks"],
        }


def hash_tokens(tokens: list[int]) -> int:
    """64 bits, alike on every machine."""
    digest = hashlib.blake2b(np.array(tokens, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def read_cells(row: dict, columns: dict[str, str]) -> dict:
    """{our name: cell} of what is filled."""
    cells = {ours: find_cell(row, path) for ours, path in columns.items()}
    return remove_none_values(cells)  # arrow gives every struct of a column the keys of all


def repeats_prompt(cells: dict) -> bool:
    """Whether both answers are text that begins with the prompt."""
    prompt, chosen, rejected = (cells.get(side) for side in SIDES)
    if not prompt or not all(is_text(cell) for cell in (prompt, chosen, rejected)):
        return False
    return chosen.startswith(prompt) and rejected.startswith(prompt)


def read_json(name: str, cell: Any) -> Any:
    """A cell that may be JSON in a text."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell or "null")
    except ValueError as error:
        raise ValueError(f"{name} must be JSON, not {cell[:80]!r}") from error


def leaves_out(turn: dict, text: str) -> bool:
    """Whether something that the turn says is not in its rendering."""
    said = re.split("</?think>", turn["content"])
    said += [turn.get(name, "") for name in ("reasoning_content", "reasoning", "thinking")]
    for call in turn.get("tool_calls", []):
        said.append(call.get("function", call).get("name", ""))
    return any(part.strip() not in text for part in said)


def explain_renderings(texts: list[str]) -> str:
    """Where the rendering of a prompt parts from that of the same prompt with an answer."""
    parted = min(common_prefix_length(texts[0], text) for text in texts[1:])
    shown = "\n  ".join(repr(text[max(0, parted - 80) : parted + 80]) for text in texts)
    return (
        "the chat template renders the prompt differently alone than with its answers; save a "
        f"chat_template.jinja that renders them alike beside the tokenizer:\n  {shown}"
    )


# ---- a split and its report
def prepare_split(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    split: str,
    rows: Dataset,
    remarks: list[str],
) -> Dataset:
    """One split, tokenized and without its bad pairs; adds the lines on it to `remarks`."""
    if len(rows) == 0:
        raise UserError(f"{source}: there are no rows")
    sample = list(rows.take(100))
    columns = find_columns(sample, job.settings.columns, source)
    heads = {path.partition(".")[0] for path in columns.values()}
    read_columns = heads.union(columns.values(), ["status"], *SCORES)
    rows = rows.select_columns([name for name in rows.column_names if name in read_columns])
    processes = job.training_args.dataset_num_proc
    if processes is None and len(rows) > 5000:
        processes = min(8, os.cpu_count())
    try:
        rows = rows.map(
            PairPreparer(job, tokenizer, columns, sample),
            batched=True,
            batch_size=256,
            with_indices=True,
            remove_columns=rows.column_names,
            num_proc=processes,
            desc=f"Tokenizing {split}",
        )
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise UserError(f"{source}, {error}") from error
    unread = [name for name in sorted(LIKE_A_PROMPT - read_columns) if is_filled(sample, name)]
    if unread:
        names = ", ".join(unread)
        remarks += wrap("!", f"{split}: columns like a prompt's that are not read: {names}")
    return drop_bad_pairs(source, split, rows, job.training_args.max_length, remarks)


def drop_bad_pairs(
    source: str, split: str, rows: Dataset, max_length: int | None, remarks: list[str]
) -> Dataset:
    """The good pairs; adds to `remarks` what was dropped, is cut, or may be wrong."""
    table = rows.select_columns(["dropped", "remarks"]).to_pandas()
    is_bad = table["dropped"] != ""
    dropped = []
    for reason, bad in table[is_bad].groupby("dropped"):
        numbers = ", ".join(str(row + 1) for row in bad.index[:5])
        if len(bad) > 5:
            numbers += ", ..."
        dropped.append(f"{len(bad):,} {reason} (rows {numbers})")
    if dropped:
        remarks += wrap("dropped", f"{split}: {'; '.join(dropped)}")
    if is_bad.mean() > 0.5:
        counts = f"{(~is_bad).sum():,} of {len(rows):,}"
        told = "\n".join(remarks)
        raise UserError(f"{source}: too few pairs can be used, {counts}\n{told}")
    remarks += describe_lengths(split, rows, ~is_bad.to_numpy(), max_length)
    pairs = rows.select(np.flatnonzero(~is_bad)).remove_columns(["dropped", "remarks"])
    duplicates = len(pairs) - len(set(pairs["pair_hash"][:]))
    if duplicates:
        remarks += wrap("!", f"{split}: {duplicates:,} pairs repeat others")
    of_rows = table["remarks"].str.split("\n").explode()
    for remark, count in of_rows[of_rows != ""].value_counts().items():
        remarks += wrap("!", f"{split}: {count:,} of {len(rows):,} rows: {remark}")
    return pairs


def describe_lengths(
    split: str, rows: Dataset, is_good: np.ndarray, max_length: int | None
) -> list[str]:
    """The share of answers that max_length cuts, and a max_length that cuts few."""
    prompt, chosen, rejected = (np.array(rows[f"{side}_tokens"][:]) for side in SIDES)
    whole = np.stack([prompt + chosen, prompt + rejected])
    if max_length is None or not (whole > max_length).any():
        return []
    share = (whole[:, is_good] > max_length).mean()
    # also of the rows whose prompt leaves no room
    enough = int(np.quantile(whole[whole > 0], 0.99, method="higher"))
    return wrap(
        "cut",
        f"{split}: {share:.1%} of the answers by max_length {max_length}; {enough} would cut less "
        "than 1%",
    )


def describe_pair(
    tokenizer: PreTrainedTokenizerBase, pair: dict, max_length: int | None
) -> list[str]:
    """One pair as the model sees it, special tokens and all, for the dry run."""
    lines = []
    room = max_length or sys.maxsize
    for side in SIDES:
        ids = pair[f"{side}_ids"]
        text = repr(tokenizer.decode(ids[:room]))
        if len(text) > 480:
            text = f"{text[:320]} [...] {text[-160:]}"
        line = f"{side:<9}{len(ids):>6} tokens  {text}"
        if len(ids) > room:
            line += f" | {len(ids) - room} tokens cut by max_length {max_length}"
        lines.append(line)
        if side == "prompt":
            room -= len(ids)
    return lines


# ------------------------------------------------------------------------------- policy and trainer
class Source(NamedTuple):
    """A model on the hub or in a folder: a base, or an adapter on top of one."""

    name: str
    revision: str | None
    base_name: str  # the same as `name` where that is no adapter
    base_revision: str | None
    adapter: peft.PeftConfig | None


@dataclass
class Start:
    """What a run starts from; no weights are read."""

    source: Source  # with an adapter if that of SFT is the start: training continues it
    config: transformers.PretrainedConfig  # of the base
    tokenizer: PreTrainedTokenizerBase
    # the policy with its adapter switched off, a frozen copy of its adapter, or a second model
    reference: Literal["base", "adapter", "copy"]


def load_start(job: Job) -> Start:
    """Read configuration and tokenizer; UserError where they do not go with the settings.

    What they decide is filled in: `dtype: auto`, and the shape of an adapter that is the start.
    """
    name = job.model_args.model_name_or_path
    check_hub(name)
    what = f"model_name_or_path={name}"
    try:
        source = find_source(name, job.model_args.model_revision)
        if source.adapter is not None:
            what += f" is an adapter of base_model_name_or_path={source.base_name}, which"
            check_hub(source.base_name)
        config = load_config(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be read: {explain_unreadable(error)}") from error
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        told = f"model_name_or_path={name}: no tokenizer: {explain_unreadable(error)}"
        raise UserError(told) from error
    tokenizer.pad_token = job.training_args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if job.model_args.dtype == "auto":
        job.model_args.dtype = str(config.dtype or torch.float32).removeprefix("torch.")

    problems = []
    if source.adapter is not None:
        problems += take_adapter_shape(job, source.adapter)
    start = Start(source, config, tokenizer, choose_reference(job, source))
    problems += [
        *find_base_problems(job, config),
        *find_tokenizer_problems(start),
        *find_adapter_problems(job, start),
        *find_reference_problems(job, start),
    ]
    if problems:
        raise UserError("\n".join(problems))
    return start


def explain_unreadable(error: Exception) -> str:
    """Why a model cannot be read, and what to do."""
    if "trust_remote_code" in str(error):
        return "it needs code of its author, and remote code is not run here; take another model"
    return f"{first_line(error)}; {hub_advice()}"


def find_source(name: str, revision: str | None) -> Source:
    """Find out whether a name is a PEFT adapter's, and on top of what.

    Raises OSError or ValueError where it cannot be read, UserError where PEFT cannot use it.
    """
    if find_adapter_config_file(name, revision=revision) is None:
        return Source(name, revision, name, revision, None)
    try:
        adapter = peft.PeftConfig.from_pretrained(name, revision=revision)
    except KeyError as error:
        told = f"{name}: PEFT {peft.__version__} knows no adapter of peft_type={error}"
        raise UserError(f"{told}; start from its base, or from a LoRA") from error
    except TypeError as error:
        raise UserError(f"{name}: its adapter_config.json is none of PEFT's: {error}") from error
    if not adapter.base_model_name_or_path:
        raise UserError(
            f"{name}: its adapter_config.json names no base_model_name_or_path; write there which "
            "model it belongs to"
        )
    return Source(name, revision, adapter.base_model_name_or_path, adapter.revision, adapter)


def load_config(source: Source) -> transformers.PretrainedConfig:
    """The configuration of the base; a ValueError where it has several models of text."""
    # None, the default, would ask on the screen whether to run remote code
    config = transformers.AutoConfig.from_pretrained(
        source.base_name, revision=source.base_revision, trust_remote_code=False
    )
    config.get_text_config()
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; that of the base where SFT has saved the adapter alone."""
    name = source.name
    revision = source.revision
    if source.adapter is not None and not has_tokenizer(source):
        name = source.base_name
        revision = source.base_revision
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)


def has_tokenizer(source: Source) -> bool:
    """Whether there is one beside a model; one that is damaged is there, too."""
    found = transformers.utils.cached_file(
        source.name,
        "tokenizer_config.json",
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return found is not None


def count_positions(config: transformers.PretrainedConfig) -> float:
    """Tokens that a row may have; infinite where the architecture names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def choose_reference(job: Job, source: Source) -> Literal["base", "adapter", "copy"]:
    """`auto` is the model that training starts from: the base, or the SFT adapter on top of it."""
    asked = job.settings.reference
    if asked == "copy":
        return "copy"
    if asked == "adapter" or source.adapter is not None:
        return "adapter"
    return "base"


def find_base_problems(job: Job, config: transformers.PretrainedConfig) -> list[str]:
    """A base that the settings ask too much of."""
    problems = []
    max_length = job.training_args.max_length
    positions = count_positions(config)
    if max_length is not None and max_length > positions:
        name = job.model_args.model_name_or_path
        problems.append(
            f"max_length={max_length}: {name} has positions for {positions} tokens; lower it"
        )
    if job.settings.merge and getattr(config, "quantization_config", None) is not None:
        problems.append(
            "merge=true: the base is quantised already, and an adapter cannot be merged into it; "
            "leave it out, or start from the base as it was before"
        )
    router_weight = job.training_args.router_aux_loss_coef
    if router_weight and not hasattr(config.get_text_config(), "output_router_logits"):
        problems.append(
            f"router_aux_loss_coef={router_weight}: a {config.model_type} has no router to train; "
            "leave it out"
        )
    return problems


def find_router_weight(job: Job, config: transformers.PretrainedConfig) -> float:
    """What TRL multiplies the router's loss by: the setting, else the configuration's own."""
    text = config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return 0.0
    given = job.training_args.router_aux_loss_coef
    return getattr(text, "router_aux_loss_coef", 0.0) if given is None else given


def find_tokenizer_problems(start: Start) -> list[str]:
    """A tokenizer that training would trip over later."""
    tokenizer = start.tokenizer
    problems = []
    if tokenizer.eos_token is None:
        problems.append(
            f"the tokenizer of {start.source.base_name} has no eos_token; set one and save it"
        )
    if tokenizer.pad_token is not None and tokenizer.pad_token not in tokenizer.get_vocab():
        problems.append(f"pad_token={tokenizer.pad_token}: is not in the vocabulary; leave it out")
    embedded = start.config.get_text_config().vocab_size
    if start.source.adapter is None and len(tokenizer) > embedded:
        problems.append(
            f"the tokenizer has {len(tokenizer)} tokens, {start.source.base_name} embeds "
            f"{embedded}: call model.resize_token_embeddings(len(tokenizer)) and save the model"
        )
    return problems


def find_adapter_problems(job: Job, start: Start) -> list[str]:
    """An adapter that cannot be continued, or settings that would not reach it."""
    name = job.model_args.model_name_or_path
    problems = []
    trains_head = "lm_head" in (job.model_args.lora_modules_to_save or [])
    if trains_head and is_sharded():
        problems.append(
            "lora_modules_to_save=lm_head: in a sharded model its gradient would not be averaged "
            "over the processes; train without it, or in one process"
        )
    if start.source.adapter is None:
        if job.settings.reference == "adapter":
            problems.append(f"reference=adapter: {name} is no adapter; leave `reference` out")
        return problems
    if start.source.adapter.is_prompt_learning:
        problems.append(f"{name} is a prompt-learning adapter; start from its base, or from a LoRA")
    trains_more_modules = getattr(start.source.adapter, "modules_to_save", None)
    if trains_more_modules and start.reference == "adapter":
        problems.append(
            f"{name} also holds whole modules ({', '.join(trains_more_modules)}), of which no "
            "frozen copy can be made; merge it into its base and start from the merged model"
        )
    return problems


ADAPTER_SHAPE = {  # settings that make a fresh adapter, and what a starting one calls them
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}


def take_adapter_shape(job: Job, adapter: peft.PeftConfig) -> list[str]:
    """A starting adapter's own shape replaces constants; a file or flag against it is a problem."""
    problems = []
    for name, own_name in ADAPTER_SHAPE.items():
        if not hasattr(adapter, own_name):  # of another kind than LoRA
            continue
        if name == "lora_dropout" and job.training_args.disable_dropout:  # it is 0
            continue
        own = getattr(adapter, own_name)
        if isinstance(own, set):
            own = sorted(own)
        given = getattr(job.model_args, name)
        is_same = as_list(given) == as_list(own)
        if not is_same and not is_constant(name, job.origins):
            problems.append(
                f"{job.origins[name]}, {name}={given}: the starting adapter has {own}; leave it "
                "out, or merge the adapter and start from the merged model"
            )
        setattr(job.model_args, name, own)
    return problems


def as_list(value: Any) -> list:
    """A setting's values in order: TRL takes a list of one apart."""
    if isinstance(value, list):
        return sorted(value)
    return [value] if value else []


def find_reference_problems(job: Job, start: Start) -> list[str]:
    """A second model that does not speak of the same tokens as the policy."""
    name = job.settings.ref_model_name_or_path
    if start.reference != "copy" or name is None:
        return []
    try:
        source = find_source(name, None)
        config = load_config(source)
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        return [f"ref_model_name_or_path={name}: cannot be read: {explain_unreadable(error)}"]
    embedded = config.get_text_config().vocab_size
    has_same_size = embedded == start.config.get_text_config().vocab_size
    if not has_same_size or tokenizer.get_vocab() != start.tokenizer.get_vocab():
        return [
            f"ref_model_name_or_path={name}: has another vocabulary than the policy; take a model "
            "of the same family"
        ]
    return []


def check_pairs(job: Job, start: Start, preferences: Preferences) -> None:
    """Raise UserError where the pairs do not go with the settings or with the model's positions."""
    args = job.training_args
    needs_evaluation = find_comparing(job)
    if args.eval_on_start:
        needs_evaluation = "eval_on_start=True"
    if needs_evaluation and preferences.held_out is None:
        raise UserError(f"{needs_evaluation}: no pairs are held out for it; set eval_pairs")
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in HELD_OUT_METRICS:
        known = ", ".join(HELD_OUT_METRICS)
        raise UserError(f"metric_for_best_model={metric}: must be one of {known}")
    if args.max_length is not None:  # it was compared when it was read
        return
    splits = [preferences.train]
    if preferences.held_out is not None:
        splits.append(preferences.held_out)
    pairs = datasets.concatenate_datasets(splits).with_format("numpy")
    answers = np.maximum(pairs["chosen_tokens"][:], pairs["rejected_tokens"][:])
    longest = int((pairs["prompt_tokens"][:] + answers).max())
    positions = count_positions(start.config)
    if longest > positions:
        raise UserError(
            f"max_length=null: the longest row has {longest} tokens, {start.source.base_name} has "
            f"positions for {positions}; set max_length to {positions} or less"
        )


def find_comparing(job: Job) -> str:
    """The setting that compares evaluations, as `name=value`; "" if there is none."""
    args = job.training_args
    if job.settings.early_stopping_patience is not None:
        return f"early_stopping_patience={job.settings.early_stopping_patience}"
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if args.save_strategy == "best":
        return "save_strategy=best"
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        return "lr_scheduler_type=reduce_lr_on_plateau"
    return ""


def is_switched_on(variable: str) -> bool:
    """Whether a variable of the launcher says so."""
    return os.environ.get(variable, "false").lower() in ("1", "true")


def is_deepspeed() -> bool:
    """Whether DeepSpeed trains, as the launcher says."""
    return is_switched_on("ACCELERATE_USE_DEEPSPEED")


def is_sharded() -> bool:
    """Whether FSDP or DeepSpeed splits the model over processes, as the launcher says."""
    return is_switched_on("ACCELERATE_USE_FSDP") or is_deepspeed()


def load_causal_lm(
    job: Job, name: str, revision: str | None, quantize: bool = True
) -> transformers.PreTrainedModel:
    """Read a model's weights onto this process's one device, all of them and nothing else.

    Raises UserError where keys of the files are missing, left over or of another shape:
    transformers would train what it made up in their place.
    """
    options = {}
    quantization = trl.get_quantization_config(job.model_args)
    # given as None, the argument would switch off the detection of a base that is quantised already
    if quantize and quantization is not None:
        options["quantization_config"] = quantization
    device = job.training_args.device
    if device.type == "cuda" and not is_sharded():
        options["device_map"] = {"": device}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=job.model_args.dtype,
            attn_implementation=job.model_args.attn_implementation,
            use_safetensors=True,  # pickled weights can run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in that information, and refused
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name} cannot be loaded: {explain_unreadable(error)}") from error
    other_shapes = [weight for weight, *_ in found["mismatched_keys"]]
    refuse_misfits(name, [*found["missing_keys"], *found["unexpected_keys"], *other_shapes])
    return model


def refuse_misfits(name: str, misfits: list[str]) -> None:
    """Raise UserError where a file does not hold exactly the weights of its model."""
    if misfits:
        raise UserError(
            f"{name}: {len(misfits)} weights are missing, left over or of another shape, such as "
            f"{min(misfits)}; the files are damaged, or belong to another model: save or download "
            "it again"
        )


def make_room(base: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Enlarge the embedding for tokens that SFT added, as PEFT's own loading does."""
    # not the weight's own shape, which is empty where ZeRO-3 parts it out
    if len(tokenizer) > base.config.get_text_config().vocab_size:
        base.resize_token_embeddings(len(tokenizer))


def load_with_adapter(
    base: transformers.PreTrainedModel, name: str, revision: str | None
) -> peft.PeftModel:
    """An adapter on top of its base, its weights trainable; UserError where they do not fit."""
    config = peft.PeftConfig.from_pretrained(name, revision=revision)
    config.inference_mode = False
    model = peft.get_peft_model(base, config)
    try:
        found = model.load_adapter(name, "default", is_trainable=True, revision=revision)
    except RuntimeError as error:
        refuse_misfits(name, re.findall(r"size mismatch for (\S+):", str(error)))
        raise
    refuse_misfits(name, [*found.missing_keys, *found.unexpected_keys])
    return model


def load_model(
    job: Job, source: Source, tokenizer: PreTrainedTokenizerBase
) -> transformers.PreTrainedModel | peft.PeftModel:
    """A base, or the adapter on top of it."""
    base = load_causal_lm(job, source.base_name, source.base_revision)
    if source.adapter is None:
        return base
    make_room(base, tokenizer)
    return load_with_adapter(base, source.name, source.revision)


def load_reference(job: Job, start: Start) -> transformers.PreTrainedModel | None:
    """The second, frozen model of `reference: copy`; None where the policy is its own reference."""
    if start.reference != "copy":
        return None
    source = start.source
    if job.settings.ref_model_name_or_path is not None:
        source = find_source(job.settings.ref_model_name_or_path, None)
    model = load_model(job, source, start.tokenizer)
    if source.adapter is None:
        return model
    model = model.get_base_model()
    # TRL multiplies by the head's own weight: an adapter on it would be left out without a word
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"{source.name} has LoRA on its output head; merge it first and name the merged model"
        )
    return model


def make_lora_config(model_args: ModelConfig) -> LoraConfig:
    """What a fresh adapter is made from: W x + (alpha / r) B A x, B = 0 (arXiv 2106.09685)."""
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        task_type="CAUSAL_LM",
        revision=model_args.model_revision,
    )


def build_trainer(
    job: Job, start: Start, preferences: Preferences, sharing: "Sharing"
) -> "PreferenceTrainer":
    """Policy, reference and pairs in a trainer: the calls of the tutorial."""
    policy = load_model(job, start.source, start.tokenizer)
    reference = load_reference(job, start)
    models = [policy] if reference is None else [policy, reference]
    spare_cpu(job.training_args)
    if job.training_args.disable_dropout:
        for model in models:
            disable_numeric_dropout(model)

    lora = None
    if start.source.adapter is None:
        lora = make_lora_config(job.model_args)

    collator_class = DataCollatorForPreference
    if sharing.is_used:
        proven = share_where_proven(models, job, start, preferences)
        say(*wrap("weights", f"loaded; prefixes {proven.line}"))
        if proven.is_used:
            collator_class = SharedPrefixCollator

    trainer = PreferenceTrainer(
        model=policy,
        # None: the policy itself, with its adapter switched off or as it was at the start
        ref_model=reference,
        # a DPOConfig: beta, loss_type, bf16, gradient_checkpointing, ...
        args=prepare_for_trainer(job, preferences),
        train_dataset=preferences.train,
        eval_dataset=preferences.held_out,
        processing_class=start.tokenizer,
        peft_config=lora,
        data_collator=collator_class(start.tokenizer.pad_token_id, job.training_args.max_length),
        compute_metrics=functools.partial(average_pairs, beta=job.training_args.beta),
    )
    if not is_deepspeed():
        undo_rounding(trainer.model, start.source)
    if job.training_args.torch_compile:
        compile_layers(trainer.model, job.training_args)
    return trainer


def undo_rounding(policy: peft.PeftModel, source: Source) -> None:
    """Train in float32: TRL makes QLoRA's adapter bf16, which rounds most steps of a learning rate
    of 5e-6 away, and an adapter that is the start would differ from its frozen copy.
    """
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if source.adapter is not None:
        policy.load_adapter(source.name, "default", is_trainable=True, revision=source.revision)


def compile_layers(model: torch.nn.Module, args: DPOConfig) -> None:
    """Compile each decoder layer, once for rows of any length."""
    for module in model.modules():
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
            module.compile(
                backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True
            )


def spare_cpu(args: DPOConfig) -> None:
    """On a CPU, have TRL score the tokens of the answers alone, as it does on a GPU: the same
    results. TRL is changed for the whole process.
    """
    if not args.use_cpu:
        return
    # Private: TRL's head leaves out what has no label where Triton runs; elsewhere it scores prompt
    # and padding too, against the whole vocabulary, and that was half of SmolLM2's time. With a
    # moved pin a CPU may do so again; a test counts what is scored.
    trl.trainer.utils._use_triton = lambda device: True


def prepare_for_trainer(job: Job, preferences: Preferences) -> DPOConfig:
    """A copy of the arguments, without what this program does in the trainer's place."""
    ours = copy.copy(job.training_args)
    ours.torch_compile = False  # compile_layers does it
    ours.torch_compile_backend = None
    ours.torch_compile_mode = None
    ours.push_to_hub = False  # at the end, once, instead of at each checkpoint
    ours.restore_callback_states_from_checkpoint = True  # early stopping counts on
    if preferences.held_out is None:
        ours.eval_strategy = IntervalStrategy.NO
    # An interruption ends an epoch early, and would count as its end: count steps instead.
    steps_per_epoch = math.ceil(len(preferences.train) / job.settings.global_batch_size)
    if ours.eval_strategy == "epoch":
        ours.eval_delay *= steps_per_epoch
    for kind in ("eval", "logging", "save"):
        strategy = getattr(ours, f"{kind}_strategy")
        if strategy == "epoch":
            setattr(ours, f"{kind}_strategy", type(strategy)("steps"))
            setattr(ours, f"{kind}_steps", steps_per_epoch)
    return ours


def disable_numeric_dropout(model: torch.nn.Module) -> None:
    """Zero dropout that is a number (`attention_dropout`): TRL reaches nn.Dropout alone."""
    holders = [model.config.get_text_config(), *model.modules()]
    for holder in holders:
        for name, value in vars(holder).items():
            is_dropout = "drop" in name and isinstance(value, float)
            if is_dropout:
                setattr(holder, name, 0.0)


class BalancedSampler(torch.utils.data.Sampler):
    """Random order in whole optimizer steps; the passes of a step have alike many tokens.

    Yields a list of pairs for each forward pass; accelerate hands pass k to process k modulo their
    number, so no process waits long for another. Which pairs a step has does not depend on the
    number of processes. The last step of an epoch is filled up with pairs from its start.
    """

    drop_last = False  # accelerate asks for it

    def __init__(
        self, tokens: np.ndarray, pairs_per_pass: int, passes_per_step: int, seed: int
    ) -> None:
        self.tokens = tokens
        self.batch_size = pairs_per_pass
        self.passes_per_step = passes_per_step
        self.seed = seed
        self.epoch = 0
        self.steps = math.ceil(len(tokens) / (pairs_per_pass * passes_per_step))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; each epoch has its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.passes_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.tokens))
        for pairs in np.resize(order, (self.steps, self.passes_per_step * self.batch_size)):
            yield from deal_pairs(pairs, self.tokens, self.passes_per_step)


def deal_pairs(pairs: np.ndarray, tokens: np.ndarray, passes: int) -> list[list[int]]:
    """Give the longest pair left to the pass with the fewest tokens that still has room."""
    room = len(pairs) // passes
    dealt = [[] for _ in range(passes)]
    open_passes = [(0, number) for number in range(passes)]  # a heap of (tokens, pass)
    for pair in sorted(pairs.tolist(), key=tokens.__getitem__, reverse=True):
        load, lightest = heapq.heappop(open_passes)
        dealt[lightest].append(pair)
        if len(dealt[lightest]) < room:
            heapq.heappush(open_passes, (load + tokens[pair], lightest))
    return dealt


def make_sampler(pairs: Dataset, args: DPOConfig) -> BalancedSampler:
    """The order of the pairs to train on, and their passes."""
    return BalancedSampler(
        np.array(pairs["packed_tokens"]),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps * args.world_size,
        args.seed if args.data_seed is None else args.data_seed,
    )


def as_has_run(output: transformers.utils.ModelOutput) -> Callable:
    """A model that has run already, for TRL's functions, which run the one that they are given."""

    def policy(**_: Any) -> transformers.utils.ModelOutput:
        return output

    return policy


class PreferenceTrainer(DPOTrainer):
    """trl.DPOTrainer on tokenised pairs: a reference free of noise, an exact evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL's switch for: the batch brings the reference's log-probs. Here it always does, see
        # add_reference.
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        # Private: TRL would tokenize again. Without it a moved pin fails at once, on columns that
        # are not there.
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL writes a card at each checkpoint, ours is written at the end."""

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Passes as BalancedSampler deals them."""
        args = self.args
        self.sampler = make_sampler(self.train_dataset, args)
        pairs = self._remove_unused_columns(self.train_dataset)
        # accelerate takes what is beyond this length for repeated pairs, and would cut them from
        # what it gathers in an epoch's last pass; here they are part of the step
        pairs.total_dataset_length = len(self.sampler) * self.sampler.batch_size
        loader = torch.utils.data.DataLoader(
            pairs,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_parent,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """Trainer's own; its workers leave signals to their parent."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        # accelerate's wrapper starts the workers of the loader that it holds
        loader.base_dataloader.worker_init_fn = leave_signals_to_parent
        return loader

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log pi_ref of the chosen and of the rejected answers, (B,) each, in nats; in evaluation
        mode.

        In training mode the dropout of a frozen SFT adapter, or a router's noise, would be in the
        reference.
        """
        was_training = model.training
        model.eval()
        logps = super().compute_ref_log_probs(model, inputs)
        model.train(was_training)
        return logps

    def add_reference(self, inputs: dict) -> dict:
        """The batch with the reference's log-probs, unless they were computed before training."""
        if "ref_chosen_logps" not in inputs:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs["ref_chosen_logps"] = chosen
            inputs["ref_rejected_logps"] = rejected
        return inputs

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The loss is TRL's; this adds the reference, and stops the run where it is not finite."""
        loss = super().compute_loss(model, self.add_reference(inputs), *args, **kwargs)
        if not math.isfinite(loss.detach()):
            texts = self.processing_class.batch_decode(inputs["input_ids"][:, :60])
            shown = [repr(text) for text in texts[: len(texts) // 2]]
            raise UserError("\n  ".join([self.explain_overflow("loss"), *shown]), status=1)
        return loss

    def explain_overflow(self, what: str) -> str:
        """What to do about a loss or gradient that is infinite or not a number."""
        return (
            f"the {what} is not finite at step {self.state.global_step + 1}, the last checkpoint "
            f"is kept: lower learning_rate ({self.args.learning_rate:g}), raise beta, or use bf16, "
            "not fp16; with `--overwrite true`, as that is another run"
        )

    @torch.no_grad()
    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, dict[str, torch.Tensor], torch.Tensor]:
        """Score each held-out pair alone: {score: (B,)} in place of logits, for average_pairs.

        Trainer gathers them from all processes without the pairs that only fill up the last batch,
        so that the means are exact; TRL's own are means of means of batches, and count those pairs.
        """
        inputs = self.add_reference(self._prepare_inputs(inputs))
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        for_trl_alone = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        for_the_model = {name: value for name, value in inputs.items() if name not in for_trl_alone}
        with self.compute_loss_context_manager():
            output = model(**for_the_model, labels=labels, use_cache=False, fused_lm_head=True)

        # it sums over an answer's tokens, by ld_alpha, for any model, not the reference alone
        chosen_logps, rejected_logps = super().compute_ref_log_probs(as_has_run(output), inputs)
        chosen_tokens, rejected_tokens = inputs["completion_mask"].sum(dim=1).chunk(2)
        scores = {
            "loss": self.compute_loss_of_each(output, inputs),
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": inputs["ref_chosen_logps"],
            "ref_rejected_logps": inputs["ref_rejected_logps"],
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
        }
        return None, scores, scores["loss"]

    def compute_loss_of_each(
        self, output: transformers.utils.ModelOutput, inputs: dict
    ) -> torch.Tensor:
        """The loss of each pair alone, (B,), where the policy has run on all of them."""
        per_row = {name: value for name, value in output.items() if value.ndim == 2}
        pairs = len(inputs["ref_chosen_logps"])
        had_router_loss = self.aux_loss_enabled
        self.aux_loss_enabled = False  # it is a batch's, no pair's
        losses = []
        for pair in range(pairs):
            rows = [pair, pairs + pair]  # chosen and rejected
            output_of_pair = type(output)(**{name: value[rows] for name, value in per_row.items()})
            inputs_of_pair = {
                "input_ids": inputs["input_ids"][rows],
                "attention_mask": inputs["attention_mask"][rows],
                "completion_mask": inputs["completion_mask"][rows],
                "ref_chosen_logps": inputs["ref_chosen_logps"][pair : pair + 1],
                "ref_rejected_logps": inputs["ref_rejected_logps"][pair : pair + 1],
            }
            losses.append(super().compute_loss(as_has_run(output_of_pair), inputs_of_pair))
        self.aux_loss_enabled = had_router_loss
        # Private: TRL would log its means over batches under the names of ours. A test compares the
        # log with float64.
        self._metrics["eval"].clear()
        return torch.stack(losses)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: where FSDP shards it, transformers would gather all, or nothing."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        weights = get_model_state_dict(self.model, options=options)
        if self.args.should_save:
            policy = self.accelerator.unwrap_model(self.model)
            policy.save_pretrained(output_dir, state_dict=weights, selected_adapters=["default"])
            self.processing_class.save_pretrained(output_dir)


HELD_OUT_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/accuracies_low",
    "rewards/accuracies_high",
    "logps/chosen",
    "logps/rejected",
    "nats_per_token/chosen",
    "nats_per_token/rejected",
)  # what average_pairs finds


def average_pairs(scored: transformers.EvalPrediction, beta: float) -> dict[str, float]:
    """Means over the held-out pairs, each counted once; `scored.predictions` is {score: (N,)}, as
    PreferenceTrainer.prediction_step names them.
    """
    pair = {name: values.astype(float) for name, values in scored.predictions.items()}
    chosen_ratio = pair["chosen_logps"] - pair["ref_chosen_logps"]  # nats
    rejected_ratio = pair["rejected_logps"] - pair["ref_rejected_logps"]
    accuracies = chosen_ratio > rejected_ratio
    low, high = wilson_interval(accuracies.mean(), len(accuracies))
    means = {
        "loss": pair["loss"].mean(),
        "rewards/chosen": beta * chosen_ratio.mean(),
        "rewards/rejected": beta * rejected_ratio.mean(),
        "rewards/margins": beta * (chosen_ratio - rejected_ratio).mean(),
        "rewards/accuracies": accuracies.mean(),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "logps/chosen": pair["chosen_logps"].mean(),
        "logps/rejected": pair["rejected_logps"].mean(),
        "nats_per_token/chosen": (chosen_ratio / pair["chosen_tokens"]).mean(),
        "nats_per_token/rejected": (rejected_ratio / pair["rejected_tokens"]).mean(),
    }
    return {f"eval_{name}": float(value) for name, value in means.items()}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Bounds of the 95% interval of a share of `count` trials (Wilson, 1927)."""
    z = 1.96
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


# ----------------------------------------------------------------------------------------- the plan
GIB = 2**30
CARDS = (24, 40, 48, 80, 141)  # GB of memory that GPUs commonly have
PEAK_RATES = {"A100": 312e12, "H100": 989e12}  # operations a second in bf16, as advertised
UTILISATION = 0.4  # the share of it that training commonly reaches
FLOAT32_BYTES = 4
SCALE_BITS = 0.25  # that quantisation adds to a weight: a scale of 16 bits for 64 weights
WITH_GRADIENTS = 1.3  # a layer at work, over what it keeps: as torch's memory tracker finds it
HEAD_TILE = (4096, 32_768)  # tokens and words whose logits TRL's head holds at a time
CUDA_CONTEXT = GIB  # what CUDA and its libraries take
IDLE_SHARE = 0.1  # of the activations: lies idle between tensors
FEW_STEPS = 20  # with fewer the adapter hardly moves
SMALLEST_BATCH = 4  # pairs per process and step: a gradient of fewer is mostly noise
REFERENCES = {
    "base": "the policy with its adapter switched off",
    "adapter": "a frozen copy of the adapter that training starts from",
    "copy": "a second, frozen model",
}


class Pass(NamedTuple):
    """What a forward pass computes: rows of so many tokens, some of which are scored.

    Packed rows count as one a pair, of their mean length.
    """

    rows: int
    length: int
    scored: int  # tokens of the answers: they alone go through the output head


def print_plan(job: Job, start: Start, preferences: Preferences, sharing: "Sharing") -> None:
    """Show what the run will do and cost, each derived number with where it comes from.

    No weight is read: shapes are enough to count weights, operations and memory.
    """
    policy = build_without_weights(job, start)  # all processes refuse it, none waits for another
    if not is_main_process():
        return
    args = job.training_args
    passes = plan_passes(args, preferences, sharing)
    pairs = len(preferences.train)
    steps = count_steps(job, pairs)
    say(
        *preferences.report,
        *describe_policy(job, start, policy),
        *describe_steps(job, pairs, steps),
        *wrap("prefixes", sharing.line),
        *describe_cost(job, start, policy, passes, steps),
        *wrap("output", args.output_dir),
    )
    if job.missing_gpu:
        say(*wrap("!", job.missing_gpu))
    if job.settings.dry_run:
        say(*describe_pair(start.tokenizer, preferences.train[0], args.max_length))


def build_without_weights(job: Job, start: Start) -> peft.PeftModel:
    """The policy at full size, with its adapter, on the meta device: shapes, and no memory."""
    try:
        # set_zero3_state: DeepSpeed would deal out weights that are not there
        with torch.device("meta"), transformers.modeling_utils.set_zero3_state():
            # without attn_implementation, whose package may be missing here or want a GPU
            model = AutoModelForCausalLM.from_config(
                start.config, dtype=job.model_args.dtype, trust_remote_code=False
            )
            policy = peft.get_peft_model(model, choose_lora(job, start))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{start.source.base_name} cannot be built: {first_line(error)}") from error
    modules = [name for name, _ in policy.named_modules()]
    for wanted in job.model_args.lora_modules_to_save or []:
        if not any(name.endswith(f".{wanted}") for name in modules):  # PEFT says nothing
            raise UserError(f"lora_modules_to_save={wanted}: the model has no such module")
    return policy


def choose_lora(job: Job, start: Start) -> peft.PeftConfig:
    """What the trained adapter is made from: the settings, or the adapter that is the start."""
    if start.source.adapter is None:
        return make_lora_config(job.model_args)
    lora = copy.deepcopy(start.source.adapter)
    lora.inference_mode = False
    return lora


def describe_policy(job: Job, start: Start, policy: peft.PeftModel) -> list[str]:
    """What is trained, against what, and for which objective."""
    args = job.training_args
    trained, total = policy.get_nb_trainable_parameters()
    frozen = total - trained
    reached, missed_experts = find_reach(policy)
    base = f"{start.source.base_name}, {frozen:,} weights in {job.model_args.dtype}"
    bits = count_bits(job, start.config)
    if bits is not None:
        base += f", {bits} bits in its layers"
    lora = policy.peft_config["default"]
    told = f"{trained:,} trained weights ({trained / frozen:.2%})"
    if isinstance(lora, LoraConfig):
        told = f"rank {lora.r}, alpha {lora.lora_alpha}: {told}"
    lines = wrap("policy", base)
    lines += wrap("adapter", f"{told}; {reached / frozen:.0%} of the weights have one")
    if missed_experts:
        told = f"no expert has an adapter, only {reached / frozen:.1%} of the weights have"
        if start.source.adapter is None:
            told += f": add `lora_target_parameters: [{', '.join(missed_experts)}]`"
        lines += wrap("!", told)
    objective = " + ".join(args.loss_type)
    if args.loss_weights is not None:
        objective += f", weighted {args.loss_weights}"
    lines += wrap("reference", REFERENCES[start.reference])
    lines += wrap("objective", f"{objective}, beta {args.beta:g}")
    return lines


def find_reach(policy: peft.PeftModel) -> tuple[int, list[str]]:
    """How many weights have an adapter beside them, and which stacks of experts have none."""
    reached = {}
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer):
            # beside a stack of experts, it knows the name of the parameter in their layer
            name = getattr(module, "parameter_name", "weight")
            weight = getattr(module.get_base_layer(), name)
            reached[id(weight)] = weight.numel()
    missed = set()
    for name, weight in policy.named_parameters():
        if "experts" in name and weight.ndim == 3 and id(weight) not in reached:
            missed.add(re.sub(r".*\.\d+\.", "", name))
    return sum(reached.values()), sorted(missed)


def count_bits(job: Job, config: transformers.PretrainedConfig) -> int | None:
    """Bits of a weight in the layers of a quantised model, scales left out; None for others."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None and not job.model_args.load_in_4bit and not job.model_args.load_in_8bit:
        return None
    # each method has words of its own: bits, num_bits, load_in_4bit, mxfp4
    words = str(quantization)
    is_four = re.search(r"bits'?: 4|4bit'?: True|fp4|int4", words)
    if "load_in_8bit': True" in words:
        is_four = None  # bitsandbytes names its 4-bit type all the same
    return 4 if is_four or job.model_args.load_in_4bit else 8


def count_steps(job: Job, pairs: int) -> int:
    """Optimizer steps of the run; the last one of an epoch is filled up."""
    args = job.training_args
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(pairs / job.settings.global_batch_size))


def count_warmup_steps(args: DPOConfig, steps: int) -> int:
    """Steps of warm-up; some schedules have none, whatever warmup_steps says."""
    if args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy"):
        return 0
    return args.get_warmup_steps(steps)


def describe_steps(job: Job, pairs: int, steps: int) -> list[str]:
    """Batch and steps, with warnings where they are too few to learn from."""
    args = job.training_args
    batch = job.settings.global_batch_size
    warmup = count_warmup_steps(args, steps)
    steps_per_epoch = math.ceil(pairs / batch)
    formula = (
        f"{args.num_train_epochs:g} (epochs) x {steps_per_epoch:,} (steps: {pairs:,} pairs / "
        f"{batch}, rounded up)"
    )
    if args.num_train_epochs * steps_per_epoch != steps:
        formula += ", rounded up"
    if args.max_steps > 0:
        formula = "max_steps"
    lines = wrap(
        "batch",
        f"{batch} pairs = {args.per_device_train_batch_size} (per device) x "
        f"{args.gradient_accumulation_steps} (accumulation) x {args.world_size} (processes)",
    )
    lines += wrap(
        "steps",
        f"{steps:,} = {formula}; learning rate {args.learning_rate:g}, "
        f"{args.lr_scheduler_type.value}, warm-up {warmup}",
    )
    if batch > pairs:
        lines += wrap("!", f"a step of {batch} pairs is more than there are, so pairs repeat in it")
    if warmup >= steps:
        told = f"all {steps} steps are warm-up, from learning rate 0: lower warmup_steps"
        lines += wrap("!", told)
    if steps < FEW_STEPS:
        advice = f"raise max_steps to {FEW_STEPS} or more"
        if args.max_steps <= 0:
            advice = suggest_steps(job, pairs)
        lines += wrap("!", f"{steps} steps hardly move the policy; {advice}")
    return lines


def suggest_steps(job: Job, pairs: int) -> str:
    """Settings that make steps enough: smaller ones, and epochs where that is not enough."""
    args = job.training_args
    size = int(args.num_train_epochs * pairs / FEW_STEPS / args.world_size)
    size = max(SMALLEST_BATCH, size)
    batch = size * args.world_size
    epochs = max(args.num_train_epochs, math.ceil(FEW_STEPS * batch / pairs))
    per_device = math.gcd(size, args.per_device_train_batch_size)
    advice = (
        f"`global_batch_size: {batch}`, `per_device_train_batch_size: {per_device}` and "
        f"`num_train_epochs: {epochs:g}` make {FEW_STEPS} or more"
    )
    if "gradient_accumulation_steps" in job.origins:
        advice += "; leave gradient_accumulation_steps out"
    return advice


def plan_passes(args: DPOConfig, preferences: Preferences, sharing: "Sharing") -> list[Pass]:
    """The forward passes of an epoch, as the sampler deals them out."""
    pairs = preferences.train.with_format("numpy")
    prompts = pairs["prompt_tokens"][:]
    limit = args.max_length or math.inf
    chosen = np.minimum(prompts + pairs["chosen_tokens"][:], limit)
    rejected = np.minimum(prompts + pairs["rejected_tokens"][:], limit)
    packed = pairs["packed_tokens"][:]
    passes = []
    for dealt in make_sampler(preferences.train, args):
        scored = int((chosen + rejected - 2 * prompts)[dealt].sum())
        if sharing.is_used:
            passes.append(Pass(len(dealt), math.ceil(packed[dealt].mean()), scored))
        else:
            longest = int(np.maximum(chosen, rejected)[dealt].max())
            passes.append(Pass(2 * len(dealt), longest, scored))
    return passes


def describe_cost(
    job: Job, start: Start, policy: peft.PeftModel, passes: list[Pass], steps: int
) -> list[str]:
    """Operations of training, evaluations left out, and memory in its largest pass."""
    args = job.training_args
    tokens = [each.rows * each.length for each in passes]
    largest = passes[np.argmax(tokens)]
    try:
        operations, kept = measure_pass(policy, largest, args)
    except Exception as error:  # a model may need values where there are only shapes
        return wrap("!", f"operations and memory could not be counted: {first_line(error)}")

    # backward costs what forward does: the weights are frozen
    runs = ["policy", "reference", "backward"]
    if args.gradient_checkpointing:
        runs.append("recomputation")
    per_token = len(runs) * operations / max(tokens)
    # the head always recomputes: four runs, of two operations a weight
    per_scored_token = 4 * 2 * policy.get_base_model().get_output_embeddings().weight.numel()
    scored = sum(each.scored for each in passes)
    pairs = len(passes) * args.per_device_train_batch_size
    per_pair = (per_token * sum(tokens) + per_scored_token * scored) / pairs
    trained_pairs = steps * job.settings.global_batch_size
    text = (
        f"{trained_pairs * per_pair:.2g} operations of training = {trained_pairs:,} (pairs) x "
        f"{per_pair:.3g} ({', '.join(runs)})"
    )
    is_half = args.bf16 or args.fp16 or job.model_args.dtype != "float32"
    if is_for_gpu(job) and is_half:
        hours = []
        for name, rate in PEAK_RATES.items():
            seconds = trained_pairs * per_pair / (UTILISATION * rate * args.world_size)
            hours.append(f"{seconds / 3600:,.2f} h on {args.world_size} {name}")
        text += f"; an estimate, at {UTILISATION:.0%} of the peak: {', '.join(hours)}"
    with_checkpointing = estimate_memory(job, start, policy, largest, kept, recomputes=True)
    without = estimate_memory(job, start, policy, largest, kept, recomputes=False)
    memory = describe_memory(job, start, with_checkpointing, without, max(tokens))
    return [*wrap("compute", text), *memory]


def is_for_gpu(job: Job) -> bool:
    """Whether the run is meant for a GPU, be there one here or not."""
    return not job.training_args.use_cpu or job.missing_gpu != ""


def estimate_memory(
    job: Job, start: Start, policy: peft.PeftModel, largest: Pass, kept: int, recomputes: bool
) -> dict[str, float]:
    """Bytes on one GPU in the largest pass, by what they hold; `recomputes`: with gradient
    checkpointing.
    """
    args = job.training_args
    text_config = start.config.get_text_config()
    shards = args.world_size if is_sharded() else 1
    trained = FLOAT32_BYTES * policy.get_nb_trainable_parameters()[0] / shards
    weights = 0
    bits = count_bits(job, start.config)
    quantises = job.model_args.load_in_4bit or job.model_args.load_in_8bit
    layer_shards = shards
    # accelerate does not shard quantised weights that are stored as bytes
    if quantises and job.model_args.bnb_4bit_quant_storage in (None, "uint8"):
        layer_shards = 1
    for weight in policy.parameters():
        if weight.requires_grad:
            continue
        # quantisation leaves vectors, embeddings and head as they are
        is_whole = bits is None or weight.ndim == 1 or text_config.vocab_size in weight.shape
        # bitsandbytes takes linear layers alone, no stacks of experts
        if is_whole or (quantises and weight.ndim > 2):
            weights += weight.nbytes / shards
        else:
            weights += weight.numel() * (bits + SCALE_BITS) / 8 / layer_shards
    parts = {"weights": weights, "adapter": trained, "gradients": trained}
    parts["optimizer"] = 2 * trained  # Adam's two moments, in float32
    if "8bit" in args.optim:
        parts["optimizer"] = 2 * trained / FLOAT32_BYTES  # in a byte each
    parts["reference"] = {"base": 0, "adapter": trained, "copy": weights}[start.reference]

    state = text_config.hidden_size * policy.get_base_model().dtype.itemsize
    parts["activations"] = kept
    if recomputes:  # the input of each layer is kept, and all of the one that is at work
        layers = text_config.num_hidden_layers
        inputs = layers * largest.rows * largest.length * state
        parts["activations"] = inputs + WITH_GRADIENTS * kept / layers
    # TRL's head: hidden states, their gradient in float32, and a tile of logits in half precision
    parts["head"] = largest.scored * (state + FLOAT32_BYTES * text_config.hidden_size)
    tile = min(largest.scored, HEAD_TILE[0]) * min(text_config.vocab_size, HEAD_TILE[1])
    parts["head"] += 2 * tile
    if is_for_gpu(job):
        parts["overhead"] = CUDA_CONTEXT + IDLE_SHARE * (parts["activations"] + parts["head"])
    return parts


def describe_memory(
    job: Job,
    start: Start,
    with_checkpointing: dict[str, float],
    without: dict[str, float],
    tokens: int,
) -> list[str]:
    """The sum with its parts, as gradient_checkpointing is set, what it were otherwise, and which
    card has room for it.
    """
    parts = without
    otherwise = f"{sum(with_checkpointing.values()) / GIB:.3g} with gradient_checkpointing"
    if job.training_args.gradient_checkpointing:
        parts = with_checkpointing
        otherwise = f"{sum(without.values()) / GIB:.3g} without gradient_checkpointing"
    total = sum(parts.values()) / GIB
    terms = " + ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
    text = f"{total:.3g} GiB ({otherwise}) in the largest pass, of {tokens:,} tokens: {terms}"
    if not is_for_gpu(job):
        return wrap("memory", text)
    cards = [0.98 * size for size in CARDS]  # the driver takes some
    device = job.training_args.device
    if device.type == "cuda":
        cards = [torch.cuda.get_device_properties(device).total_memory / GIB]
    for room in cards:
        if room > total:
            return wrap("memory", f"{text}; fits in {room:.0f}, with {room - total:.0f} to spare")
    advice = suggest_savings(job, start)
    return [*wrap("memory", text), *wrap("!", f"{cards[-1]:.0f} GiB are not enough: {advice}")]


def suggest_savings(job: Job, start: Start) -> str:
    """What needs less memory and is not done yet."""
    ways = ["lower max_length"]
    if job.training_args.per_device_train_batch_size > 1:
        ways.append("halve per_device_train_batch_size")
    if not job.training_args.gradient_checkpointing:
        ways.append("turn gradient_checkpointing on")
    if count_bits(job, start.config) is None:
        ways.append("turn load_in_4bit on")
    if not is_sharded():
        ways.append("share the model out over GPUs (configs/accelerate/fsdp2.yaml)")
    return ", or ".join(ways)


def measure_pass(policy: peft.PeftModel, size: Pass, args: DPOConfig) -> tuple[int, int]:
    """Operations of the layers in a forward pass, and bytes that they keep for the backward pass
    without checkpointing.

    On fake tensors, which have shapes alone: a model of any size takes seconds and no memory. The
    policy's own weights are fake ones from then on.
    """
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage  # several tensors may look at one
        return tensor

    def give_back(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    formulas = {  # which torch has none for
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
        torch.ops.aten._grouped_mm: count_experts,
    }
    # it would print a traceback of its own before it raises
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with (
        # Private, but documented by torch: if it moves, the import at the top fails at once
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
        torch.autocast("cpu", dtype, enabled=args.bf16 or args.fp16),
        peft.helpers.disable_input_dtype_casting(policy, active=args.bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, give_back),
    ):
        backbone = policy.to_empty(device="cpu").eval().get_base_model().base_model
        ids = torch.zeros(size.rows, size.length, dtype=torch.long)
        backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for weight in policy.parameters():
        kept.pop(id(weight.untyped_storage()), None)
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def count_attention(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of attention without a mask: query (B, heads, L, D), key (B, heads, K, D)."""
    return 4 * math.prod(query) * key[-2]


def count_experts(rows: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of rows (N, D), each with one of the experts' weights (E, D, F)."""
    return 2 * math.prod(rows) * weights[-1]


MINIATURE_SIZES = {  # a miniature's size at most: the names that configurations give to it
    128: "intermediate_size moe_intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim "
    "encoder_ffn_dim shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size intermediate_size_mlp expert_ffn_hidden_size",
    64: "hidden_size d_model n_embd embedding_size word_embed_proj_dim attention_hidden_size",
    32: "qk_head_dim",
    16: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels swa_head_dim "
    "kv_lora_rank q_lora_rank rotary_dim hidden_size_per_layer_input mamba_d_head mamba_d_state "
    "sliding_window sliding_window_size keep_window_size index_topk attention_chunk_size",
    8: "mamba_n_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads swa_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group attn_layer_period",
    1: "topk_group first_k_dense_replace num_dense_layers o_groups attn_layer_offset",
    0: "num_kv_shared_layers num_nextn_predict_layers",
}
SIZE_OF = {name: size for size, names in MINIATURE_SIZES.items() for name in names.split()}
LAYER_COUNTS = "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split()


def make_miniature(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The same architecture and vocabulary on the CPU: narrow, with a layer or two of each kind.

    Its float32 weights are random, but seeded, and wide enough that a wrong mask or position shows.
    Windows are short, so that a short row reaches beyond them. Raises ValueError where the
    architecture cannot be made small.
    """
    values = shrink_config(config.to_dict())
    values.pop("quantization_config", None)
    try:
        # ZeRO-3 would part out the weights over the processes
        with torch.random.fork_rng(devices=[]), transformers.modeling_utils.set_zero3_state():
            torch.manual_seed(0)
            small = type(config).from_dict(values)
            model = AutoModelForCausalLM.from_config(
                small, dtype=torch.float32, trust_remote_code=False
            )
            for weight in model.parameters():
                if weight.ndim > 1:
                    torch.nn.init.normal_(weight, std=0.2)
            with torch.no_grad():  # sizes that do not go together may only show here
                model.base_model(input_ids=torch.tensor([[0, 1, 2]]), use_cache=False)
    except Exception as error:  # whatever an architecture makes of sizes that it has never seen
        told = f"a {config.model_type} cannot be made small: {first_line(error)}"
        raise ValueError(told) from error
    return model


def shrink_config(values: dict) -> dict:
    """A configuration, and those inside it, with the sizes of a miniature."""
    small = {}
    for name, value in values.items():
        if isinstance(value, dict):
            small[name] = shrink_config(value)
        else:
            small[name] = shrink_size(value, SIZE_OF.get(name, math.inf))

    shrink_key_heads(values, small)
    cut_rotation(values, small)
    for name in LAYER_COUNTS:
        if isinstance(small.get(name), int):
            keep_layers(small, name)
    return small


def shrink_key_heads(values: dict, small: dict) -> None:
    """As many key heads as query heads where it was so, else two at most."""
    for kind in ("", "swa_"):  # "swa_": of the layers with a window
        heads = values.get(f"{kind}num_attention_heads")
        key_heads = values.get(f"{kind}num_key_value_heads")
        if isinstance(key_heads, int) and key_heads != heads:
            small[f"{kind}num_key_value_heads"] = min(key_heads, 2)
        elif key_heads is not None:
            small[f"{kind}num_key_value_heads"] = small[f"{kind}num_attention_heads"]


def cut_rotation(values: dict, small: dict) -> None:
    """One factor per rotated dimension (LongRoPE), as many as the smaller head has."""
    rotation = small.get("rope_parameters")
    heads = values.get("num_attention_heads")
    if not isinstance(rotation, dict) or heads is None:
        return
    head_size = values.get("head_dim") or values["hidden_size"] // heads
    for name in ("long_factor", "short_factor"):
        factors = rotation.get(name)
        if factors is not None:
            rotation[name] = factors[: len(factors) * SIZE_OF["head_dim"] // head_size]


def shrink_size(value: Any, largest: float) -> Any:
    """A size, or a list with one per layer, of at most `largest`; all else as it is."""
    if isinstance(value, list):
        return [shrink_size(one, largest) for one in value]
    if isinstance(value, int):
        return min(value, largest)
    return value


def keep_layers(small: dict, name: str) -> None:
    """Keep the first layer of each kind, two at least and four at most, and their entries in lists.

    `name` is that of the number of layers.
    """
    layers = small[name]
    lists = {}
    for other, value in small.items():
        if isinstance(value, list) and len(value) == layers:
            lists[other] = value
    overrides = small.get("per_layer_config")  # Gemma 4's {"05": ...}: layers that differ
    if overrides is not None:
        by_number = {int(layer): override for layer, override in overrides.items()}
        lists["per_layer_config"] = [by_number.get(layer) for layer in range(layers)]

    kept = []
    kinds = set()
    for layer in range(layers):
        new_kinds = {(other, str(value[layer])) for other, value in lists.items()} - kinds
        if new_kinds and len(kept) < 4:
            kept.append(layer)
            kinds |= new_kinds
    if len(kept) < 2:  # all of a kind
        kept = list(range(min(layers, 2)))
    small[name] = len(kept)
    for other, value in lists.items():
        small[other] = [value[layer] for layer in kept]
    if overrides is not None:
        entries = enumerate(small["per_layer_config"])
        small["per_layer_config"] = {str(layer): value for layer, value in entries if value}


TRIED_TOKENS = 32  # of a row: more than the windows of a miniature
HEAD_TOLERANCE = 1e-3  # nats; rounding is 1e-6, and what TRL does not know of makes 0.01 and more


@torch.no_grad()
def check_architecture(job: Job, start: Start, preferences: Preferences) -> None:
    """Raise UserError where TRL cannot train the architecture, as its miniature shows. Where there
    is none, nothing is claimed.
    """
    # TRL gathers the head through DeepSpeed, which knows nothing of a miniature
    if is_deepspeed():
        return
    try:
        miniature = make_stand_in(start)
    except Exception:  # whatever an architecture makes of sizes that it has never seen
        return
    kind = start.config.model_type
    pair = preferences.train[0]
    row = torch.tensor([(pair["prompt_ids"] + pair["chosen_ids"])[:TRIED_TOKENS]])
    told = f"{start.source.base_name}: TRL cannot train the type {kind}; take another model"
    with refuse_failures(told):
        add_fused_lm_head(miniature)
        compare_with_trl(miniature, row)
    weight = find_router_weight(job, start.config)
    if weight != 0:
        told = f"router_aux_loss_coef={weight}: TRL has no router loss for the type {kind}"
        with refuse_failures(f"{told}; set it to 0"):
            run_with_trl(miniature, row, output_router_logits=True).aux_loss.item()
    check_adapter(job, start, miniature, row)


def check_adapter(
    job: Job, start: Start, miniature: transformers.PreTrainedModel, row: torch.Tensor
) -> None:
    """Raise UserError where TRL cannot train the adapter, or PEFT would not load it again."""
    try:
        policy = peft.get_peft_model(miniature, choose_lora(job, start)).eval()
    except Exception:  # LoRA has no place in so few layers: the plan tries all of them
        return
    move_weights(policy)
    where = f"lora_target_modules={job.model_args.lora_target_modules}"
    kind = start.config.model_type
    with refuse_failures(f"{where}: TRL cannot train the type {kind} there; name other modules"):
        compare_with_trl(policy, row)
    saved = peft.get_peft_model_state_dict(policy, save_embedding_layers=False)
    lost = peft.set_peft_model_state_dict(policy, saved).unexpected_keys
    if lost:
        raise UserError(
            f"{where}: PEFT would not load the type {kind}'s adapter again; name other modules\n"
            f"  {len(lost)} weights are lost, such as {lost[0]}"
        )


@torch.no_grad()
def move_weights(policy: torch.nn.Module) -> None:
    """Move the trained weights far enough that a loss of them shows; alike in each process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape).to(weight)


@contextlib.contextmanager
def refuse_failures(told: str) -> Iterator[None]:
    """Raise any error as a UserError that says so, with the error's own words."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{told}\n  {type(error).__name__}: {first_line(error)}") from error


def compare_with_trl(model: torch.nn.Module, row: torch.Tensor) -> None:
    """Raise ValueError where a model has other log-probs in TRL than by itself.

    TRL multiplies the last hidden states by the head's weight, and knows of scales and
    soft-capping: it leaves out whatever else there is. The model itself is given only half of the
    row, which tells where tokens see later ones.
    """
    logps = run_with_trl(model, row).log_probs[0]
    ids = row[0, : row.shape[1] // 2 + 1].tolist()
    own = score_tokens(model, [{"prompt_ids": ids[:1], "chosen_ids": ids[1:]}])
    gap = (logps[: len(own)] - own).abs().max().item()
    if not gap <= HEAD_TOLERANCE:  # it may be nan
        raise ValueError(
            f"a miniature's log-probs in TRL are {gap:.2g} nats off its own: TRL leaves out a part "
            "of its head, or its tokens see later ones"
        )


def run_with_trl(
    model: torch.nn.Module, row: torch.Tensor, **options: Any
) -> transformers.utils.ModelOutput:
    """What TRL trains on: log-probs (1, L - 1) of a row (1, L) from its own output head."""
    mask = torch.ones_like(row)
    return model(input_ids=row, attention_mask=mask, labels=row, fused_lm_head=True, **options)


REHEARSED_PAIRS = 8
REHEARSED_TOKENS = 16  # of a prompt, its last; of an answer, its first: seconds on a CPU


def rehearse(job: Job, start: Start, preferences: Preferences) -> None:
    """Run the run in miniature, by its own settings and through its own functions, in a folder
    that is then deleted.

    Raises UserError with a library's own words, where they came, and which setting they may mean.
    """
    began_at = time.monotonic()
    printed = io.StringIO()
    with (
        make_rehearsal_folder(job) as folder,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        obstacle = save_miniature(job, start, folder)
        if obstacle is None:
            small_job = shrink_job(job, start, folder)
            try:
                done = run_miniature(small_job, shorten_preferences(preferences))
            except Exception as error:
                status = getattr(error, "status", 2)
                if status > 128:
                    raise UserError("the rehearsal was interrupted", status) from error
                raise UserError(explain_rehearsal(error, job)) from error
    if obstacle is not None:
        say(*wrap("!", f"not rehearsed: {obstacle}"))
        return
    for line in printed.getvalue().splitlines():
        if line.startswith("! no samples"):
            say(line)
    told = (
        f"in {time.monotonic() - began_at:.0f} s: a miniature with {REHEARSED_PAIRS} pairs cut to "
        f"{REHEARSED_TOKENS} tokens a part, {', '.join(done)}"
    )
    if job.missing_gpu:
        told += "; without a GPU not its kernels, fp16, quantisation, offloading"
    if job.training_args.torch_compile:
        told += "; without torch_compile"
    say(*wrap("rehearsed", told))


@contextlib.contextmanager
def make_rehearsal_folder(job: Job) -> Iterator[Path]:
    """A hidden folder where output_dir is or will be: all processes see it."""
    place = Path(job.training_args.output_dir).absolute()
    while not place.exists():
        place = place.parent
    state = job.training_args.distributed_state
    with contextlib.ExitStack() as held:
        name = None
        if is_main_process():
            name = held.enter_context(tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=place))
        [name] = accelerate.utils.broadcast_object_list([name])
        yield Path(name)
        state.wait_for_everyone()


def save_miniature(job: Job, start: Start, folder: Path) -> str | None:
    """Write base and starting adapter in miniature; returns why that cannot be done, or None."""
    try:
        model = make_miniature(start.config)
        model.name_or_path = str(folder / "base")  # PEFT writes it into the adapter
        if is_main_process():
            model.save_pretrained(folder / "base")
            start.tokenizer.save_pretrained(folder / "base")
        make_room(model, start.tokenizer)
        policy = peft.get_peft_model(model, choose_lora(job, start))
    except Exception as error:  # of an odd architecture, or of LoRA's place in so few layers
        if is_disk_full(error):
            raise
        return first_line(error)
    if start.source.adapter is not None and is_main_process():
        policy.save_pretrained(folder / "start")
        start.tokenizer.save_pretrained(folder / "start")
    job.training_args.distributed_state.wait_for_everyone()
    return None


def shrink_job(job: Job, start: Start, folder: Path) -> Job:
    """The settings for the miniature: two steps of two passes, a checkpoint at each."""
    base = str(folder / "base")
    model_args = copy.copy(job.model_args)
    model_args.model_name_or_path = base
    if start.source.adapter is not None:
        model_args.model_name_or_path = str(folder / "start")
    model_args.model_revision = None
    args = copy.copy(job.training_args)
    args.output_dir = str(folder / "run")
    args.max_steps = 2
    args.gradient_accumulation_steps = 2
    args.per_device_train_batch_size = min(2, args.per_device_train_batch_size)
    args.per_device_eval_batch_size = 2
    args.eval_delay = 0
    for kind, steps in (("logging", 1), ("eval", 2), ("save", 1)):
        setattr(args, f"{kind}_steps", steps)
        strategy = getattr(args, f"{kind}_strategy")
        if strategy != "no":
            setattr(args, f"{kind}_strategy", type(strategy)("steps"))
    args.dataloader_num_workers = min(1, args.dataloader_num_workers)
    args.report_to = []
    args.torch_compile = False
    if job.missing_gpu:
        model_args.load_in_4bit = False
        model_args.load_in_8bit = False
        model_args.attn_implementation = None
        if model_args.dtype == "float16":
            model_args.dtype = "float32"
        args.fp16 = False
        args.activation_offloading = False
        if re.search(OF_BITSANDBYTES, args.optim):
            args.optim = transformers.training_args.OptimizerNames.ADAMW_TORCH
    second_model = None
    if job.settings.ref_model_name_or_path is not None:
        second_model = base
    settings = dataclasses.replace(
        job.settings,
        global_batch_size=2 * args.per_device_train_batch_size * args.world_size,
        ref_model_name_or_path=second_model,
        sample_prompts=min(2, job.settings.sample_prompts),
        dry_run=False,
        overwrite=False,
    )
    return job._replace(settings=settings, model_args=model_args, training_args=args)


def shorten_preferences(preferences: Preferences) -> Preferences:
    """The first pairs: the end of each prompt, and the beginnings of its answers."""
    train = preferences.train.take(REHEARSED_PAIRS).map(shorten_pair, keep_in_memory=True)
    held_out = None
    if preferences.held_out is not None:
        held_out = preferences.held_out.take(2).map(shorten_pair, keep_in_memory=True)
    return Preferences(train, held_out, report=[])


def shorten_pair(pair: dict) -> dict:
    """The columns of a pair with few tokens."""
    pair["prompt_ids"] = pair["prompt_ids"][-REHEARSED_TOKENS:]
    pair["chosen_ids"] = pair["chosen_ids"][:REHEARSED_TOKENS]
    pair["rejected_ids"] = pair["rejected_ids"][:REHEARSED_TOKENS]
    for part in ("prompt", "chosen", "rejected"):
        pair[f"{part}_tokens"] = len(pair[f"{part}_ids"])
    return pair


def run_miniature(job: Job, preferences: Preferences) -> list[str]:
    """What `main` does with weights, broken off after the first step and taken up again; returns
    what was done.
    """
    folder = Path(job.training_args.output_dir)
    start = load_start(job)
    sharing = check_sharing(job, start, preferences)
    with open_output(job, preferences):
        trainer = build_trainer(job, start, preferences, sharing)
        train_policy(trainer, job, preferences)
        if is_main_process():
            shutil.rmtree(folder / "checkpoint-2", ignore_errors=True)  # as if it were not written
    with open_output(job, preferences):
        trainer = build_trainer(job, start, preferences, sharing)
        report = train_policy(trainer, job, preferences)
        if not is_sharded():
            move_weights(trainer.model)  # two steps move them too little for a loss to show
        save_adapter(trainer)
        show_samples(trainer, job)
        save_report(trainer, job, start, report)
    done = ["two steps"]
    if any("eval_loss" in row for row in trainer.state.log_history):
        done.append("evaluation")
    if report.steps_before > 0:
        done += ["checkpoint", "resume"]
    if (folder / "samples.md").exists():
        done.append("samples")
    done.append("saving")
    if not is_sharded():
        compare_saved(trainer, job, preferences)
        done.append("loading")
    if job.settings.merge and is_main_process():
        merge_adapter(job, start, preferences)
        done.append("merging")
    return done


@torch.no_grad()
def compare_saved(trainer: PreferenceTrainer, job: Job, preferences: Preferences) -> None:
    """Raise UserError where another policy is loaded than the one that was trained."""
    source = find_source(job.training_args.output_dir, None)
    saved = load_model(job, source, trainer.processing_class)
    pair = preferences.train.take(1)
    with trainer.accelerator.autocast():
        trained = score_tokens(trainer.model.eval(), pair)
        loaded = score_tokens(saved.eval(), pair)
    gap = (loaded - trained).abs().mean().item()
    is_rounded = trainer.args.bf16 or trainer.args.fp16
    allowed = MERGE_TOLERANCE["bfloat16" if is_rounded else job.model_args.dtype]
    if not gap <= allowed:  # it may be nan
        raise UserError(f"the saved adapter's log-probs are {gap:.2g} nats a token off")


def explain_rehearsal(error: Exception, job: Job) -> str:
    """Where it came and what it says; of a library's error also the settings that it may mean."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame.name for frame in frames if frame.filename == __file__]
    where = ours[min(2, len(ours) - 1)]  # rehearse, run_miniature, and what that called
    told = f"this run would fail, its rehearsal does in {where}: "
    if isinstance(error, UserError):
        return told + str(error)
    told += f"{type(error).__name__}: {first_line(error)}"
    suspects = find_suspects(str(error), job)
    if suspects:
        told += f"\n  it may mean {suspects}"
    return told


def find_suspects(message: str, job: Job) -> str:
    """The settings whose name, its end or its value a message has; else all that were given."""
    words = {word.strip(".") for word in re.findall(r"[\w.-]{2,}", message)}
    values = flat_settings(job)
    for place in ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir"):
        values.pop(place, None)
    names = [name for name in job.origins if name in values]
    given = [name for name in names if not is_constant(name, job.origins)]
    meant = []
    for name in names:
        has_end = any(len(word) > 7 and name.endswith(word) for word in words)
        has_value = words.intersection(re.findall(r"[\w.-]+", str(values[name])))
        if name in words or has_end or has_value:
            meant.append(name)
    suspects = [name for name in meant if name in given] or meant or given
    return ", ".join(f"{job.origins[name]} ({values[name]})" for name in suspects)


# ------------------------------------------------------------------------------------------ insight
LN2 = math.log(2)  # the sigmoid loss where policy and reference are equal
RECENT = 5  # log lines that make "now": fewer are noise, more hide a turn
SIGN_OF_LIFE = 30  # seconds without a line after which an evaluation says how far it is
COLUMNS = {  # metrics of a row on the screen, and their widths: 79 with step, speed and times
    "loss": 9,
    "rewards/margins": 9,
    "rewards/accuracies": 11,
    "rewards/chosen": 9,
    "rewards/rejected": 9,
}
HEADER = f"{'step':>6}" + "".join(
    f"{name.removeprefix('rewards/'):>{width}}" for name, width in COLUMNS.items()
)


class Report(TrainerCallback):
    """What a run shows: a row per log line, metrics.jsonl, rewards.png, advice.

    `stopped` says why the run was stopped, if it was: its adapter is of no use then.
    """

    def __init__(self, trainer: PreferenceTrainer, job: Job) -> None:
        self.job = job
        self.folder = Path(job.training_args.output_dir)
        self.answer_tokens = count_answer_tokens(
            trainer.train_dataset, job.training_args.max_length
        )
        self.stopped: str | None = None
        self.steps_before = 0  # that earlier commands have done of the run
        self.began_at = time.monotonic()  # seconds, as all times here
        # where the speed of the next row is measured from
        self.step_of_last_row = 0
        self.time_of_last_row = self.began_at
        self.passes_evaluated = 0
        self.time_of_last_sign = self.began_at
        self.has_told_end = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and print the head of the table."""
        self.steps_before = state.global_step
        self.began_at = time.monotonic()
        self.step_of_last_row = state.global_step
        self.time_of_last_row = self.began_at
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()  # loading and the proof of sharing had theirs
        say("", f"{HEADER}{'pairs/s':>8}{'elapsed':>9}{'left':>9}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what memory the first step took, which the plan has estimated."""
        is_first = state.global_step == self.steps_before + 1
        if is_first and torch.cuda.is_initialized():
            say(f"       {peak_memory()} at the peak of the first step")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Say how far a long evaluation is."""
        if self.passes_evaluated == 0:
            self.time_of_last_sign = time.monotonic()
        self.passes_evaluated += 1
        if time.monotonic() > self.time_of_last_sign + SIGN_OF_LIFE:
            self.time_of_last_sign = time.monotonic()
            say(f"       evaluation: {self.passes_evaluated} of {len(eval_dataloader)} passes")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out of the speed."""
        self.passes_evaluated = 0
        self.step_of_last_row = state.global_step
        self.time_of_last_row = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Print the row and what it calls for; keep metrics.jsonl and rewards.png up to date."""
        if "train_runtime" in logs:  # the totals at the end
            return
        history = state.log_history
        if "loss" in logs:
            say(format_row(history[-1]) + self.format_times(state))
        if "eval_loss" in logs:
            say(format_row(history[-1]))
        self.advise(state, control)
        if not is_main_process():
            return
        write_metrics(history, self.folder / "metrics.jsonl")
        # a picture takes a second
        if "eval_loss" in logs or len(history) % 20 == 1:
            draw_rewards(history, name_run(self.job), self.folder / "rewards.png")

    def format_times(self, state: transformers.TrainerState) -> str:
        """The end of a row: pairs per second, the time that passed and the time that is left."""
        now = time.monotonic()
        steps = state.global_step - self.step_of_last_row
        seconds = now - self.time_of_last_row
        speed = steps * self.job.settings.global_batch_size / seconds
        self.step_of_last_row = state.global_step
        self.time_of_last_row = now
        elapsed = now - self.began_at
        done = state.global_step - self.steps_before
        left = elapsed / done * (state.max_steps - state.global_step)
        text = f"{speed:8.2f}{format_time(elapsed):>9}{format_time(left):>9}"
        # once, when the estimate has settled, and for runs of more than ten minutes
        if done >= 10 and left > 600 and not self.has_told_end:
            self.has_told_end = True
            text += time.strftime(
                "\n       ends on %a %d %b, %H:%M", time.localtime(time.time() + left)
            )
        return text

    def advise(
        self, state: transformers.TrainerState, control: transformers.TrainerControl
    ) -> None:
        """Say what the log calls for, each kind once; stop a run that destroys the model."""
        trend = read_trend(state, self.job, self.answer_tokens)
        if trend is None:
            return
        where = f"step {state.global_step} of {state.max_steps}"
        for kind, text in find_advice(trend, self.job.training_args).items():
            if kind not in read_advice(state.log_history):
                line = f"! {where}: {text}"
                say(line)
                add_advice(state, {kind: line})
        if is_runaway(trend):
            self.stopped = (
                f"stopped and saved at {where}: loss {trend.loss:.3g} is far worse than "
                f"{trend.untrained:.3g}, the untrained policy's: learning_rate "
                f"{self.job.training_args.learning_rate:g} destroys the model, 5e-6 is usual for "
                "LoRA; change it and add `--overwrite true`"
            )
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the checkpoint of a run that was stopped once more: see Keeper.on_epoch_end."""
        if self.stopped is not None:
            control.should_save = True


def peak_memory() -> str:
    """GPU memory that training took at most so far."""
    return f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB of GPU memory"


def count_answer_tokens(pairs: Dataset, max_length: int | None) -> float:
    """Mean length of the answers after the cut, in tokens."""
    columns = pairs.with_format("numpy")
    answers = np.stack([columns["chosen_tokens"][:], columns["rejected_tokens"][:]])
    if max_length is not None:
        answers = np.minimum(answers, max_length - columns["prompt_tokens"][:])
    return float(answers.mean())


def read_advice(history: list[dict]) -> dict[str, str]:
    """{kind: line} of the advice that stands in a log."""
    advice = {}
    for row in history:
        advice |= row.get("advice", {})
    return advice


def add_advice(state: transformers.TrainerState, advice: dict[str, str]) -> None:
    """Put {kind: line} into the log, which checkpoints and metrics.jsonl keep; each kind once."""
    told = read_advice(state.log_history)
    new = {kind: line for kind, line in advice.items() if kind not in told}
    if new:
        state.log_history.append({"step": state.global_step, "advice": new})


def note_kept_step(trainer: PreferenceTrainer) -> None:
    """Say in the log which step the adapter is of, where the best one was kept."""
    state = trainer.state
    best = state.best_model_checkpoint
    if not trainer.args.load_best_model_at_end or best is None:
        return
    step = int(Path(best).name.removeprefix("checkpoint-"))
    metric = trainer.args.metric_for_best_model.removeprefix("eval_")
    line = f"the adapter is that of step {step}, the best by held-out {metric}"
    row = {"step": state.global_step, "advice": {"kept": line}, "kept_step": step}
    state.log_history.append(row)
    if is_main_process():
        write_metrics(state.log_history, Path(trainer.args.output_dir, "metrics.jsonl"))


def write_metrics(history: list[dict], path: Path) -> None:
    """metrics.jsonl: all log lines, since a resumed run drops those after its checkpoint."""
    lines = []
    for row in history:
        if "train_runtime" in row:
            continue
        kept = {"step": row["step"]}
        for name in sorted(row):
            # times differ from run to run, and TRL counts num_tokens from 0 after each resume
            is_left_out = name.endswith(("_runtime", "_per_second", "_time", "num_tokens"))
            if not is_left_out:
                kept[name] = row[name]
        lines.append(json.dumps(kept) + "\n")
    write_file(path, "".join(lines).encode())


def format_time(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def format_row(row: dict) -> str:
    """The metrics of a log line below HEADER; a held-out one ends in its accuracies' interval."""
    prefix = "eval_" if "eval_loss" in row else ""
    text = f"{row['step']:>6}"
    for name, width in COLUMNS.items():
        value = row[f"{prefix}{name}"]
        form = ".4f" if abs(value) < 100 else ".2g"
        text += f"{value:>{width}{form}}"
    if prefix:
        low = row["eval_rewards/accuracies_low"]
        high = row["eval_rewards/accuracies_high"]
        text += f"  held out, {low:.3f} to {high:.3f}"
    return text


class Trend(NamedTuple):
    """Where a run stands by its last log lines: loss, moved, chosen and accuracy are medians.

    Distances are in nats, as rewards grow with beta.
    """

    total_steps: int
    is_late: bool  # a third of the steps is done, and the warm-up long over
    lines: int  # that the medians are of
    pairs: int  # that the accuracy was seen on
    loss: float
    untrained: float  # loss of a policy that equals the reference; nan where it is not known
    moved: float  # nats per answer from the reference, on the side that moved further
    chosen: float  # nats per token
    accuracy: float
    held_out: list[dict]  # all held-out log lines


def read_trend(state: transformers.TrainerState, job: Job, answer_tokens: float) -> Trend | None:
    """The state of a run, comparable over settings; None before its first log line."""
    args = job.training_args
    rows = [row for row in state.log_history if "loss" in row]
    if not rows:
        return None
    untrained = math.nan
    if rows[0]["step"] == 1:  # it was logged before the first update
        untrained = rows[0]["loss"]
    elif args.loss_type == ["sigmoid"]:
        untrained = LN2
    recent = (rows[1:] or rows)[-RECENT:]
    median = pd.DataFrame(recent).median(numeric_only=True)
    seen_before = rows[-len(recent) - 1]["step"] if len(rows) > len(recent) else 0
    chosen = median["rewards/chosen"] / args.beta
    rejected = median["rewards/rejected"] / args.beta
    warmup_steps = count_warmup_steps(args, state.max_steps)
    return Trend(
        total_steps=state.max_steps,
        is_late=state.global_step >= max(state.max_steps / 3, 2 * warmup_steps),
        lines=len(recent),
        pairs=max(1, recent[-1]["step"] - seen_before) * job.settings.global_batch_size,
        loss=median["loss"],
        untrained=untrained,
        moved=max(abs(chosen), abs(rejected)),
        chosen=chosen / answer_tokens,
        accuracy=median["rewards/accuracies"],
        held_out=[row for row in state.log_history if "eval_loss" in row],
    )


UNMOVED = 0.3  # nats per answer: the odds of chosen over rejected changed by a third at most
FALLEN = -1.0  # nats per token: every token e times less likely; healthy runs stay far above
SOFTER = (
    "SFT first, a smaller learning_rate, a larger beta, or an SFT term "
    "(`loss_type: [sigmoid, sft]`, `loss_weights: [1.0, 0.2]`)"
)


def find_advice(trend: Trend, args: DPOConfig) -> dict[str, str]:
    """{kind: text} of the patterns that have a known cause."""
    found = {}
    accuracy = trend.accuracy
    at_most = accuracy + 1 / math.sqrt(trend.pairs)  # the upper end of its 95% interval
    moved = trend.moved
    if trend.held_out:
        newest = trend.held_out[-1]
        accuracy = newest["eval_rewards/accuracies"]
        at_most = newest["eval_rewards/accuracies_high"]
        moved = max(moved, newest["eval_rewards/margins"] / args.beta)

    has_moved = moved >= UNMOVED
    same_loss = abs(trend.loss - trend.untrained) < 0.01 * abs(trend.untrained)
    if trend.is_late and same_loss and not has_moved:
        cure = (
            f"learning_rate {args.learning_rate:g} is too small for an adapter, try ten times that"
        )
        if trend.total_steps < FEW_STEPS:
            cure = (
                f"{trend.total_steps} steps are too few; a smaller global_batch_size, more epochs"
            )
        found["flat"] = f"loss stays at {trend.loss:.4f}: {cure}"
    if trend.is_late and has_moved and at_most < 0.6:
        found["labels"] = (
            f"accuracies stay at {accuracy:.2f}, {at_most:.2f} at most: are the pairs' sides "
            "swapped, alike or cut off? See `--dry_run true`"
        )
    if trend.chosen < FALLEN:
        found["displacement"] = (
            f"chosen answers, too, lost {-trend.chosen:.1f} nats per token: {SOFTER}"
        )
    if trend.held_out and trend.accuracy > 0.95:
        best = max(trend.held_out, key=lambda row: row["eval_rewards/accuracies"])
        if best["eval_rewards/accuracies"] > at_most:
            found["overfitting"] = (
                f"train accuracies are {trend.accuracy:.2f}, held-out ones fell from "
                f"{best['eval_rewards/accuracies']:.3f} at step {best['step']} to {accuracy:.3f}: "
                "train fewer epochs, or set early_stopping_patience, which keeps the best"
            )
    return found


def is_runaway(trend: Trend) -> bool:
    """Whether the loss is far worse than an untrained policy's, not for one log line alone."""
    return trend.lines >= 3 and trend.untrained > 0 and trend.loss > 3 * trend.untrained


def draw_rewards(history: list[dict], title: str, path: Path) -> None:
    """rewards.png: rewards, margins, accuracies and loss; lines in training, dots held-out."""
    log = pd.DataFrame([row for row in history if "advice" not in row]).set_index("step")
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    names = (
        ["rewards/chosen", "rewards/rejected"],
        ["rewards/margins"],
        ["rewards/accuracies"],
        ["loss"],
    )
    for axes, shown in zip(panels, names):
        for name, line, dot in zip(shown, ("C0-", "C3--"), ("C0o", "C3s")):
            for column, style in ((name, line), (f"eval_{name}", dot)):
                if column in log:
                    log[column].dropna().plot(
                        ax=axes, style=style, label=column, markeredgecolor="k"
                    )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    if "eval_loss" in log:
        bounds = [log[f"eval_rewards/accuracies_{end}"] for end in ("low", "high")]
        panels[2].vlines(log.index, *bounds, color="black")  # the 95% interval
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def name_run(job: Job) -> str:
    """What a picture is of, in one line."""
    model = Path(job.model_args.model_name_or_path).name
    data = ", ".join(Path(name).name for name in name_sources(job))
    args = job.training_args
    return f"{model} on {data}: beta {args.beta:g}, learning rate {args.learning_rate:g}"


# ---- answers
ANSWER_FAULTS = {  # what an answer may do, and how a line on several of them puts it
    "endless": "do not end in time",
    "looping": "repeat themselves",
    "language": "are in another script than the chosen answers",
    "long": "are more than twice as long as the chosen answers",
}
FENCE = "``````"  # longer than those in answers


def show_samples(trainer: PreferenceTrainer, job: Job) -> None:
    """samples.md, three of its samples on the screen, and advice from the answers."""
    if not job.settings.sample_prompts or trainer.eval_dataset is None:
        return
    if is_sharded():
        say("no samples: the model is sharded over processes")
        return
    if not is_main_process():
        return
    pairs = trainer.eval_dataset[: job.settings.sample_prompts]
    prompts = pairs["prompt_ids"]
    policy = trainer.model.eval()
    config = make_generation_config(trainer, prompts)
    reference_adapter = "ref" if "ref" in policy.peft_config else None
    try:
        with use_adapter(policy, reference_adapter):
            reference = trainer.ref_model or policy
            of_reference = generate_answers(trainer, reference, config, prompts)
        of_policy = generate_answers(trainer, policy, config, prompts)
    except (ValueError, RuntimeError) as error:  # settings; memory, or log-probs that are nan
        say(f"! no samples, the model could not generate: {first_line(error)}")
        return

    tokenizer = trainer.processing_class
    advice = find_answer_advice(of_policy, of_reference, pairs["chosen_ids"], config, tokenizer)
    add_advice(trainer.state, advice)
    how = f"{config.max_new_tokens} tokens at most, greedy"
    if config.do_sample:
        how = f"{config.max_new_tokens} tokens at most, sampled as the model's own settings say"
    say("", f"answers to held-out prompts; all {len(prompts)} in samples.md", how)
    parts = [f"# Held-out prompts, answered by reference and policy\n\n{how}\n"]
    parts += [f"\n{line}\n" for line in advice.values()]
    for number, prompt in enumerate(prompts):
        question = decode(tokenizer, prompt)
        by_reference = decode(tokenizer, of_reference[number])
        by_policy = decode(tokenizer, of_policy[number])
        parts += [
            f"\n## {number + 1}\n\n{FENCE}text\n{question}\n{FENCE}\n",
            f"\n**reference**, {len(of_reference[number])} tokens\n",
            f"\n{FENCE}text\n{by_reference}\n{FENCE}\n",
            f"\n**policy**, {len(of_policy[number])} tokens\n",
            f"\n{FENCE}text\n{by_policy}\n{FENCE}\n",
        ]
        if number < 3:
            say("", shorten(f"prompt     {question[-50:].strip()}"))
            say(shorten(f"reference  {by_reference}"), shorten(f"policy     {by_policy}"))
    write_file(Path(job.training_args.output_dir, "samples.md"), "".join(parts).encode())


def make_generation_config(
    trainer: PreferenceTrainer, prompts: list[list[int]]
) -> transformers.GenerationConfig:
    """The model's own settings, with room for answers twice as long as the pairs' own."""
    config = copy.deepcopy(trainer.model.generation_config)
    lengths = np.array(trainer.train_dataset["chosen_tokens"])
    room = np.clip(2 * np.quantile(lengths, 0.95), 64, 1024)
    positions = count_positions(trainer.model.config) - max(len(prompt) for prompt in prompts)
    config.max_new_tokens = int(max(1, min(room, positions)))
    config.max_length = None  # it would be a second limit
    config.use_cache = True  # training has switched it off
    ends = config.eos_token_id or trainer.processing_class.eos_token_id
    config.eos_token_id = np.atleast_1d(ends).tolist()
    config.pad_token_id = trainer.processing_class.pad_token_id
    return config


def generate_answers(
    trainer: PreferenceTrainer,
    model: transformers.PreTrainedModel | peft.PeftModel,
    config: transformers.GenerationConfig,
    prompts: list[list[int]],
) -> list[list[int]]:
    """Tokens of a model's answers, each with its end if any; equal models give equal ones."""
    batch = trainer.processing_class.pad(
        {"input_ids": prompts}, padding_side="left", return_tensors="pt"
    ).to(trainer.args.device)
    transformers.set_seed(trainer.args.seed)
    # eager: a few answers are too little to compile for
    with trainer.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        rows = model.generate(**batch, generation_config=config)
    answers = rows[:, batch["input_ids"].shape[1] :].tolist()
    return [cut_answer(answer, config.eos_token_id) for answer in answers]


def cut_answer(tokens: list[int], ends: list[int]) -> list[int]:
    """An answer without the padding after its end."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


def find_answer_advice(
    policy: list[list[int]],
    reference: list[list[int]],
    chosen: list[list[int]],
    config: transformers.GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, str]:
    """{kind: line} of what the policy's answers do wrong more often than the reference's."""
    count = len(policy)
    of_policy = Counter()
    of_reference = Counter()
    for answer, other, example in zip(policy, reference, chosen):
        of_policy.update(find_answer_faults(answer, example, config, tokenizer))
        of_reference.update(find_answer_faults(other, example, config, tokenizer))
    found = {}
    for kind, what in ANSWER_FAULTS.items():
        if of_policy[kind] - of_reference[kind] >= max(2, count / 4):  # fewer may be chance
            found[kind] = (
                f"! {of_policy[kind]} of {count} answers {what}, {of_reference[kind]} of the "
                f"reference's: {SOFTER}"
            )
    same = sum(answer == other for answer, other in zip(policy, reference))
    if same >= max(2, 3 * count / 4):
        found["unchanged"] = (
            f"! {same} of {count} answers are the reference's, word for word: a larger "
            "learning_rate, more steps, or a smaller beta"
        )
    return found


def find_answer_faults(
    answer: list[int],
    chosen: list[int],
    config: transformers.GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Keys of ANSWER_FAULTS; `chosen` is the pair's answer to the same prompt."""
    faults = []
    if answer[-1] not in config.eos_token_id:
        faults.append("endless")
    if is_loop(answer):
        faults.append("looping")
    script = find_script(decode(tokenizer, answer))
    expected = find_script(decode(tokenizer, chosen))
    if script and expected and script != expected:
        faults.append("language")
    if len(answer) > 2 * len(chosen):
        faults.append("long")
    return faults


def is_loop(tokens: list[int]) -> bool:
    """Whether less than half of the answer's last runs of four tokens are distinct."""
    last = tokens[-100:]  # a loop, once begun, does not end
    runs = list(zip(last, last[1:], last[2:], last[3:]))
    return len(runs) >= 20 and len(set(runs)) < len(runs) / 2


def find_script(text: str) -> str:
    """The script of most letters, such as LATIN or CJK; "" for a text without letters."""
    scripts = Counter()
    for letter in text:
        if letter.isalpha():
            script = unicodedata.name(letter, "").partition(" ")[0]
            scripts[script] += 1
    scripts["CJK"] += scripts.pop("HIRAGANA", 0) + scripts.pop("KATAKANA", 0)  # Japanese mixes them
    script, letters = scripts.most_common(1)[0]
    return script if letters else ""


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Text without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def shorten(text: str) -> str:
    """One line that fits a terminal; Chinese letters are two columns wide."""
    text = text.replace("\n", " ")
    columns = 0
    for place, letter in enumerate(text):
        columns += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if columns > 75:
            return f"{text[:place]} ..."
    return text


# ---- the end of a run
def save_report(trainer: PreferenceTrainer, job: Job, start: Start, report: Report) -> None:
    """The log, rewards.png, the summary on the screen; the model card last: it marks a finished
    run.
    """
    if is_main_process():
        folder = Path(job.training_args.output_dir)
        history = trainer.state.log_history
        write_metrics(history, folder / "metrics.jsonl")
        draw_rewards(history, name_run(job), folder / "rewards.png")
        summary = summarise(trainer, job, report)
        written = "settings.yaml, metrics.jsonl, rewards.png"
        if (folder / "samples.md").exists():
            written += ", samples.md"
        say("", *summary, "", f"written to {folder}:", "adapter, tokenizer, model card,", written)
        is_quantised = getattr(start.config, "quantization_config", None) is not None
        can_be_merged = not is_quantised and not is_sharded()
        if can_be_merged and not job.settings.merge:
            say("`--merge true` with the same command, without overwrite, also merges it")
        card = make_card(job, start, trainer.state.global_step, summary)
        write_file(folder / CARD, card.encode())
    trainer.accelerator.wait_for_everyone()


def summarise(trainer: PreferenceTrainer, job: Job, report: Report) -> list[str]:
    """Steps, speed, held-out figures of the first, the kept and the last step, advice."""
    state = trainer.state
    history = state.log_history
    text = f"{state.global_step} steps of {job.settings.global_batch_size} pairs"
    for row in history:
        if "train_runtime" in row:
            seconds = row["train_runtime"]
            steps = state.global_step - report.steps_before
            speed = steps * job.settings.global_batch_size / seconds
            text += f"; {format_time(seconds)} for the last {steps}, {speed:.2f} pairs/s"
    if torch.cuda.is_initialized():
        text += f", {peak_memory()} at most"
    lines = [text]
    held_out = [row for row in history if "eval_loss" in row]
    if held_out:
        shown = {held_out[0]["step"], held_out[-1]["step"]}
        shown |= {row["kept_step"] for row in history if "kept_step" in row}
        lines += [HEADER, *(format_row(row) for row in held_out if row["step"] in shown)]
    return [*lines, *read_advice(history).values()]


CARD_CODE = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

name = {name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
question = "Why is the sky blue?"
{batch}
output = model.generate(**batch.to(model.device), max_new_tokens=512)
print(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
TEXT_BATCH = 'batch = tokenizer(question, return_tensors="pt")'
CHAT_BATCH = """\
batch = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    enable_thinking=False,  # as in training, for models that can think
    return_dict=True,
    return_tensors="pt",
)"""


def make_card(job: Job, start: Start, steps: int, summary: list[str]) -> str:
    """The model card: the hub's metadata, what was trained on what, how it went, how to use it."""
    args = job.training_args
    data = name_sources(job)
    metadata = huggingface_hub.ModelCardData(
        base_model=None if os.path.isdir(start.source.base_name) else start.source.base_name,
        datasets=[name for name in data if not os.path.exists(name)] or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["dpo", "lora", "trl"],
    )
    origin = f"A LoRA adapter of {link_to(start.source.base_name)}"
    if start.source.adapter is not None:
        origin += f", begun as the adapter {link_to(job.model_args.model_name_or_path)}"
    links = ", ".join(link_to(name, "datasets/") for name in data)
    batch = TEXT_BATCH if start.tokenizer.chat_template is None else CHAT_BATCH
    rows = "rows of any length"
    if args.max_length is not None:
        rows = f"rows of up to {args.max_length} tokens"
    how = (
        f"{steps} steps of {job.settings.global_batch_size} pairs, {rows}, loss "
        f"{', '.join(args.loss_type)}, beta {args.beta:g}, learning rate {args.learning_rate:g} "
        f"({args.lr_scheduler_type.value}), trl {trl.__version__}."
    )
    summary_text = "\n".join(summary)
    return f"""\
---
{metadata.to_yaml()}
---

# {Path(args.output_dir).resolve().name}

{origin}, trained by Direct Preference Optimization (arXiv 2305.18290) on {links}.

{CARD_CODE.format(name=args.output_dir, batch=batch)}

{how}

![rewards, margins, accuracies and loss](rewards.png)

```text
{summary_text}
```

`settings.yaml` has every setting, `metrics.jsonl` every figure.
"""


def link_to(name: str, kind: str = "") -> str:
    """A link to the hub; a local path means nothing to others, and is told as one."""
    if os.path.exists(name):
        return f"`{Path(name).name}` (local)"
    return f"[{name}](https://huggingface.co/{kind}{name})"


# ------------------------------------------------------------------------------------------ the run
MANIFEST = "manifest.json"  # in each whole checkpoint, written last: the digests of its files
CARD = "README.md"  # the model card, written last: it marks a finished run
# of an adapter, in the order in which they get their names: with the last one it is whole
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
# Settings in which a run and its continuation may differ: they change where, how fast and how
# often, not what. The batch per device changes what aot, aot_unpaired and sft compute; it may
# differ all the same, as it is the cure for running out of memory.
MAY_CHANGE = set(
    "output_dir merge sample_prompts share_prefixes use_cpu tf32 torch_compile "
    "torch_compile_backend torch_compile_mode torch_empty_cache_steps gradient_checkpointing "
    "gradient_checkpointing_kwargs activation_offloading precompute_ref_log_probs "
    "precompute_ref_batch_size "
    "per_device_train_batch_size per_device_eval_batch_size eval_accumulation_steps eval_steps "
    "logging_steps save_steps save_total_limit report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id disable_tqdm log_level log_level_replica "
    "log_on_each_node skip_memory_metrics ddp_timeout ddp_backend ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph dataset_num_proc dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor push_to_hub "
    "hub_model_id hub_private_repo hub_revision hub_strategy".split()
)


MADE_FROM = {  # what settings.yaml says of a run beside its settings: how a difference is told
    "pairs": "the training pairs differ",
    "held_out": "the held-out pairs differ",
    "sharding": "sharded by {there} there, {here} here",
}


def digest_pairs(pairs: Dataset) -> str:
    """The same for the same pairs in the same order."""
    hashes = np.array(pairs["pair_hash"])
    return hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest()


def describe_run(job: Job, preferences: Preferences) -> dict[str, Any]:
    """What makes the run what it is, under the names of settings.yaml."""
    held_out = "none"
    if preferences.held_out is not None:
        held_out = digest_pairs(preferences.held_out)
    sharding = "none"
    if is_switched_on("ACCELERATE_USE_FSDP"):
        sharding = "fsdp"
    elif is_switched_on("ACCELERATE_USE_DEEPSPEED"):
        sharding = "deepspeed"
    made = {
        "pairs": digest_pairs(preferences.train),
        "held_out": held_out,
        "sharding": sharding,
    }
    return flat_settings(job) | {"made_from": made}


def write_settings(job: Job, preferences: Preferences) -> None:
    """settings.yaml: the run can be repeated from it, and a later command compared with it."""
    libraries = (torch, transformers, trl, peft, datasets)
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    text = yaml.safe_dump(describe_run(job, preferences), allow_unicode=True, sort_keys=True)
    write_file(
        Path(job.training_args.output_dir, "settings.yaml"),
        f"# made with {versions}\n{text}".encode(),
    )


def find_stranger(folder: Path) -> str:
    """A file in a folder that holds no run of this program; "" if it does, or is empty."""
    names = [path.name for path in folder.glob("[!.]*") if path.suffix != ".tmp"]
    if not names or "settings.yaml" in names:
        return ""
    return min(names)


def find_differences(job: Job, preferences: Preferences) -> list[str]:
    """Where the run in output_dir is not this one, as lines; none where there is no run."""
    folder = Path(job.training_args.output_dir)
    settings = folder / "settings.yaml"
    if not settings.exists():
        return []
    try:
        there = yaml.safe_load(settings.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        there = None
    if not isinstance(there, dict):
        return ["its settings.yaml is damaged"]
    here = yaml.safe_load(yaml.safe_dump(describe_run(job, preferences)))
    made_there = there.pop("made_from", {})
    made_here = here.pop("made_from")
    if (folder / CARD).exists():  # how the model was split matters to checkpoints alone
        del made_here["sharding"]
    may_change = MAY_CHANGE
    if find_comparing(job):
        may_change = MAY_CHANGE - {"eval_steps"}
    differences = []
    for name in sorted((there.keys() | here.keys()) - may_change):
        if there.get(name) != here.get(name):
            differences.append(f"{name}: {there.get(name)} there, {here.get(name)} here")
    for name in sorted(made_there.keys() & made_here.keys()):  # an older file may lack one
        if made_there[name] != made_here[name]:
            told = MADE_FROM[name].format(there=made_there[name], here=made_here[name])
            differences.append(told)
    return differences


def refuse_other_run(job: Job, preferences: Preferences) -> None:
    """Raise UserError where output_dir holds something else than this run and may not be moved."""
    folder = Path(job.training_args.output_dir)
    stranger = find_stranger(folder)
    if stranger:
        raise UserError(
            f"output_dir={folder} holds files that are no run of this program, such as {stranger}: "
            "choose another"
        )
    differences = find_differences(job, preferences)
    if differences and not job.settings.overwrite:
        advice = "choose another, or `--overwrite true`, which moves the old one aside"
        told = f"output_dir={folder} holds another run: {advice}"
        raise UserError("\n  ".join([told, *differences]))


@contextlib.contextmanager
def open_output(job: Job, preferences: Preferences) -> Iterator[bool]:
    """Hold output_dir for this run, and yield whether the run in it is this one, finished.

    Another run is refused; with `overwrite` it, and a finished one, are moved aside. An unfinished
    run of the same settings is continued either way. Files of somebody else are always refused.
    """
    folder = Path(job.training_args.output_dir).resolve()  # a link to another disk stays one
    state = job.training_args.distributed_state
    refuse_other_run(job, preferences)  # all processes, so that none waits for one that ended
    state.wait_for_everyone()  # until all have looked: what is there may be moved next
    with contextlib.ExitStack() as held:
        if is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(folder / ".lock", blocking=False))
            except Timeout:
                told = f"output_dir={folder}: another run is writing there; wait, or choose another"
                raise UserError(told) from None
            is_in_the_way = find_differences(job, preferences) or (folder / CARD).exists()
            if job.settings.overwrite and is_in_the_way:
                say(f"the earlier run was moved to {move_aside(folder)}")
        state.wait_for_everyone()
        is_finished = (folder / CARD).exists()
        if is_finished:
            say(f"{folder}: finished, nothing to train (`--overwrite true` trains again)")
        yield is_finished


def move_aside(folder: Path) -> Path:
    """Move what a folder holds, but for its lock, into a new folder beside it.

    What says that a run is there, and finished, goes last: an interruption leaves it what it was.
    """
    aside = folder.with_name(f"{folder.name}-old-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        aside.mkdir()
        names = [path.name for path in folder.iterdir()]
        marks = [name for name in (CARD, "settings.yaml") if name in names]
        others = [name for name in names if name not in (*marks, ".lock")]
        for name in [*others, *marks]:
            shutil.move(folder / name, aside)  # copies where the folder is a mount of its own
    except OSError as error:
        raise UserError(f"output_dir={folder} cannot be moved to {aside}: {error}") from error
    return aside


def digest_files(folder: Path) -> dict[str, str]:
    """{file: digest} of what is in a checkpoint, but for its manifest."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, hashlib.blake2b)
            digests[str(path.relative_to(folder))] = digest.hexdigest()
    return digests


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there that the manifest lists, as it was written."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError):  # no manifest, or a damaged one
        return False
    return listed.items() <= digest_files(checkpoint).items()


def find_checkpoint(trainer: PreferenceTrainer) -> str | None:
    """The newest whole checkpoint; those that are not whole are set aside."""
    folder = Path(trainer.args.output_dir)
    if is_main_process():
        for checkpoint in folder.glob("checkpoint-*"):
            if not is_whole(checkpoint):
                aside = folder / f"incomplete-{checkpoint.name}-{time.strftime('%Y%m%d-%H%M%S')}"
                checkpoint.rename(aside)
                say(f"! {checkpoint.name} is not whole: moved to {aside.name}")
    trainer.accelerator.wait_for_everyone()
    return transformers.trainer_utils.get_last_checkpoint(folder)


class Keeper(TrainerCallback):
    """Keeps the run: a log line with each checkpoint, a manifest in it, and an orderly end on
    SIGTERM or Ctrl-C.

    The first signal lets all processes finish the step, save and stop; another one ends the program
    at once. `saved` is the state that the run continues from.
    """

    def __init__(
        self, trainer: PreferenceTrainer, saved: transformers.TrainerState | None = None
    ) -> None:
        self.trainer = trainer
        self.saved = saved
        # not looked up on the disk, which processes may see at different times
        self.saved_step: int | None = None
        self.heard: int | None = None  # the first signal
        self.heard_at = 0.0  # seconds

    def hear(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        # sooner than this it is the first one again, passed on by a launcher
        is_another = self.heard is not None and time.monotonic() > self.heard_at + 1
        if is_another:
            os._exit(128 + number)
        if self.heard is None:
            self.heard = number
            self.heard_at = time.monotonic()
            # print is not safe here: the signal may have come in the middle of one
            os.write(2, b"\ndpotrainer: stopping after this step; again: at once, unsaved\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep to this command's eval_steps and its like, and to where output_dir is now: a
        checkpoint brings others.
        """
        state.compute_steps(args, state.max_steps)
        if self.saved is not None:
            state.best_model_checkpoint = self.saved.best_model_checkpoint
            state.best_metric = self.saved.best_metric
            state.best_global_step = self.saved.best_global_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the order of the pairs: where several processes resume within an epoch, Trainer does
        not find the sampler in accelerate's wrappings.
        """
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before a gradient that is not finite gets into the weights."""
        scaler_skips_overflows = self.trainer.accelerator.scaler is not None
        gradients = [
            weight.grad for weight in self.trainer.model.parameters() if weight.grad is not None
        ]
        if scaler_skips_overflows or not gradients:  # DeepSpeed keeps its gradients to itself
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise UserError(self.trainer.explain_overflow("gradient"), status=1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where a process has heard a signal; log wherever a checkpoint may be written, and at
        the last step.
        """
        self.stop_if_asked(control)
        # it is the evaluation that tells whether this step is the best, and saved
        may_be_best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        if may_be_best or control.should_save or control.should_training_stop:
            control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the checkpoint count."""
        self.trainer.accelerator.wait_for_everyone()
        if is_main_process():
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            write_file(folder / MANIFEST, json.dumps(digest_files(folder), indent=1).encode())
        self.saved_step = state.global_step
        self.stop_if_asked(control)  # a signal may have come in the evaluation since

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what a stop has left unsaved: in a step that evaluates, `save_strategy: best` saves
        the best alone, and a signal may come too late for the step's own checkpoint.

        Trainer comes here after every stop, and saves if it is asked to.
        """
        self.stop_if_asked(control)
        if self.saved_step == state.global_step:
            control.should_save = False
        if control.should_save:
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the program with the signal's status, if the run is saved.

        A signal that came later than that waits until the adapter is saved, and is forgotten.
        """
        self.stop_if_asked(control)
        if self.heard is not None and self.saved_step == state.global_step:
            told = f"saved at step {state.global_step}; the same command continues"
            raise UserError(told, status=128 + self.heard)

    def stop_if_asked(self, control: transformers.TrainerControl) -> None:
        """Save and stop if any process has heard a signal: not all do, or not at the same step."""
        if self.heard is not None:
            self.trainer.accelerator.set_trigger()
        if self.trainer.accelerator.check_trigger():
            self.heard = self.heard or signal.SIGTERM
            control.should_save = True
            control.should_training_stop = True


def train_policy(trainer: PreferenceTrainer, job: Job, preferences: Preferences) -> Report:
    """Train from the newest whole checkpoint to the end, or to a signal."""
    folder = Path(trainer.args.output_dir)
    checkpoint = find_checkpoint(trainer)
    if is_main_process():
        write_settings(job, preferences)  # from here on, the folder is this run's
    saved = None if checkpoint is None else read_state(checkpoint)
    trained_in = load_trained(trainer, checkpoint, saved)
    trainer.accelerator.wait_for_everyone()  # until all have looked: an adapter may be placed next
    report = Report(trainer, job)
    if trained_in is None:
        train_from(checkpoint, saved, trainer, job, report)
    else:
        report.advise(trainer.state, trainer.control)  # a run that was stopped stays so
    if report.stopped is not None:
        raise UserError(report.stopped, status=1)
    note_kept_step(trainer)
    if trained_in is not None and trained_in != folder:
        place_adapter(trained_in, trainer)
    return report


def train_from(
    checkpoint: str | None,
    saved: transformers.TrainerState | None,
    trainer: PreferenceTrainer,
    job: Job,
    report: Report,
) -> None:
    """Train with the callbacks and signal handlers of a run."""
    keeper = Keeper(trainer, saved)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.add_callback(report)
    trainer.add_callback(keeper)
    if job.settings.early_stopping_patience is not None:
        trainer.add_callback(
            transformers.EarlyStoppingCallback(job.settings.early_stopping_patience)
        )
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
        trainer.args.eval_on_start = False
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, keeper.hear)
    try:
        # PEFT casts the inputs of LoRA up and autocast casts them down again: lossless, not free
        casts_twice = trainer.args.bf16 and trainer.args.device.type == "cuda"
        with peft.helpers.disable_input_dtype_casting(trainer.model, active=casts_twice):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_trained(
    trainer: PreferenceTrainer, checkpoint: str | None, saved: transformers.TrainerState | None
) -> Path | None:
    """Take up log and adapter of a run that is trained but has no card yet.

    Returns the folder that the adapter is in: output_dir, or a checkpoint that it is still to be
    copied from. None if there is more to train.
    """
    folder = Path(trainer.args.output_dir)
    if has_adapter(folder):
        state = read_log(folder)  # the newest checkpoint may be of an earlier step
        source = folder
    elif saved is not None and is_at_end(saved):
        state = saved
        source = Path(checkpoint)
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            source = Path(state.best_model_checkpoint)
    else:
        return None
    say(f"the run is trained already; taking up the adapter in {source}")
    trainer.state = state
    if not is_sharded():  # only the samples need it, and a sharded model makes none
        trainer.model.load_adapter(str(source), "default", is_trainable=True)
    return source


def read_state(checkpoint: str) -> transformers.TrainerState:
    """Steps and log of a checkpoint; output_dir may have been moved since it noted the best one."""
    state = transformers.TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    if state.best_model_checkpoint is not None:
        best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)
        state.best_model_checkpoint = str(best)
        if not best.exists():  # the best of what is still to come counts
            say(f"! {best.name}, the best so far, is gone; a later one is kept")
            state.best_model_checkpoint = None
            state.best_metric = None
            state.best_global_step = None
    return state


def read_log(folder: Path) -> transformers.TrainerState:
    """Steps and log of a trained run, from metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    last_step = history[-1]["step"]
    return transformers.TrainerState(
        log_history=history, global_step=last_step, max_steps=last_step
    )


def is_at_end(state: transformers.TrainerState) -> bool:
    """Whether training had come to its end: by its steps, or early."""
    if state.global_step >= state.max_steps:
        return True
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
    if stopping is None:
        return False
    without_better = stopping["attributes"]["early_stopping_patience_counter"]
    return without_better >= stopping["args"]["early_stopping_patience"]


def has_adapter(folder: Path) -> bool:
    """Whether a run has saved its adapter: its training had come to its end."""
    return all((folder / name).exists() for name in ADAPTER_FILES)


def save_adapter(trainer: PreferenceTrainer) -> None:
    """The adapter with its tokenizer in output_dir, unless it was taken up and is there."""
    folder = Path(trainer.args.output_dir)
    draft = folder / "adapter.tmp"
    is_there = has_adapter(folder)
    trainer.accelerator.wait_for_everyone()  # until all have looked
    if not is_there:
        trainer.save_model(str(draft))
        place_adapter(draft, trainer)
    if is_main_process():
        shutil.rmtree(draft, ignore_errors=True)


def place_adapter(source: Path, trainer: PreferenceTrainer) -> None:
    """Copy an adapter into output_dir, with the tokenizer: whole, or not there."""
    if is_main_process():
        folder = Path(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(folder)
        for name in ADAPTER_FILES:
            draft = folder / f"{name}.tmp"
            shutil.copyfile(source / name, draft)
            os.replace(draft, folder / name)
    trainer.accelerator.wait_for_everyone()


def push_run(job: Job) -> None:
    """Upload output_dir, without checkpoints and merged/, to the hub as `hub_model_id`.

    Raises UserError where the hub does not take it.
    """
    args = job.training_args
    folder = Path(args.output_dir)
    name = name_repository(args.hub_model_id, args.output_dir)
    left_out = ["checkpoint-*", "incomplete-*", "merged/*", ".*", "*.tmp", "*.tmp/*"]
    api = huggingface_hub.HfApi()  # the token is the environment's or `hf auth login`'s
    try:
        repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True)
        if args.hub_revision is not None:
            api.create_branch(repository.repo_id, branch=args.hub_revision, exist_ok=True)
        card = (folder / CARD).read_text("utf-8")
        card = re.sub(r"^name = .*$", f"name = {repository.repo_id!r}", card, flags=re.MULTILINE)
        write_file(folder / CARD, card.encode())
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            revision=args.hub_revision,
            ignore_patterns=left_out,
        )
    except Exception as error:  # of the hub or of the network; they have no class in common
        told = f"push_to_hub=true, {name}: {first_line(error)}"
        advice = (
            f"the run is finished, the same command without overwrite uploads it; {UPLOAD_LATER}"
        )
        raise UserError(f"{told}; {advice}", status=1) from error
    say(f"uploaded to {repository}")


MERGE_PAIRS = 8  # compared before and after
# nats per token that rounding may cost
MERGE_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}


def merge_adapter(job: Job, start: Start, preferences: Preferences) -> None:
    """Write the merged model; UserError where that cannot be done, or the GPU has no room."""
    try:
        write_merged(job, start, preferences)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"merge=true: the GPU has no room for the whole model in {job.model_args.dtype}. The "
            "adapter is saved: merge with `--use_cpu true` or on a larger GPU, without overwrite",
            status=1,
        ) from error


@torch.no_grad()
def write_merged(job: Job, start: Start, preferences: Preferences) -> None:
    """The full model in output_dir/merged: base plus adapter, with the tokenizer, reloaded and
    compared before it counts.

    Raises UserError where the merged model differs from base plus adapter by more than the dtype's
    rounding.
    """
    gc.collect()  # a trainer is held by its callbacks, and they by the trainer
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    folder = Path(job.training_args.output_dir)
    draft = folder / "merged.tmp"
    base = load_causal_lm(job, start.source.base_name, start.source.base_revision, quantize=False)
    make_room(base, start.tokenizer)
    policy = load_with_adapter(base, str(folder), None).eval()
    pairs = (preferences.held_out or preferences.train).take(MERGE_PAIRS)
    max_length = job.training_args.max_length
    expected = score_tokens(policy, pairs, max_length)
    merged = policy.merge_and_unload()
    merged.save_pretrained(draft)
    start.tokenizer.save_pretrained(draft)
    del base, policy, merged
    merged = load_causal_lm(job, str(draft), None, quantize=False).eval()
    found = score_tokens(merged, pairs, max_length)
    gap = (found - expected).abs().mean().item()
    if not gap <= MERGE_TOLERANCE[job.model_args.dtype]:  # not `>`: it may be nan
        shutil.rmtree(draft)
        raise UserError(
            f"merge=true: the merged model's log-probs are {gap:.2g} nats a token off, more than "
            "rounding: an adapter on tied embeddings or a quantised base cannot be merged; the "
            "adapter itself is whole",
            status=1,
        )
    target = folder / "merged"
    if target.exists():
        shutil.rmtree(target)
    draft.rename(target)
    say(f"merged into {target}; log-probs differ by {gap:.1g} nats a token from base plus adapter")


def score_tokens(
    model: torch.nn.Module, pairs: Dataset | list[dict], max_length: int | None = None
) -> torch.Tensor:
    """Log-probs of all tokens of the chosen answers after the cut, one after the other, in nats."""
    logps = []
    for pair in pairs:
        prompt = pair["prompt_ids"]
        ids = (prompt + pair["chosen_ids"])[:max_length]
        row = torch.tensor([ids], device=model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        answer = row[0, len(prompt) :, None]
        logps.append(logits.float().log_softmax(-1).gather(1, answer)[:, 0].cpu())
    return torch.cat(logps)


# ---------------------------------------------------------------------------------- shared prefixes
# A pair is two rows with the same beginning. TRL runs both, each padded to the longest of the
# batch. Here every distinct token of a batch runs once, without padding, in one packed row: all of
# chosen, then what is left of rejected (its tail), pair after pair. Positions go back to where it
# branches:
#
#     chosen     the cat sat down .        packed row   the cat sat down .   ran off | next pair
#     rejected   the cat ran off           position       0   1   2    3 4     2   3 |   0 ...
#
# B pairs make 2B sequences. The queries of a sequence stand together in the packed row; its keys
# are gathered, prefix first, by one index:
#
#     sequence   queries                   keys
#     chosen     the cat sat down .        the cat sat down .
#     rejected   ran off                   the cat ran off
#
# The last query sees all keys of its sequence, the one before it all but the last: causal
# attention, aligned at the bottom right. Keys stand in order, so that a sliding window is just a
# window. The hidden states go back into the padded batch, from which TRL computes losses and
# metrics as ever.
PLAIN_LAYERS = {"full_attention", "attention", "sliding_attention"}  # "attention": Granite 4's name
UNKNOWN_TO_PACKED = {"softcap": "soft-capping", "s_aux": "sinks", "position_bias": "a bias"}
PROOF_PROMPT = 1536  # tokens that a proof keeps of a prompt, its last ones
PROOF_ANSWER = 512  # tokens that a proof keeps of an answer, its first ones
PROOF_LOGPS = 128  # log-probs that a proof compares, spread over all answers
MINIATURE_TOLERANCE = 1e-5  # nats, largest difference in float32
PROOF_TOLERANCE = {"float32": 1e-4, "half": 0.02}  # nats, mean, on top of what padding changes
KNOWS_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.10's has none


@dataclass
class Sharing:
    """Whether the common prefixes are shared, and how that was checked."""

    is_used: bool
    line: str  # "shared, checked: log-probs differ by 2e-06", or "rows apart: <reason>"


def rows_apart(reason: str) -> Sharing:
    """Prefixes are not shared, and why."""
    return Sharing(False, f"rows apart: {reason}")


def check_sharing(job: Job, start: Start, preferences: Preferences) -> Sharing:
    """Before any weight is read: settings, architecture, then a miniature of it, both ways.

    In float32, where a wrong mask or position cannot hide in rounding.
    """
    reasons = find_reasons_against_sharing(job, start.config)
    if reasons:
        return rows_apart("; ".join(reasons))
    batch = make_proof_batch(job, start, preferences)
    try:
        miniature = make_stand_in(start)
        padded = score_answers(miniature, batch, run_backbone(miniature, batch))
        share_prefixes(miniature)
        packed = score_answers(miniature, batch, run_backbone(miniature, batch, batch["layout"]))
    except Exception as error:  # whatever it is, rows apart do without
        is_ours = isinstance(error, ValueError)  # mostly: the attention, or no miniature
        what = "" if is_ours else "a miniature of the model fails: "
        return rows_apart(what + first_line(error))
    difference = (packed - padded).abs().max().item()
    is_exact = difference <= MINIATURE_TOLERANCE  # not if it is not a number
    if not is_exact:
        return rows_apart(f"log-probs of a miniature of the model differ by {difference:.1g}")
    return Sharing(True, f"shared, checked: log-probs differ by {difference:.0e}")


def make_stand_in(start: Start) -> transformers.PreTrainedModel:
    """A miniature in evaluation mode, with room for the tokens that SFT added."""
    miniature = make_miniature(start.config).eval()
    make_room(miniature, start.tokenizer)
    return miniature


def share_where_proven(
    models: list[torch.nn.Module], job: Job, start: Start, preferences: Preferences
) -> Sharing:
    """Share the prefixes of policy and reference if both are exact with it, else of neither."""
    causal_lms = []
    for model in models:
        is_wrapped = isinstance(model, peft.PeftModel)
        causal_lms.append(model.get_base_model() if is_wrapped else model)
    sharing_already = []
    for causal_lm in causal_lms:
        sharing = prove_sharing(causal_lm, job, start, preferences)
        if not sharing.is_used:
            for other in sharing_already:
                stop_sharing(other)
            return sharing
        sharing_already.append(causal_lm)
    return sharing


def prove_sharing(
    model: transformers.PreTrainedModel, job: Job, start: Start, preferences: Preferences
) -> Sharing:
    """Share the prefixes of a causal LM if that is exact on its own device and in its own dtype.

    Log-probs, by their mean over tokens, may differ by little more than padding alone changes.
    """
    autocast = None
    if job.training_args.bf16:
        autocast = torch.bfloat16
    elif job.training_args.fp16:
        autocast = torch.float16
    is_half = autocast is not None or model.dtype != torch.float32
    was_training = model.training
    model.eval()
    try:
        proven = model
        if is_sharded():  # no process has the model in one piece: a miniature stands in for it
            proven = make_stand_in(start).to(job.training_args.device, model.dtype)
        batch = make_proof_batch(job, start, preferences)
        batch = accelerate.utils.send_to_device(batch, proven.device)
        with torch.autocast(proven.device.type, autocast, enabled=autocast is not None):
            padded = score_answers(proven, batch, run_backbone(proven, batch))
            unpadded = score_answers(proven, batch, run_rows_alone(proven, batch))
            share_prefixes(proven)
            packed = score_answers(proven, batch, run_backbone(proven, batch, batch["layout"]))
        if proven is not model:
            share_prefixes(model)
    except Exception as error:  # whatever it is, rows apart do without
        stop_sharing(model)
        return rows_apart(f"{type(error).__name__}: {first_line(error)}")
    finally:
        model.train(was_training)

    difference = (packed - padded).abs().mean().item()
    by_padding = (unpadded - padded).abs().mean().item()
    allowed = 3 * by_padding + PROOF_TOLERANCE["half" if is_half else "float32"]
    is_exact = difference <= allowed  # not if it is not a number
    if not is_exact:
        stop_sharing(model)
        return rows_apart(
            f"log-probs differ by {difference:.1g}, where {allowed:.1g} may be rounding"
        )
    return Sharing(True, f"shared, checked: log-probs differ by {difference:.0e}")


def find_reasons_against_sharing(job: Job, config: transformers.PretrainedConfig) -> list[str]:
    """What plainly forbids it; all else is for the proof."""
    reasons = []
    if not job.settings.share_prefixes:
        reasons.append("`share_prefixes: false` asks for it")
    if job.model_args.attn_implementation is not None:
        reasons.append("`attn_implementation` asks for another attention")
    text = config.get_text_config()
    other_layers = set(getattr(text, "layer_types", None) or []) - PLAIN_LAYERS
    if other_layers:
        reasons.append(f"some layers are of another kind ({', '.join(sorted(other_layers))})")
    dropout = getattr(text, "attention_dropout", 0) or getattr(text, "attn_pdrop", 0)
    if dropout and not job.training_args.disable_dropout:
        reasons.append("`disable_dropout: false` keeps the dropout of its attention")
    if find_router_weight(job, config) != 0:
        reasons.append("its router loss counts the tokens of both rows")
    return reasons


def make_proof_batch(job: Job, start: Start, preferences: Preferences) -> dict:
    """The pairs with the shortest and with the longest prompt; lengths are those of training, as
    some architectures change beyond a length.
    """
    prompt_tokens = np.array(preferences.train["prompt_tokens"])
    pairs = []
    for number in (prompt_tokens.argmin(), prompt_tokens.argmax()):
        pair = preferences.train[int(number)]
        pairs.append(
            {
                "prompt_ids": pair["prompt_ids"][-PROOF_PROMPT:],
                "chosen_ids": pair["chosen_ids"][:PROOF_ANSWER],
                "rejected_ids": pair["rejected_ids"][:PROOF_ANSWER],
            }
        )
    collate = SharedPrefixCollator(start.tokenizer.pad_token_id, job.training_args.max_length)
    return collate(pairs)


@torch.no_grad()
def run_backbone(model: torch.nn.Module, batch: dict, layout: dict | None = None) -> torch.Tensor:
    """Hidden states of the padded batch, (2B, L, H); with its layout, by way of the packed row."""
    more = {} if layout is None else {"layout": layout}
    output = model.base_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        **more,
    )
    return output.last_hidden_state


def run_rows_alone(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """The same, row by row without padding; zero where there would be some."""
    width = batch["input_ids"].shape[1]
    rows = []
    for number, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        row = {
            name: batch[name][number : number + 1, :length]
            for name in ("input_ids", "attention_mask")
        }
        rows.append(pad(run_backbone(model, row), (0, 0, 0, width - length)))
    return torch.cat(rows)


@torch.no_grad()
def score_answers(model: torch.nn.Module, batch: dict, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probs of some of the answers' tokens, (N,) in nats, from hidden states (2B, L, H)."""
    answers = batch["completion_mask"][:, 1:].nonzero()
    step = len(answers) // PROOF_LOGPS + 1
    rows, columns = answers[::step].unbind(dim=1)
    logits = model.get_output_embeddings()(hidden[rows, columns])
    targets = batch["input_ids"][rows, columns + 1]
    return logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


class SharedPrefixCollator(DataCollatorForPreference):
    """TRL's collator for pairs; its batches carry the layout of the packed row."""

    def torch_call(self, examples: list[dict]) -> dict:
        """The padded batch with its layout."""
        batch = super().torch_call(examples)
        batch["layout"] = lay_out_packed_row(batch["input_ids"], batch["attention_mask"])
        return batch


def lay_out_packed_row(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
    """Lay out B pairs, given as ids and mask (2B, L) on the CPU, padded on the right.

    Rejected of row i is row B + i. T tokens in the packed row have K keys in all their sequences.
    Numbers that the host needs are integers: reading them never waits for the GPU.
    """
    pairs = input_ids.shape[0] // 2
    length = input_ids.shape[1]
    chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    # sequences as they stand in the packed row: chosen 0, rejected 0, chosen 1, rejected 1, ...
    order = torch.arange(2 * pairs).view(2, pairs).T.flatten()
    ids = input_ids[order]
    is_token = attention_mask[order].bool()

    # the longest run of equal tokens from the left, but the last token of the shorter row: every
    # rejected row has a tail
    most = is_token.sum(dim=1).view(pairs, 2).amin(dim=1, keepdim=True) - 1
    is_equal = (ids[chosen] == ids[rejected]) & (torch.arange(length) < most)
    is_shared = is_equal.cumprod(dim=1).bool()  # (B, L)
    is_packed = is_token.clone()
    is_packed[rejected] &= ~is_shared
    tokens = int(is_packed.sum())

    # Where each place of the padded batch finds its hidden state. Padding is never scored; spread
    # over the row, its zero gradients do not all queue up at one token.
    place = torch.arange(2 * pairs * length).remainder(tokens).view(2 * pairs, length)
    place[is_packed] = torch.arange(tokens)
    place[rejected][is_shared] = place[chosen][is_shared]  # rejected is a slice: this is no copy

    queries = is_packed.sum(dim=1)
    keys = is_token.sum(dim=1)
    return {
        "input_ids": ids[is_packed][None],  # (1, T)
        "position_ids": is_packed.nonzero()[:, 1][None],  # (1, T)
        "key_index": place[is_token],  # (K,) where in the packed row the keys stand
        "row_index": place[order.argsort()],  # (2B, L), the padded batch in TRL's order
        "query_bounds": pad(queries.cumsum(0), (1, 0)).int(),  # (2B + 1,) of the sequences
        "key_bounds": pad(keys.cumsum(0), (1, 0)).int(),
        "query_lengths": queries.tolist(),
        "key_lengths": keys.tolist(),
    }


def share_prefixes(model: transformers.PreTrainedModel) -> None:
    """Let a causal LM, never its PeftModel, run batches that carry a layout as one packed row.

    Raises ValueError where its attention cannot be replaced. Batches without a layout run as
    before.
    """
    if not model.is_backend_compatible():
        raise ValueError("its attention cannot be replaced from outside")
    transformers.AttentionInterface.register("shared_prefixes", attend_packed_row)
    stock_mask = transformers.AttentionMaskInterface()["sdpa"]
    transformers.AttentionMaskInterface.register("shared_prefixes", stock_mask)
    model.set_attn_implementation("shared_prefixes")
    model.base_model.register_forward_pre_hook(pack_batch, with_kwargs=True)
    model.base_model.register_forward_hook(unpack_hidden_states, with_kwargs=True)


def stop_sharing(model: transformers.PreTrainedModel) -> None:
    """Undo share_prefixes: the hooks that stay do nothing to batches without a layout."""
    model.set_attn_implementation(model.get_correct_attn_implementation(None))


def pack_batch(backbone: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Put the packed row in place of the padded batch; the layout goes down to every attention."""
    layout = kwargs.pop("layout", None)
    if layout is not None:
        kwargs["input_ids"] = layout["input_ids"]
        kwargs["position_ids"] = layout["position_ids"]
        kwargs["shared_prefixes"] = layout
        # transformers hands a 4-D mask on as it is, and our attention does not read it: any will do
        kwargs["attention_mask"] = layout["input_ids"][None, None]
    return args, kwargs


def unpack_hidden_states(
    backbone: torch.nn.Module, args: tuple, kwargs: dict, output: transformers.utils.ModelOutput
) -> transformers.utils.ModelOutput:
    """Hidden states (1, T, H) of the packed row to the padded (2B, L, H) that TRL expects."""
    layout = kwargs.pop("shared_prefixes", None)
    if layout is not None:
        row_index = layout["row_index"]
        hidden = output.last_hidden_state[0].index_select(0, row_index.flatten())
        output.last_hidden_state = hidden.view(*row_index.shape, -1)
    return output


@torch.compiler.disable
def attend_packed_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prefixes: dict | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row: query (1, Hq, T, D), key and value (1, Hkv, T, D) to (1, T, Hq,
    D).

    Calls without a layout, such as those of generation, go to SDPA as they came. Raises ValueError
    for what the layer asks for beyond scale and window.
    """
    if shared_prefixes is None:
        # token ids in the mask's place: pack_batch put them there, and the layout was lost since
        if attention_mask is not None and attention_mask.dtype == torch.long:
            raise ValueError("its layers do not hand keyword arguments on to their attention")
        attend = transformers.AttentionInterface()["sdpa"]
        return attend(module, query, key, value, attention_mask, **kwargs)
    for name, what in UNKNOWN_TO_PACKED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention has {what}, which the packed one has not")

    layout = shared_prefixes
    device = query.device.type
    dtype = value.dtype
    if torch.is_autocast_enabled(device):  # SDPA would cast what a norm left in float32
        dtype = torch.get_autocast_dtype(device)
    query = query[0].transpose(0, 1).to(dtype)  # (T, Hq, D)
    key = key[0].transpose(0, 1).to(dtype).index_select(0, layout["key_index"])  # (K, Hkv, D)
    value = value[0].transpose(0, 1).to(dtype).index_select(0, layout["key_index"])

    scale = kwargs.get("scaling")
    window = kwargs.get("sliding_window")  # tokens that a query sees, itself included
    if window is not None and window >= max(layout["key_lengths"]):
        window = None
    if kernel_takes(query, value, window):
        return attend_with_kernel(query, key, value, layout, window, scale)[None], None
    return attend_one_by_one(query, key, value, layout, window, scale)[None], None


def kernel_takes(query: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
    """Whether torch's variable-length attention runs here: half precision on an NVIDIA card of the
    Ampere generation or newer, heads of one size.
    """
    size = query.shape[-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if not is_half or not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return size == value.shape[-1] <= 256 and size % 8 == 0 and (window is None or KNOWS_WINDOWS)


def attend_with_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: dict,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """torch's variable-length attention: (T, Hq, D), (K, Hkv, D) twice to (T, Hq, D)."""
    options = {"is_causal": True}
    if KNOWS_WINDOWS:
        before = -1 if window is None else window - 1  # keys that a query sees before its own
        options = {"window_size": (before, 0), "enable_gqa": True}
    if scale is not None and scale != query.shape[-1] ** -0.5:  # torch 2.10 knows no other
        options["scale"] = scale
    return varlen_attn(
        query,
        key,
        value,
        layout["query_bounds"],
        layout["key_bounds"],
        max(layout["query_lengths"]),
        max(layout["key_lengths"]),
        **options,
    )


def attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: dict,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """SDPA sequence after sequence: (T, Hq, D), (K, Hkv, D) twice to (T, Hq, D)."""
    outputs = []
    sequences = zip(
        query.split(layout["query_lengths"]),
        key.split(layout["key_lengths"]),
        value.split(layout["key_lengths"]),
        strict=True,
    )
    for some_queries, keys, values in sequences:
        mask = None
        is_tail = len(some_queries) < len(keys)
        is_cut = window is not None and window < len(keys)
        if is_tail or is_cut:  # else plainly causal, which has the faster kernel
            last_key = len(keys) - len(some_queries)  # that the first query sees
            shape = (len(some_queries), len(keys))
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(last_key)
            if is_cut:
                mask = mask.triu(last_key - window + 1)
        output = scaled_dot_product_attention(
            some_queries.transpose(0, 1)[None],  # (1, Hq, tokens, D)
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# -------------------------------------------------------------------------------------- the command
OUT_OF_MEMORY = (
    "out of GPU memory: halve per_device_train_batch_size (only aot, aot_unpaired and sft then "
    "differ), turn gradient_checkpointing on; or, with `--overwrite true` as that is another run, "
    "lower max_length or use configs/qwen3_8b_qlora.yaml"
)
DISK_FULL = (
    "a file could not be written, older checkpoints are untouched: make room and run the same "
    "command again"
)


def run(argv: list[str] | None = None) -> int:
    """`main`, its mistakes told in words. Returns the exit status: 0, 2 for a mistake, 128 plus the
    signal that stopped it, else 1.

    What is not known here is a bug, and keeps its traceback.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of the pinned libraries among themselves
    if not sys.stderr.isatty():  # a file would keep every state of a bar
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.register_at_fork(after_in_child=leave_interrupts_to_parent)
    atexit.register(end_workers)
    try:
        main(argv)
    except UserError as error:
        return end_with(str(error), error.status)
    except torch.OutOfMemoryError as error:
        return end_with(f"{OUT_OF_MEMORY}\n  {first_line(error)}", 1)
    except ImportError as error:  # of a package that a setting needs, asked for when it is used
        return end_with(" ".join(str(error).split()), 2)
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            return end_with(
                "interrupted; the same command goes on from where output_dir stands", 130
            )
        if not is_disk_full(error):
            raise
        return end_with(f"{DISK_FULL}\n  {first_line(error)}", 1)
    return 0


def leave_interrupts_to_parent() -> None:
    """In a worker process: Ctrl-C reaches it too, and its parent decides what comes of that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_signals_to_parent(worker: int) -> None:
    """In a worker that makes batches: a scheduler's signal reaches it too, and the step that its
    parent still finishes needs it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_workers() -> None:
    """At the end of the program: its last workers, which ignore what `multiprocessing` sends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report them as failures
    for worker in multiprocessing.active_children():
        worker.kill()


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: `datasets` fails while it clears its workers away."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room, as each library puts it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = ("No space left", "quota exceeded", "File too large", "inline_container")
    return any(word in str(error) for word in words)


def end_with(message: str, status: int) -> int:
    """Print why the program ends: a mistake once, any other end for each process."""
    text = f"dpotrainer: {message}"
    if not is_main_process():
        text = f"dpotrainer, process {os.environ['RANK']}: {message}"
    # torch's launcher ends with 30 lines of its own, and the last of them is what this file says
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is not None and status in (1, 2):
        if not is_main_process():
            time.sleep(30)  # seconds: the word of the main process comes first, and ends all
        content = {"message": text, "extraInfo": {"timestamp": int(time.time())}}
        Path(report).write_text(json.dumps({"message": content}), "utf-8")
    elif is_main_process() or status == 1:
        print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run())
