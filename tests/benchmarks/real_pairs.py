"""One epoch of real pairs on a real model: this program beside stock `trl dpo`, in one run.

    python tests/benchmarks/real_pairs.py PAIRS_EN.jsonl PAIRS_ZH.jsonl --output FOLDER

Of each file 120 pairs are trained on and 40 held out, unless --train and --held_out say otherwise.
Both programs get the same settings and the same pairs, one after the other, each in a process of
its own. Printed: held-out accuracies with their 95% interval, the margin in nats (not times beta),
seconds, seconds of processor time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import real_model
import tiny
from transformers import AutoTokenizer

import dpotrainer

BETA = 0.1
SETTINGS = {  # names that both programs know
    "use_cpu": True,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "beta": BETA,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 5,
    "report_to": "none",
    "seed": 42,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=120, help="pairs to train on")
    parser.add_argument("--held_out", type=int, default=40, help="pairs to evaluate on")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a row at most")
    parser.add_argument("--bf16", action="store_true", help="autocast, for a CPU that has it")
    arguments = parser.parse_args()
    if real_model.why_missing():
        sys.exit(real_model.why_missing())
    model = real_model.make_real_model()
    changes = {"max_length": arguments.max_length, "bf16": arguments.bf16}
    print("| pairs | program | accuracies | interval | margin, nats | seconds | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for file in arguments.files:
        data = split_pairs(file, model, arguments.output / file.stem, arguments)
        for program in ("dpotrainer", "trl dpo"):
            folder = arguments.output / f"{file.stem}-{program.replace(' ', '-')}"
            row, seconds, processor = train(program, model, data, folder, changes)
            share = row["eval_rewards/accuracies"]
            low, high = dpotrainer.wilson_interval(share, arguments.held_out)
            margin = row["eval_rewards/margins"] / BETA
            print(
                f"| {file.stem} | {program} | {share:.3f} | {low:.3f} to {high:.3f} "
                f"| {margin:.2f} | {seconds:.0f} | {processor:.0f} |",
                flush=True,
            )


def split_pairs(file: Path, model: Path, folder: Path, arguments: argparse.Namespace) -> Path:
    """A folder with train.jsonl and test.jsonl: the file's first pairs whose prompt takes half of a
    row at most, which no program drops or cuts to nothing.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        prompt = json.loads(line)["prompt"]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        if len(ids) <= arguments.max_length // 2:
            lines.append(line)
    if len(lines) < arguments.train + arguments.held_out:
        sys.exit(f"{file}: {len(lines)} prompts fit; fewer pairs, or a larger --max_length")
    folder.mkdir(parents=True, exist_ok=True)
    held_out = lines[arguments.train :][: arguments.held_out]
    (folder / "train.jsonl").write_text("".join(lines[: arguments.train]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(held_out), encoding="utf-8")
    return folder


def train(
    program: str, model: Path, data: Path, folder: Path, changes: dict
) -> tuple[dict, float, float]:
    """(last evaluation, seconds, seconds of processor time) of a run in its own process."""
    command = [sys.executable, str(tiny.PROGRAM)]
    values = {"model_name_or_path": model, "dataset_name": data, "output_dir": folder}
    values |= SETTINGS | changes
    if program == "dpotrainer":
        values |= {"global_batch_size": 4, "sample_prompts": 0, "overwrite": True}
    else:
        command = [sys.executable, "-m", "trl.scripts.dpo"]
    for name, value in values.items():
        command += [f"--{name}", str(value)]
    begun = time.perf_counter()
    used = os.times()
    ended = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    after = os.times()
    if ended.returncode != 0:
        sys.exit(ended.stderr[-3000:])
    processor = after.children_user + after.children_system
    processor -= used.children_user + used.children_system
    states = list(folder.glob("checkpoint-*/trainer_state.json"))
    newest = max(states, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")))
    history = json.loads(newest.read_text(encoding="utf-8"))["log_history"]
    return [row for row in history if "eval_loss" in row][-1], seconds, processor


if __name__ == "__main__":
    main()
