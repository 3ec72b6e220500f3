"""Time from a file of pairs to tokens: this program beside TRL's own preparation, on one core.

    python tests/benchmarks/preparation.py --tokenizer FOLDER [--pairs FILE.jsonl] [--count 3000]

Without --pairs it makes short chat pairs. The tokenizer is one with Qwen3's vocabulary; the chat
template is Qwen3's, from TRL. Prints seconds of processor time and of the clock for each.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402
import tiny  # noqa: E402
import trl  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import (  # noqa: E402
    DatasetMixtureConfig,
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
)

import dpotrainer  # noqa: E402


def write_pairs(path, count, source):
    """Count pairs: those of a file over and over, each with a number, or short made ones."""
    rng = random.Random(0)
    rows = []
    if source:
        rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            row = tiny.make_pair(rng)
            if rows:
                row = json.loads(json.dumps(rows[i % len(rows)]))
            row["prompt"][-1]["content"] += f" ({i})"
            file.write(json.dumps(row) + "\n")


def measure(name, count, prepare):
    """Print what `prepare` takes."""
    started = os.times()
    prepare()
    ended = os.times()
    # user and system time, of this process and of those that it started: all but the last, the clock
    processor = sum(ended[:4]) - sum(started[:4])
    clock = ended.elapsed - started.elapsed
    print(f"{name:<12}{processor:8.1f} s processor {clock:8.1f} s clock {count:9,} pairs")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs")
    parser.add_argument("--count", type=int, default=3000)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    # one process, whatever the number of pairs
    os.cpu_count = lambda: 1
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        path = Path(folder, "pairs.jsonl")
        write_pairs(path, options.count, options.pairs)
        args = DPOConfig(use_cpu=True, bf16=False, output_dir=folder, max_length=2048)
        job = dpotrainer.Job(
            settings=dpotrainer.Settings(),
            script_args=ScriptArguments(dataset_name=str(path)),
            model_args=ModelConfig(),
            training_args=args,
            mixture_args=DatasetMixtureConfig(),
            missing_gpu="",
            origins={},
        )
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        # the same empty think block, so that the tokens are the same
        kwargs = [{"enable_thinking": False}] * len(rows)
        rows = rows.add_column("chat_template_kwargs", kwargs)
        trainer = type("Trainer", (), {"_tokenizer": tokenizer})

        def prepare_ours():
            dpotrainer.load_preferences(job, tokenizer)

        def prepare_trl():
            DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train")

        measure("this program", options.count, prepare_ours)
        measure("TRL", options.count, prepare_trl)


if __name__ == "__main__":
    main()
