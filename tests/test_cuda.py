"""Whole runs at Qwen3-8B's shape on one GPU: train, save, reload, compare; QLoRA; memory as planned and as measured.

The first of them also runs on a CPU, at a width that a CPU takes. Weights are random: no network is needed.
"""

import importlib.util
import json
import random
import re

import pytest
import tiny
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import dpotrainer

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMALL = {
    **QWEN3_8B,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
cuda = [pytest.mark.cuda, on_gpu]
GPU = {"use_cpu": False, "bf16": True, "dtype": "bfloat16", "learning_rate": 1e-4}


def make_data(folder, words=0):
    """24 pairs to train on and 8 held out; `words` more words make every answer longer."""
    rng = random.Random(3)
    for split, count in (("train", 24), ("test", 8)):
        rows = [tiny.make_pair(rng) for _ in range(count)]
        for row in rows:
            for side in ("chosen", "rejected"):
                row[side][0]["content"] += " " + " ".join(
                    rng.choice(tiny.WORDS) for _ in range(words)
                )
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize("shape, settings", [
    pytest.param(SMALL, {}, id="small, float32, cpu"),
    pytest.param(SMALL, {"bf16": True, "dtype": "bfloat16", "learning_rate": 1e-3}, id="small, bf16, cpu"),
    pytest.param(QWEN3_8B, GPU, id="qwen3-8b, bf16, cuda", marks=cuda),
    pytest.param(QWEN3_8B, {**GPU, "gradient_checkpointing": True}, id="qwen3-8b, recomputed, cuda", marks=cuda),
])  # fmt: skip
def test_what_was_trained_is_what_is_saved(shape, settings, tmp_path, capsys):
    """Two layers: the adapter, loaded again, has the held-out log-probs that the run's last evaluation gave."""
    model = tiny.make_model(tmp_path / "model", **shape)
    flags = tiny.settings(
        model, make_data(tmp_path / "pairs"), tmp_path / "out", num_train_epochs=2, **settings
    )
    assert dpotrainer.run([*flags, "--max_length", "256"]) == 0
    assert "prefixes   shared" in capsys.readouterr().out
    losses, last = tiny.losses(tmp_path / "out"), tiny.evaluations(tmp_path / "out")[-1]
    assert losses[1] == pytest.approx(0.693147, abs=1e-3) and losses[12] < 0.68
    device = "cpu" if settings.get("use_cpu", True) else "cuda"
    policy = (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        .to(device)
        .eval()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    logps = []
    for pair in tiny.read_pairs(tmp_path / "pairs" / "test.jsonl"):
        for ids, start in tiny.encode_pair(tokenizer, pair, 256):
            row = torch.tensor([ids], device=device)
            with torch.no_grad():
                every = policy(input_ids=row).logits[0, :-1].double().log_softmax(-1)
            logps.append(every.gather(1, row[0, 1:, None])[start - 1 :].sum().item())
    expected = torch.tensor(logps).view(-1, 2).mean(0)
    tolerance = 1e-2 if settings.get("bf16") else 1e-5
    assert last["eval_logps/chosen"] == pytest.approx(expected[0].item(), rel=tolerance)
    assert last["eval_logps/rejected"] == pytest.approx(expected[1].item(), rel=tolerance)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("shape, settings", [
    pytest.param(SMALL, {"bf16": True, "dtype": "bfloat16", "learning_rate": 1e-3}, id="small, cpu"),
    pytest.param(QWEN3_8B, {**GPU, "optim": "paged_adamw_8bit"}, id="qwen3-8b, cuda", marks=cuda),
])  # fmt: skip
def test_qlora_trains_an_adapter_in_float32(shape, settings, tmp_path):
    """The base in NF4; TRL alone would make the adapter bf16, which rounds small steps away."""
    model = tiny.make_model(tmp_path / "model", **shape)
    settings = settings | {"load_in_4bit": True, "num_train_epochs": 2}
    assert (
        dpotrainer.run(
            tiny.settings(model, make_data(tmp_path / "pairs"), tmp_path / "out", **settings)
        )
        == 0
    )
    losses = tiny.losses(tmp_path / "out")
    assert losses[1] == pytest.approx(0.693147, abs=1e-3) and losses[12] < 0.68
    assert {
        weight.dtype
        for weight in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    } == {torch.float32}


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("settings", [
    pytest.param({"bf16": True, "dtype": "bfloat16"}, id="cpu"),
    pytest.param(GPU, id="cuda", marks=cuda),
])  # fmt: skip
def test_qlora_is_rehearsed(settings, tmp_path, capsys):
    """What was saved is compared on a base in NF4, as it was trained."""
    model = tiny.make_model(tmp_path / "model", **SMALL)
    settings = settings | {"load_in_4bit": True, "dry_run": True, "learning_rate": 5e-6}
    flags = tiny.settings(model, make_data(tmp_path / "pairs"), tmp_path / "out", **settings)
    assert dpotrainer.run(flags) == 0
    assert "rehearsed  in " in capsys.readouterr().out


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_s_memory_is_that_of_a_full_size_step(
    checkpointing, tmp_path, capsys, monkeypatch
):
    """All 36 layers and the whole vocabulary, 4 pairs of some 1,000 tokens: within 15% of the measured peak."""
    if torch.cuda.mem_get_info()[1] < 75 * 2**30:
        pytest.skip("needs a card of 80 GB")
    model = tiny.make_model(tmp_path / "model", width=32)
    config = transformers.AutoConfig.from_pretrained(model)
    config.update(
        QWEN3_8B
        | {"num_hidden_layers": 36, "vocab_size": 151936, "layer_types": ["full_attention"] * 36}
    )
    config.save_pretrained(model)

    def random_weights(name, dtype, **options):
        with torch.device("cuda"):
            random = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype)
            )
        return random, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", random_weights)
    monkeypatch.setattr(dpotrainer, "rehearse", lambda *args: None)  # it would load all layers
    settings = GPU | {
        "gradient_checkpointing": checkpointing,
        "max_length": 1024,
        "lora_r": 32,
        "max_steps": 3,
    }
    flags = tiny.settings(
        model, make_data(tmp_path / "pairs", words=400), tmp_path / "out", **settings
    )
    assert dpotrainer.run([*flags, "--dry_run", "true"]) == 0
    planned = float(re.search(r"memory +([\d.]+) GiB", capsys.readouterr().out)[1])
    torch.cuda.reset_peak_memory_stats()
    assert dpotrainer.run(flags) == 0
    measured = float(
        re.search(r"([\d.]+) GiB of GPU memory at the peak", capsys.readouterr().out)[1]
    )
    assert planned == pytest.approx(measured, rel=0.15)
