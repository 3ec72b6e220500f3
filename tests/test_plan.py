"""The dry run: every number of the plan against an independent count, and the pair as the model sees it."""

import argparse
import json
import re

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import dpotrainer


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(model folder, pairs file, its pairs, text of a dry run)."""
    folder = tmp_path_factory.mktemp("plan")
    model, data = tiny.make_model(folder / "model"), tiny.make_pairs(folder / "pairs.jsonl", 60)
    flags = tiny.settings(
        model, data, folder / "out", dry_run=True, global_batch_size=8, per_device_train_batch_size=2
    )
    done = tiny.run_program(flags)
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists(), "a dry run writes nothing"
    return model, data, tiny.read_pairs(data), done.stdout


def number(text, pattern):
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in\n{text}"
    return float(found[1].replace(",", ""))


def test_parameters_are_those_of_the_loaded_model(dry_run):
    model, *_, text = dry_run
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainable, total = policy.get_nb_trainable_parameters()
    assert number(text, r"([\d,]+) weights in float32") == total
    assert number(text, r"([\d,]+) trainable") == trainable
    frozen = sum(p.numel() * p.element_size() for p in policy.parameters() if not p.requires_grad)
    assert number(text, r"weights ([\d.]+), gradients") == pytest.approx(frozen / 2**30, abs=0.006)


def test_steps_and_batch_are_derived(dry_run):
    *_, text = dry_run
    kept = number(text, r"([\d,]+) pairs to train on")
    assert "8 pairs = 2 per device x 4 accumulation x 1 process on cpu" in text
    assert number(text, r"steps  ([\d,]+),") == np.ceil(kept / 8)


def test_lengths_are_those_of_the_tokenizer(dry_run):
    model, _, pairs, text = dry_run
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest = max(len(tiny.encode_pair(tokenizer, pair, 10**6)[0][0]) for pair in pairs)
    quantiles = {k: json.loads(v) for k, v in re.findall(r"(prompt|chosen|rejected) (\[[\d, ]+\])", text)}
    assert set(quantiles) == {"prompt", "chosen", "rejected"}
    assert all(values == sorted(values) for values in quantiles.values())
    assert quantiles["chosen"][-1] < longest <= quantiles["prompt"][-1] + quantiles["chosen"][-1]


def test_needed_tokens_count_each_distinct_token_once(dry_run):
    model, _, pairs, text = dry_run
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [[ids for ids, _ in tiny.encode_pair(tokenizer, pair, 96)] for pair in pairs]
    needed = []
    for chosen, rejected in rows:
        short = min(len(chosen), len(rejected)) - 1
        shared = next((i for i in range(short) if chosen[i] != rejected[i]), short)
        needed.append(len(chosen) + len(rejected) - shared)
    counted = number(text, r"([\d,]+) tokens with shared prefixes")
    held_out = number(text, r"([\d,]+) held out")
    assert sum(sorted(needed)[: -int(held_out)]) <= counted * 1.5 and counted < sum(needed)
    assert number(text, r"([\d,]+) in padded rows") > counted


def test_the_pair_is_shown_with_its_special_tokens(dry_run):
    *_, text = dry_run
    for part in ("prompt", "chosen", "rejected", "<|im_start|>assistant", "<|im_end|>"):
        assert part in text


def test_real_run_prints_the_short_form_of_the_same_plan(dry_run, tmp_path, capsys, monkeypatch):
    model, data, _, text = dry_run
    for step in ("train_policy", "show_samples", "save_run"):
        monkeypatch.setattr(dpotrainer, step, lambda *args: None)
    flags = tiny.settings(model, data, tmp_path / "out", global_batch_size=8, per_device_train_batch_size=2)
    assert dpotrainer.main(flags) == 0
    shown = capsys.readouterr().out
    for label in ("policy", "reference", "objective", "pairs", "batch", "steps", "prefixes", "output"):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{label}  "))
        assert line.replace(str(model), "") in shown.replace(str(model), "") or label == "output"
    assert "GiB" not in shown


def test_four_bit_and_copies_change_the_memory(dry_run, tmp_path, capsys):
    model, data, *_ = dry_run
    for more in ({}, {"reference": "copy"}, {"dtype": "bfloat16"}):
        assert dpotrainer.main(tiny.settings(model, data, tmp_path / "out", dry_run=True, **more)) == 0
        text = capsys.readouterr().out
        assert ("second, frozen model" in text) == ("reference" in more)
        assert f"weights in {more.get('dtype', 'float32')}" in text


def test_dry_run_of_the_constants_without_network_is_one_clear_message():
    done = tiny.run_program(["--dry_run", "true"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= 2 and "Qwen/Qwen3-8B" in done.stderr


def test_prefixes_that_nobody_wants_shared_are_not(dry_run, tmp_path, capsys):
    model, data, *_ = dry_run
    flags = tiny.settings(model, data, tmp_path / "out", dry_run=True)
    assert dpotrainer.main(flags) == 0 and "prefixes  shared" in capsys.readouterr().out
    assert dpotrainer.main([*flags, "--share_prefixes", "false"]) == 0
    assert "prefixes  not shared: `share_prefixes: false`" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_a_layer_keeps(checkpointing):
    """The estimate per layer and token against the tensors that autograd saves, counted, in a bf16 layer with LoRA."""
    tokens, settings = 128, dpotrainer.parse_settings(["--dtype", "bfloat16", "--lora_r", "4"])[0]
    settings.gradient_checkpointing = checkpointing
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 2}
    estimated, counted = [], []
    for layers in (1, 2):
        config = Qwen3Config(**shape, head_dim=128, num_hidden_layers=layers, vocab_size=512)
        start = argparse.Namespace(config=config, continues=False, reference="auto")
        _, _, gib, _ = dpotrainer.measure_model(settings, start, tokens, tokens)
        estimated.append(gib["activations (an estimate)"] * 2**30)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        dpotrainer.share_prefixes(model)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # as the program does on a GPU
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, saved = torch.randint(0, 512, (2, tokens // 2)), {}
        plan = dpotrainer.plan_shared_prefixes(ids, torch.ones_like(ids))
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept = []  # so that no place is used twice

        def count(tensor, saved=saved, kept=kept):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            model.base_model.model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), plan=plan, use_cache=False
            )
        assert plan["input_ids"].numel() == tokens
        counted.append(sum(size for place, size in saved.items() if place not in own))
    per_layer = [after - before for before, after in (estimated, counted)]
    assert per_layer[0] == pytest.approx(per_layer[1], rel=0.05)


def test_the_second_name_of_checkpointing_is_planned_alike(dry_run, tmp_path, capsys):
    model, data, *_ = dry_run
    memory = []
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert dpotrainer.main([*tiny.settings(model, data, tmp_path / "out", dry_run=True), f"--{name}", "true"]) == 0
        memory.append(re.search(r"activations .*", capsys.readouterr().out)[0])
    assert memory[0] == memory[1]
