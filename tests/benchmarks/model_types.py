"""Each causal LM type of transformers that can be built small: does it train, with which sharing?

python tests/benchmarks/model_types.py                        all, into RESULTS.md, 15 minutes
python tests/benchmarks/model_types.py qwen3 mistral gpt2     some, printed only
"""
# ruff: noqa: E402 - the program and the tests' helpers are found first

import contextlib
import io
import logging
import math
import os
import signal
import sys
import tempfile
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import datasets
import tiny
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dpotrainer

COMPLETE = {  # what a default configuration leaves open, and each real one has
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "deepseek_v2": {"num_experts_per_tok": 6, "num_key_value_heads": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "granitemoehybrid": {"layer_types": ["attention"] * 32},
}
WINDOWS = {  # windows that a default configuration leaves out
    "qwen2": {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 4096},
    "phi3": {"sliding_window": 2047},
    "exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
}
PAIRS = 20
SECONDS = 240  # for a type
LIBRARIES = ("torch", "transformers", "trl", "peft")
EXPLANATION = """\
Made by `model_types.py`. Each type's default configuration is made small by `make_miniature`, saved
with a tokenizer, and trained as any model: two steps of the command with LoRA on all linear layers,
sigmoid loss, float32 on a CPU, no router loss. Where a configuration asks for one, the next column
says whether TRL can compute it, or is refused with it. The first loss has to be ln 2 = 0.693147.
Then the adapter gets a B other than zero; `loss` and `gradient` are what shared prefixes differ by
from rows apart on the same four pairs, the gradient relative to its norm."""


def save_config(kind: str, folder: Path, **changes) -> transformers.PretrainedConfig:
    """A type's default configuration, with a tokenizer of some hundred tokens."""
    config = AutoConfig.for_model(kind, **COMPLETE.get(kind, {}) | WINDOWS.get(kind, {}) | changes)
    tokenizer = tiny.make_tokenizer()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.vocab_size = len(tokenizer)
        part.pad_token_id = tokenizer.pad_token_id
        part.eos_token_id = tokenizer.eos_token_id
        part.bos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def save_model(kind: str, folder: Path) -> None:
    """A small model of a type."""
    config = save_config(kind, folder)
    dpotrainer.make_miniature(config).save_pretrained(folder)


def run_batch(trainer: dpotrainer.PreferenceTrainer) -> tuple[float, torch.Tensor]:
    """Loss of four pairs, and the gradient of all trained weights."""
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    found = [w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None]
    return loss.item(), torch.cat(found)


def make_flags(folder: Path, shares: bool) -> list[str]:
    """A run of two steps, without a router's loss: that is no pair's alone."""
    return tiny.settings(
        folder,
        folder / "pairs.jsonl",
        folder / f"out-{shares}",
        share_prefixes=shares,
        eval_pairs=4,
        max_steps=2,
        router_aux_loss_coef=0.0,
    )


def build_trainer(
    folder: Path, shares: bool
) -> tuple[dpotrainer.Sharing, dpotrainer.PreferenceTrainer]:
    """The program's trainer, and what it says of sharing."""
    job = dpotrainer.read_settings(make_flags(folder, shares))
    start = dpotrainer.load_start(job)
    preferences = dpotrainer.load_preferences(job, start.tokenizer)
    sharing = dpotrainer.check_sharing(job, start, preferences)
    torch.manual_seed(0)
    return sharing, dpotrainer.build_trainer(job, start, preferences, sharing)


def move_adapter(trainer) -> None:
    """Give every LoRA a B other than zero, so that the policy is not its reference."""
    torch.manual_seed(7)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)


