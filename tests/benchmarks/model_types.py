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
SECONDS = 120  # for a type
LIBRARIES = ("torch", "transformers", "trl", "peft")
EXPLANATION = """\
Made by `model_types.py`. Each type's default configuration is made small by `make_miniature`, saved
with a tokenizer, and trained as any model: two steps of the command with LoRA on all linear layers,
sigmoid loss, float32 on a CPU, no router loss. The first loss has to be ln 2 = 0.693147. Then the
adapter gets a B other than zero; `loss` and `gradient` are what shared prefixes differ by from rows
apart on the same four pairs, the gradient relative to its norm."""


def save_model(kind: str, folder: Path) -> None:
    """A small model of a type, with a tokenizer of some hundred tokens."""
    config = AutoConfig.for_model(kind, **COMPLETE.get(kind, {}), **WINDOWS.get(kind, {}))
    tokenizer = tiny.make_tokenizer()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.vocab_size = len(tokenizer)
        part.pad_token_id = tokenizer.pad_token_id
        part.eos_token_id = tokenizer.eos_token_id
        part.bos_token_id = None
    dpotrainer.make_miniature(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def measure(kind: str, folder: Path) -> dict:
    """Sharing's line, the first loss, and how far shared prefixes are from rows apart.

    Raises whatever the program raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_model(kind, folder)
    tiny.make_pairs(folder / "pairs.jsonl", PAIRS)
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
    """Two steps through the command, with an evaluation: "ok", or the last line that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = dpotrainer.run(make_flags(folder, True))
    if status == 0:
        return "ok"
    return printed.getvalue().strip().rpartition("dpotrainer: ")[2].splitlines()[0]


def give_up(number: int, frame: object) -> None:
    raise TimeoutError(f"not over after {SECONDS} seconds")


def describe(kind: str, folder: Path) -> str:
    """A line of the table."""
    columns = {"type": kind, "run": "", "sharing": "", "first loss": "", "loss": "", "gradient": ""}
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        found = measure(kind, folder)
        columns["sharing"] = found["sharing"].replace("shared, checked: log-probs", "shared:")
        columns["first loss"] = f"{found['first loss']:.6f}"
        if "loss" in found:
            columns["loss"] = f"{found['loss']:.0e}"
            columns["gradient"] = f"{found['gradient']:.0e}"
        columns["run"] = run_program(folder)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        told = str(error).strip().partition("\n")[0][:160]
        columns["run"] = f"{type(error).__name__} in {where}: {told}"
    finally:
        signal.alarm(0)
    return "| " + " | ".join(text.replace("|", "/") for text in columns.values()) + " |"


HEADER = """\
| type | two steps of the program | sharing | first loss | loss | gradient |
|---|---|---|---|---|---|"""
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
    text = (
        f"{before}\n{TITLE}\n\n{EXPLANATION}\n\n{versions}\n\n" + "\n".join([HEADER, *lines]) + "\n"
    )
    results.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