def make_files(kind: str, folder: Path) -> None:
    """A small model of a type, and pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(kind, folder)
    tiny.make_pairs(folder / "pairs.jsonl", PAIRS)


def measure(kind: str, folder: Path) -> dict:
    """Sharing's line, the first loss, and how far shared prefixes are from rows apart.

    Raises whatever the program raises.
    """
    make_files(kind, folder)
    sharing, trainer = build_trainer(folder, True)
    found = {"sharing": sharing.line, "first loss": run_batch(trainer)[0]}
    if sharing.is_used:
        move_adapter(trainer)
        loss, gradient = run_batch(trainer)
        _, trainer = build_trainer(folder, False)
        move_adapter(trainer)
        loss_apart, gradient_apart = run_batch(trainer)
        found["moved"] = abs(loss_apart - math.log(2))
        found["loss"] = abs(loss - loss_apart)
        found["gradient"] = ((gradient - gradient_apart).norm() / gradient_apart.norm()).item()
    return found


def run_program(folder: Path) -> str:
    """Two steps through the command, with an evaluation: "ok", or what it says at its end."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = dpotrainer.run(make_flags(folder, True))
    if status == 0:
        return "ok"
    told = printed.getvalue().rpartition("dpotrainer: ")[2].replace(str(folder), "FOLDER")
    return "refused: " + " ".join(told.split())


def try_router_loss(folder: Path) -> str:
    """Whether TRL has a router loss for a type whose configuration asks for one."""
    job = dpotrainer.read_settings(make_flags(folder, True))
    job.training_args.router_aux_loss_coef = None
    start = dpotrainer.load_start(job)
    if dpotrainer.find_router_weight(job, start.config) == 0:
        return ""
    preferences = dpotrainer.load_preferences(job, start.tokenizer)
    try:
        dpotrainer.check_architecture(job, start, preferences)
    except dpotrainer.UserError as error:
        assert str(error).startswith("router_aux_loss_coef="), error
        return "refused"
    return "ok"


def give_up(number: int, frame: object) -> None:
    raise TimeoutError(f"not over after {SECONDS} seconds")


def describe(kind: str, folder: Path) -> str:
    """A line of the table."""
    names = ("type", "run", "router loss", "sharing", "first loss", "loss", "gradient")
    columns = dict.fromkeys(names, "") | {"type": kind}
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        make_files(kind, folder)
    except Exception as error:
        columns["run"] = f"not built: {str(error).strip().partition(chr(10))[0][:120]}"
        return join(columns)
    try:
        columns["run"] = run_program(folder)
        if columns["run"] == "ok":
            columns["router loss"] = try_router_loss(folder)
            found = measure(kind, folder)
            columns["sharing"] = found["sharing"].replace("shared, checked: log-probs", "shared:")
            columns["first loss"] = f"{found['first loss']:.6f}"
            if "loss" in found:
                columns["loss"] = f"{found['loss']:.0e}"
                columns["gradient"] = f"{found['gradient']:.0e}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        told = str(error).strip().partition("\n")[0][:160]
        columns["run"] = f"{type(error).__name__} in {where}: {told}"
    finally:
        signal.alarm(0)
    return join(columns)


def join(columns: dict[str, str]) -> str:
    return "| " + " | ".join(text.replace("|", "/") for text in columns.values()) + " |"


HEADER = """\
| type | two steps of the program | own router loss | sharing | first loss | loss | gradient |
|---|---|---|---|---|---|---|"""
TITLE = "## Model types"


def main() -> None:
    """Print the table, and write it into RESULTS.md where it is of all types."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    kinds = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    print(HEADER, flush=True)
    lines = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(describe(kind, Path(folder)))
        print(lines[-1], flush=True)
    if sys.argv[1:]:
        return
    results = HERE / "RESULTS.md"
    before = results.read_text("utf-8").partition(f"\n{TITLE}\n")[0]
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    trained = sum(line.split(" | ")[1] == "ok" for line in lines)
    shared = sum("| shared: " in line for line in lines)
    built = len(lines) - sum("| not built: " in line for line in lines)
    refused = sum("| refused: " in line for line in lines)
    summary = f"{built} of {len(lines)} types can be built small. {trained} train: {shared} with "
    summary += (
        f"shared prefixes, {trained - shared}\nwith rows apart. {refused} are refused before "
    )
    summary += "any weight is read."
    table = "\n".join([HEADER, *lines])
    parts = [f"{before}\n{TITLE}", EXPLANATION, versions, summary, table]
    results.write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
