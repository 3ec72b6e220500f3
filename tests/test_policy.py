"""Every start, every reference and every objective, against formulas of our own in float64."""

import dataclasses
import gc
import json
import random
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

import dpotrainer

gc.freeze()  # the collections of each run then skip the libraries

LN2 = 0.6931471805599453


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 16 pairs to train on and 5 held out."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny.make_pairs(folder / "train.jsonl", 16, seed=3)
    tiny.make_pairs(folder / "test.jsonl", 5, seed=4)
    return folder


def make_adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter as an SFT run leaves it, far enough from the base to be told apart, with its tokenizer."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("sft") / "adapter", seed=5)


@pytest.fixture(scope="module")
def merged_sft(base, sft, tmp_path_factory):
    """The SFT model with its adapter merged, as a plain model."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), sft
    ).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def train(data, tmp_path, capsys):
    """train(model, name, settings) -> (output_dir, what was printed)."""

    def start(model, name="out", status=0, data=data, **settings):
        settings = {"eval_steps": 100, "save_steps": 100} | settings
        got = dpotrainer.run(tiny.settings(model, data, tmp_path / name, **settings))
        printed = capsys.readouterr()
        assert got == status, printed.err
        return tmp_path / name, printed.out + printed.err

    return start


def close(first: Path, second: Path, tolerance: float) -> None:
    a, b = tiny.losses(first), tiny.losses(second)
    assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) <= tolerance, (a, b)


def check_evaluation(output, base, data, reference, beta=0.1):
    """The last held-out figures against the saved adapter on its base and this reference, in float64."""
    expected = tiny.evaluate_adapter(
        base, output, tiny.read_pairs(data / "test.jsonl"), beta, tiny.load_policy(reference)
    )
    got = tiny.evaluations(output)[-1]
    for name, value in expected.items():
        assert abs(got[name] - value) < 1e-4, (name, got[name], value)


# ------------------------------------------------------------------------------------------------------- references
def test_auto_and_copy_of_the_same_model_are_the_same_run(base, data, train):
    auto, printed = train(base, "auto")
    assert "adapter switched off" in printed
    copy, printed = train(base, "copy", reference="copy")
    assert "second, frozen model" in printed
    close(auto, copy, 1e-6)
    check_evaluation(copy, base, data, base)


def test_copy_of_another_model_is_that_model(base, data, train, tmp_path):
    other = tiny.make_model(tmp_path / "other", seed=9)
    output, printed = train(base, reference="copy", ref_model_name_or_path=other)
    assert "other" in printed and abs(tiny.losses(output)[1] - LN2) > 1e-3
    check_evaluation(output, base, data, other)


def test_an_sft_adapter_is_continued_and_is_the_reference(base, sft, merged_sft, data, train):
    """By default, as a frozen copy of the adapter, and as a second model: all the same run."""
    outputs = []
    for reference in ("auto", "adapter", "copy"):
        output, printed = train(sft, reference, reference=reference)
        printed = " ".join(printed.split())  # the plan is wrapped
        assert ("second, frozen model" in printed) == (reference == "copy")
        first = tiny.read_metrics(output)[0]
        assert abs(first["loss"] - LN2) < 1e-6 and abs(first["rewards/margins"]) < 1e-5
        assert json.loads((output / "adapter_config.json").read_text())["r"] == 3, (
            "not the adapter that was continued"
        )
        outputs.append(output)
    close(outputs[0], outputs[1], 0)
    close(outputs[0], outputs[2], 1e-5)
    check_evaluation(outputs[0], base, data, merged_sft)
    check_evaluation(outputs[2], base, data, merged_sft)


def test_a_starting_adapter_keeps_its_own_shape(sft, train):
    """Constants give way to it; a flag that says otherwise is refused; settings.yaml repeats the run."""
    output, _ = train(sft, max_steps=1)
    kept = yaml.safe_load((output / "settings.yaml").read_text())
    assert (kept["lora_r"], kept["lora_alpha"]) == (3, 6)
    assert any("q_proj" in name for name in kept["lora_target_modules"])
    assert dpotrainer.run(["--config", str(output / "settings.yaml")]) == 0
    wrong = {"lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"], "use_dora": True}
    for name, value in wrong.items():
        _, printed = train(sft, "refused", status=2, **{name: value})
        assert f"flag --{name}, {name}=" in printed and "the starting adapter has" in printed
    train(sft, "same", max_steps=1, lora_r=3, lora_alpha=6)


def test_what_else_an_adapter_has_is_taken_or_refused_too(sft, data, train, tmp_path, monkeypatch):
    """Its dropout, where dropout is on; its whole modules; parameters that it is beside."""
    own = {"lora_dropout": 0.25, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    adapter = change_adapter(shutil.copytree(sft, tmp_path / "adapter"), **own)

    def load(*words, **settings):
        flags = tiny.settings(adapter, data, tmp_path / "out", reference="copy", **settings)
        job = dpotrainer.read_settings([*flags, *words])
        dpotrainer.load_start(job)
        return job

    job = load(disable_dropout=False)
    assert job.model_args.lora_dropout == 0.25
    assert job.model_args.lora_modules_to_save == ["lm_head"]
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(dpotrainer.flat_settings(job)))
    load("--config", str(tmp_path / "same.yaml"), disable_dropout=False)
    assert load().model_args.lora_dropout == 0, "disable_dropout switches it off"
    for wrong in (
        {"lora_dropout": 0.5, "disable_dropout": False},
        {"lora_modules_to_save": "embed_tokens"},
        {"lora_target_parameters": "experts.down_proj"},
    ):
        with pytest.raises(dpotrainer.UserError, match=f"{next(iter(wrong))}=.*adapter has"):
            load(**wrong)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(dpotrainer.UserError, match="lora_modules_to_save=lm_head: in a sharded"):
        load()


def test_an_adapter_is_not_merged_into_a_quantised_base(base, train, tmp_path):
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    _, printed = train(quantised, status=2, merge=True)
    assert "merge=true: the base is quantised already" in printed


def test_an_adapter_without_a_tokenizer_takes_its_base_s(sft, data, train, tmp_path):
    bare = shutil.copytree(sft, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "chat*"))
    output, _ = train(bare, "b", max_steps=2)
    close(train(sft, "a", max_steps=2)[0], output, 0)


def test_an_adapter_s_damaged_tokenizer_is_not_replaced(sft, train, tmp_path):
    """Tokens that SFT has added would be lost."""
    damaged = shutil.copytree(sft, tmp_path / "damaged")
    tokenizer = damaged / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    _, printed = train(damaged, status=2)
    assert f"model_name_or_path={damaged}: no tokenizer: " in printed


@pytest.mark.parametrize("content", ["[]", '{"r": 8}'])
def test_an_adapter_config_of_something_else_is_refused(content, sft, train, tmp_path):
    odd = shutil.copytree(sft, tmp_path / "odd")
    (odd / "adapter_config.json").write_text(content)
    _, printed = train(odd, status=2)
    assert "its adapter_config.json " in printed and "Traceback" not in printed


def test_an_adapter_on_the_hub_without_a_tokenizer_takes_its_base_s(base, monkeypatch):
    """The library looks on the hub, and finds none."""
    adapter = LoraConfig(base_model_name_or_path=str(base))
    source = dpotrainer.Source("someone/adapter", None, str(base), None, adapter)
    assert dpotrainer.load_tokenizer(source).get_vocab() == tiny.make_tokenizer().get_vocab()
    with pytest.raises(OSError):
        dpotrainer.load_tokenizer(source._replace(adapter=None))


def test_an_embedding_that_is_parted_out_is_not_cut(base, monkeypatch):
    """Under ZeRO-3 a weight's own shape is empty; the tokenizer may be smaller than the model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data = torch.empty(0)
    resized = []
    monkeypatch.setattr(model, "resize_token_embeddings", resized.append)
    dpotrainer.make_room(model, range(model.config.vocab_size))
    assert resized == []
    dpotrainer.make_room(model, range(model.config.vocab_size + 2))
    assert resized == [model.config.vocab_size + 2]


def change_adapter(folder: Path, **changes) -> Path:
    """Rewrite an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_reference_that_does_not_apply_is_refused(base, sft, train, tmp_path):
    assert "no adapter" in train(base, status=2, reference="adapter")[1]
    broken = shutil.copytree(sft, tmp_path / "broken")
    change_adapter(broken, base_model_name_or_path="/nowhere/base")
    assert "/nowhere/base" in train(broken, status=2)[1]


@pytest.mark.parametrize("name", ["no such name", "x--y"])
def test_a_name_that_is_none_is_one_message(name, base, train):
    """Two different readers of the library refuse these."""
    for settings in ({}, {"reference": "copy", "ref_model_name_or_path": name}):
        setting = "ref_model_name_or_path" if settings else "model_name_or_path"
        _, printed = train(base if settings else name, status=2, **settings)
        assert f"{setting}={name}" in printed and "cannot be read: " in printed
        assert "Traceback" not in printed


def test_a_revision_that_is_not_there_is_one_message(base, train, monkeypatch):
    """Of what is on the hub, the search for an adapter finds it out."""

    def fail(name, revision):
        raise OSError(f"{revision} is not a valid git identifier")

    monkeypatch.setattr(dpotrainer, "find_adapter_config_file", fail)
    _, printed = train(base, status=2, model_revision="v9")
    assert "cannot be read: v9 is not a valid git identifier; " in printed


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path; write there"),
        ({"peft_type": "NEWEST"}, "knows no adapter of peft_type='NEWEST'; start from"),
    ],
)
def test_an_adapter_that_peft_cannot_use_is_refused(changes, told, sft, train, tmp_path):
    adapter = change_adapter(shutil.copytree(sft, tmp_path / "adapter"), **changes)
    _, printed = train(adapter, status=2)
    assert told in printed and str(adapter) in printed and "Traceback" not in printed


def test_remote_code_is_not_run_and_nothing_is_asked(base, train, tmp_path, monkeypatch):
    model = shutil.copytree(base, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    questions = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or "n")
    _, printed = train(model, status=2)
    assert "remote code is not run here; take another model" in printed
    assert questions == []


@pytest.fixture
def build(data, tmp_path):
    """build(model, **settings) -> the trainer of a run, before its first step."""

    def start(model, **settings):
        job = dpotrainer.read_settings(tiny.settings(model, data, tmp_path / "out", **settings))
        start = dpotrainer.load_start(job)
        preferences = dpotrainer.load_preferences(job, start.tokenizer)
        sharing = dpotrainer.check_sharing(job, start, preferences)
        return dpotrainer.build_trainer(job, start, preferences, sharing)

    return start


@pytest.mark.parametrize("reference", ["auto", "copy"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_adapter_on_a_quantised_base_is_not_rounded(
    is_sharded, reference, sft, build, monkeypatch
):
    """TRL rounds what it trains on a base that says so to bf16, and the frozen copy it leaves."""
    load = dpotrainer.load_causal_lm

    def load_as_if_quantised(*args, **options):
        model = load(*args, **options)
        model.is_loaded_in_4bit = True
        return model

    monkeypatch.setattr(dpotrainer, "load_causal_lm", load_as_if_quantised)
    monkeypatch.setattr(dpotrainer, "is_sharded", lambda: is_sharded)
    weights = dict(build(sft, reference=reference).model.named_parameters())
    saved = load_file(sft / "adapter_model.safetensors")
    assert any((weight != weight.bfloat16()).any() for weight in saved.values())
    for name, weight in saved.items():
        head, _, tail = name.rpartition(".")
        for adapter in ("default", "ref") if reference == "auto" else ("default",):
            found = weights[f"{head}.{adapter}.{tail}"]
            assert found.dtype == torch.float32 and torch.equal(found, weight), name


@pytest.mark.parametrize(
    "start, settings",
    [("base", {}), ("base", {"reference": "copy"}), ("sft", {})],
    ids=str,
)
def test_the_reference_does_not_move(start, settings, train, request, monkeypatch):
    train_first, compared = dpotrainer.PreferenceTrainer.train, []

    def frozen(trainer):
        every = [(name, p) for name, p in trainer.model.named_parameters() if not p.requires_grad]
        every += (
            [(f"reference.{name}", p) for name, p in trainer.ref_model.named_parameters()]
            if trainer.ref_model
            else []
        )
        return {name: p.detach().clone() for name, p in every}

    def watched(self, *args, **kwargs):
        before = frozen(self)
        result = train_first(self, *args, **kwargs)
        compared.append((before, frozen(self)))
        return result

    monkeypatch.setattr(dpotrainer.PreferenceTrainer, "train", watched)
    train(request.getfixturevalue(start), learning_rate=0.01, **settings)
    before, after = compared[0]
    part = {"copy": "reference.", "auto": "base_layer"}[settings.get("reference", "auto")]
    if start == "sft":
        part = ".ref."
    assert sum(part in name for name in before) >= 14
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


# ------------------------------------------------------------------------------------------------------- objectives
# Each formula takes the log ratios log pi - log pi_ref of chosen and rejected, (N,) each in nats, and what else it
# needs: b beta, n their lengths in tokens (N, 2), e label smoothing, t the discopop temperature, x the mean log pi of
# the chosen tokens.
FORMULAS = {
    "sigmoid": lambda c, r, b, **_: -logsigmoid(b * (c - r)),  # 2305.18290, eq. 7
    "hinge": lambda c, r, b, **_: (1 - b * (c - r)).clamp(min=0),  # 2305.10425
    "ipo": lambda c, r, b, n, **_: (
        (c / n[:, 0] - r / n[:, 1] - 1 / (2 * b)) ** 2
    ),  # 2310.12036, eq. 17, per token
    "robust": lambda c, r, b, e, **_: (
        (-(1 - e) * logsigmoid(b * (c - r)) + e * logsigmoid(b * (r - c))) / (1 - 2 * e)
    ),  # 2403.00409
    "exo_pair": lambda c, r, b, e, **_: kl(torch.sigmoid(b * (c - r)), 1 - e),  # 2402.00856, eq. 16
    "nca_pair": lambda c, r, b, **_: (
        -logsigmoid(b * c) - 0.5 * logsigmoid(-b * c) - 0.5 * logsigmoid(-b * r)
    ),  # 2402.05369
    "bco_pair": lambda c, r, b, **_: (
        -logsigmoid(b * c) - logsigmoid(-b * r)
    ),  # 2404.04656, without the shift
    "sppo_hard": lambda c, r, b, **_: (
        (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2
    ),  # 2405.00675, eq. 4.7
    "aot_unpaired": lambda c, r, b, e, **_: smooth(
        b * (c.sort().values - r.sort().values), e
    ),  # 2406.05882
    "apo_zero": lambda c, r, b, **_: (
        1 - torch.sigmoid(b * c) + torch.sigmoid(b * r)
    ),  # 2408.06266, eq. 7
    "apo_down": lambda c, r, b, **_: (
        torch.sigmoid(b * c) + 1 - torch.sigmoid(b * (c - r))
    ),  # 2408.06266, eq. 8
    "discopop": lambda c, r, b, t, **_: blend(
        b * (c - r), torch.sigmoid(b * (c - r) / t)
    ),  # 2406.08414, eq. 5
    "sft": lambda c, r, b, x, **_: -x.mean().expand(len(c)),
    "sigmoid_norm": lambda c, r, b, n, **_: (
        -logsigmoid(b * (c / n[:, 0] - r / n[:, 1]))
    ),  # 2405.14734
}


def kl(p, q):
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def smooth(logits, e):
    return -(1 - e) * logsigmoid(logits) - e * logsigmoid(-logits)


def blend(logits, share):
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


@pytest.fixture(scope="module")
def first_step(base, sft, data):
    """What the first step on all pairs starts from, in float64: the SFT adapter as policy, the base as reference."""
    pairs, tokenizer = tiny.read_pairs(data / "train.jsonl"), AutoTokenizer.from_pretrained(base)
    policy = tiny.load_policy(base, sft)
    for name, weight in policy.named_parameters():
        weight.requires_grad_("lora_" in name)
    logps = tiny.answer_logps(policy, tokenizer, pairs)
    with torch.no_grad():
        reference = tiny.answer_logps(tiny.load_policy(base), tokenizer, pairs)
    lengths = torch.tensor(
        [
            [len(ids) - start for ids, start in tiny.encode_pair(tokenizer, pair, 96)]
            for pair in pairs
        ]
    )
    return policy, logps, reference, lengths


def expected_step(first_step, losses, weights, beta, e, t):
    """(loss, norm of its gradient with respect to the adapter, rewards (N, 2))."""
    policy, logps, reference, lengths = first_step
    (c, r), tokens = (logps - reference).T, lengths[:, 0].sum()
    terms = {"b": beta, "n": lengths, "e": e, "t": t, "x": logps[:, 0].sum() / tokens}
    if "aot" in losses:  # sorts policy and reference apart (2406.05882)
        FORMULAS["aot"] = lambda c, r, b, e, **_: smooth(
            b
            * (
                (logps[:, 0] - logps[:, 1]).sort().values
                - (reference[:, 0] - reference[:, 1]).sort().values
            ),
            e,
        )
    loss = sum(
        weight * FORMULAS[name](c, r, **terms).mean()
        for name, weight in zip(losses, weights, strict=True)
    )
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, retain_graph=True)
    return (
        loss.item(),
        torch.stack([g.norm() for g in gradients]).norm().item(),
        (beta * (logps - reference)).detach(),
    )


OBJECTIVES = [
    ([name], [1.0], beta, e)
    for name, betas, e in (
        ("sigmoid", (0.05, 0.1, 0.5), 0.0),
        ("hinge", (0.05, 0.5), 0.0),
        ("ipo", (0.05, 0.5), 0.0),
        ("robust", (0.05, 0.5), 0.1),
        ("robust", (0.1,), 0.0),
        ("exo_pair", (0.1,), 1e-3),
        ("nca_pair", (0.1,), 0.0),
        ("bco_pair", (0.1,), 0.0),
        ("sppo_hard", (0.1,), 0.0),
        ("aot", (0.1,), 0.2),
        ("aot_unpaired", (0.1,), 0.2),
        ("apo_zero", (0.1,), 0.0),
        ("apo_down", (0.1,), 0.0),
        ("discopop", (0.1,), 0.0),
        ("sft", (0.1,), 0.0),
        ("sigmoid_norm", (2.0,), 0.0),
    )
    for beta in betas
]
OBJECTIVES += [
    (["sigmoid", "sft"], [1.0, 0.2], 0.1, 0.0),
    (["hinge", "ipo", "bco_pair"], [0.5, 0.01, 2.0], 0.1, 0.0),
]


@pytest.mark.parametrize(
    "losses, weights, beta, e",
    OBJECTIVES,
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, list) else str(x),
)
def test_every_objective_has_the_value_and_gradient_of_its_paper(
    losses, weights, beta, e, base, sft, first_step, train
):
    loss, gradient, rewards = expected_step(first_step, losses, weights, beta, e, 0.05)
    more = {"loss_weights": weights} if len(losses) > 1 else {}
    more |= {"label_smoothing": e} if e else {}
    output, _ = train(
        sft,
        reference="copy",
        ref_model_name_or_path=base,
        loss_type=losses,
        beta=beta,
        max_steps=1,
        global_batch_size=16,
        per_device_train_batch_size=16,
        eval_strategy="no",
        **more,
    )
    row = tiny.read_metrics(output)[0]
    assert abs(row["loss"] - loss) <= 2e-5 * max(1, abs(loss)), (row["loss"], loss)
    assert abs(row["grad_norm"] - gradient) <= 1e-4 * max(1, gradient), (row["grad_norm"], gradient)
    expected = {
        "chosen": rewards[:, 0],
        "rejected": rewards[:, 1],
        "margins": rewards[:, 0] - rewards[:, 1],
    }
    expected = {name: values.mean().item() for name, values in expected.items()}
    expected["accuracies"] = (rewards[:, 0] > rewards[:, 1]).double().mean().item()
    assert 0 < expected["accuracies"] < 1 and abs(expected["margins"]) > 1e-3, "says nothing"
    for name, value in expected.items():
        assert abs(row[f"rewards/{name}"] - value) < 1e-4, name


def test_every_objective_of_trl_is_tried_here():
    """Their names stand in the help of TRL's setting."""
    listed = next(f for f in dataclasses.fields(DPOConfig) if f.name == "loss_type").metadata[
        "help"
    ]
    named = set(re.findall(r"`'(\w+)'`", listed))
    assert {name for losses, *_ in OBJECTIVES for name in losses} == named


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "sft"])
def test_the_evaluation_has_the_loss_of_its_objective(loss_type, base, sft, data, train):
    """The mean over the held-out pairs of each pair's own loss, whatever the batch."""
    e = 0.1 if loss_type == "robust" else 0.0
    more = {"label_smoothing": e} if e else {}
    output, _ = train(
        sft,
        loss_type=loss_type,
        max_steps=1,
        per_device_eval_batch_size=3,
        reference="copy",
        ref_model_name_or_path=base,
        **more,
    )
    pairs, tokenizer = tiny.read_pairs(data / "test.jsonl"), AutoTokenizer.from_pretrained(base)
    lengths = torch.tensor(
        [
            [len(ids) - start for ids, start in tiny.encode_pair(tokenizer, pair, 96)]
            for pair in pairs
        ]
    )
    with torch.no_grad():
        policy, reference = (
            tiny.answer_logps(model, tokenizer, pairs)
            for model in (tiny.load_policy(base, output), tiny.load_policy(base))
        )
    c, r = (policy - reference).T
    each = [
        FORMULAS[loss_type](
            c[i : i + 1],
            r[i : i + 1],
            b=0.1,
            n=lengths[i : i + 1],
            e=e,
            x=policy[i, 0] / lengths[i, 0],
        )
        for i in range(len(pairs))
    ]
    assert abs(tiny.evaluations(output)[-1]["eval_loss"] - torch.cat(each).mean()) < 1e-4


def test_ties_count_as_wrong_also_held_out(base, train):
    """Before the first step all margins are 0."""
    output, _ = train(base, max_steps=1, eval_on_start=True)
    first, last = tiny.evaluations(output)
    assert abs(first["eval_loss"] - LN2) < 1e-6 and first["eval_rewards/margins"] == 0
    assert first["eval_rewards/accuracies"] == first["eval_rewards/accuracies_low"] == 0
    assert last["eval_rewards/accuracies"] > 0


# ------------------------------------------------------------------ reference log-probs before training
@pytest.mark.parametrize("start", ["base", "sft"])
def test_log_probs_computed_before_training_change_nothing(
    start, base, data, train, request, merged_sft
):
    model = request.getfixturevalue(start)
    without, _ = train(model, "without", num_train_epochs=2)
    before, _ = train(model, "before", num_train_epochs=2, precompute_ref_log_probs=True)
    close(without, before, 1e-6)
    check_evaluation(before, base, data, base if start == "base" else merged_sft)


def test_a_sweep_computes_them_once(base, train, tmp_path, monkeypatch):
    """Runs that share pairs, model and seed find TRL's file."""
    calls = []
    pairs = tmp_path / "pairs"
    tiny.make_pairs(pairs / "train.jsonl", 16, seed=time.time_ns())
    tiny.make_pairs(pairs / "test.jsonl", 5, seed=4)
    compute = dpotrainer.PreferenceTrainer.compute_ref_log_probs

    def counted(self, *args):
        calls.append(1)
        return compute(self, *args)

    monkeypatch.setattr(dpotrainer.PreferenceTrainer, "compute_ref_log_probs", counted)
    train(base, "first", data=pairs, max_steps=1, precompute_ref_log_probs=True, beta=0.1)
    assert calls
    calls.clear()
    again, _ = train(
        base, "again", data=pairs, max_steps=3, precompute_ref_log_probs=True, beta=0.3
    )
    assert not calls
    close(train(base, "without", data=pairs, max_steps=3, beta=0.3)[0], again, 1e-6)


# ------------------------------------------------------------------------------------------- what comes after training
@pytest.mark.parametrize("start", ["base", "sft"])
def test_the_merged_model_is_the_policy(start, base, data, train, request):
    output, printed = train(request.getfixturevalue(start), merge=True, learning_rate=0.01)
    assert "merged" in printed
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float64).eval()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert {path.name for path in (output / "merged").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer, last = AutoTokenizer.from_pretrained(output / "merged"), tiny.evaluations(output)[-1]
    pairs = tiny.read_pairs(data / "test.jsonl")
    with torch.no_grad():
        logps = tiny.answer_logps(merged, tokenizer, pairs).mean(0)
        assert (
            abs(last["eval_logps/chosen"] - logps[0]) < 1e-3
            and abs(last["eval_logps/rejected"] - logps[1]) < 1e-3
        )
        policy = tiny.load_policy(base, output)
        ids = torch.tensor([tiny.encode_pair(tokenizer, pairs[0], 96)[0][0]])
        assert torch.allclose(merged(input_ids=ids).logits, policy(input_ids=ids).logits, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- other models
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma", "qwen2"])
def test_other_architectures_train_alike(architecture, data, train, tmp_path):
    model = tiny.make_model(tmp_path / architecture, architecture)
    output, printed = train(model)
    assert re.search(r"prefixes +shared", printed)
    assert abs(tiny.losses(output)[1] - LN2) < 1e-6
    check_evaluation(output, model, data, model)


def test_answers_and_pairs_fit_the_positions_of_the_model(base, data, train, tmp_path):
    """A prompt and an answer of 256 tokens would not."""
    model = tiny.make_model(tmp_path / "short", max_position_embeddings=100)
    output, _ = train(model, max_steps=1, sample_prompts=4)
    tokens = [
        int(n)
        for n in re.findall(r"\*\*policy\*\*, (\d+) tokens", (output / "samples.md").read_text())
    ]
    assert len(tokens) == 4 and 0 < max(tokens) < 100
    _, printed = train(model, "long", status=2, max_length=101)
    assert "max_length=101" in printed and "positions for 100 tokens; lower it" in printed


def test_a_router_loss_is_not_shared_and_not_part_of_the_evaluation(data, train, tmp_path):
    experts = {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    }
    model = tiny.make_model(tmp_path / "model", "qwen3_moe", **experts)
    output, printed = train(model, "run", router_aux_loss_coef=0.1, learning_rate=1e-9)
    assert re.search(r"prefixes +rows apart: .*router", printed)
    assert tiny.losses(output)[1] > LN2 + 0.05, "the router's loss is trained on"
    assert abs(tiny.evaluations(output)[-1]["eval_loss"] - LN2) < 1e-4, (
        "nothing moved: the pairs' loss alone is ln 2"
    )


# -------------------------------------------------------------------------------------------------------- the order
def test_passes_of_a_step_are_balanced_and_no_pair_changes_its_step():
    """Against the same random order, undealt: 200 pairs of very different sizes, 8 passes of 4 in each step."""
    rng = np.random.default_rng(0)
    tokens = rng.lognormal(6, 0.6, 200).astype(int)
    sampler = dpotrainer.BalancedSampler(tokens, pairs_per_pass=4, passes_per_step=8, seed=3)
    undealt = dpotrainer.BalancedSampler(
        np.ones(200, int), pairs_per_pass=4, passes_per_step=8, seed=3
    )
    dealt, plain = np.array(list(sampler)), np.array(list(undealt))
    assert dealt.shape == (56, 4) and len(sampler) == 56 and set(dealt.flat) == set(range(200))
    for at in range(0, 56, 8):
        assert sorted(dealt[at : at + 8].flat) == sorted(plain[at : at + 8].flat)
    balanced = tokens[dealt].sum(1).reshape(-1, 8)
    unbalanced = tokens[plain].sum(1).reshape(-1, 8)
    assert ((balanced.max(1) / balanced.mean(1)) < (unbalanced.max(1) / unbalanced.mean(1))).all()
    assert np.ptp(balanced, 1).mean() < 0.25 * np.ptp(unbalanced, 1).mean()
    sampler.set_epoch(1)
    other = np.array(list(sampler))
    assert set(other.flat) == set(range(200)) and (other != dealt).any()
    sampler.set_epoch(0)
    assert (np.array(list(sampler)) == dealt).all()


@pytest.mark.parametrize("count, size, passes", [(35, 4, 4), (3, 2, 8), (48, 4, 4), (1, 1, 1)])
def test_the_last_step_of_an_epoch_is_filled_up_with_pairs_from_its_start(count, size, passes):
    """Every step has the pairs that it has with one process; none is left out, none comes more than once too often."""
    sampler = dpotrainer.BalancedSampler(np.ones(count, int), size, passes, seed=0)
    order = np.array(list(sampler)).flatten().tolist()
    step = size * passes
    assert (
        len(order) == len(sampler) * size and len(order) % step == 0 and len(order) - count < step
    )
    times = np.bincount(order, minlength=count)
    assert len(times) == count and times.min() >= 1 and times.max() - times.min() <= 1
    assert {i for i in range(count) if times[i] > times.min()} <= set(order[:step])
    alone = np.array(
        list(dpotrainer.BalancedSampler(np.ones(count, int), 1, step, seed=0))
    ).flatten()
    for at in range(0, len(order), step):
        assert sorted(order[at : at + step]) == sorted(alone[at : at + step])


def test_compiled_layers_train_the_same(base, data, train):
    """Traced by dynamo, run as traced; the adapter's names are those of an uncompiled model."""
    frames = torch._dynamo.utils.counters["frames"]
    plain, _ = train(base, "plain")
    traced = frames["ok"]
    compiled, _ = train(base, "compiled", torch_compile=True, torch_compile_backend="eager")
    assert frames["ok"] > traced
    close(compiled, plain, 1e-5)
    names = [set(load_file(folder / "adapter_model.safetensors")) for folder in (plain, compiled)]
    assert names[0] == names[1]
    torch._dynamo.reset()


def test_nothing_in_the_program_names_a_model_but_the_constants():
    source = tiny.PROGRAM.read_text(encoding="utf-8")
    beyond = source.split("end of edits")[1]
    assert not re.search(
        r"qwen[23]?[-_ /]?\d*b?-?\b",
        re.sub(r'""".*?"""|#.*', "", beyond, flags=re.DOTALL).replace("qwen3_8b_qlora", ""),
        re.IGNORECASE,
    )


# ---------------------------------------------------------------------------------------------------- plain strings
def test_chat_strings_are_wrapped_in_the_template(base, train, tmp_path):
    """The same pairs as strings and as messages are the same run; as raw text they are another one."""
    rows = []
    for seed in range(40):
        pair = tiny.make_pair(random.Random(seed))
        if len(pair["prompt"]) == 1:
            rows.append(pair)
    strings = [{name: side[0]["content"] for name, side in pair.items()} for pair in rows]
    for name, content in (("messages", rows), ("strings", strings)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in content)
        )
    messages, _ = train(base, "a", data=tmp_path / "messages", eval_pairs=4)
    wrapped, _ = train(base, "b", data=tmp_path / "strings", eval_pairs=4, chat_strings=True)
    raw, _ = train(base, "c", data=tmp_path / "strings", eval_pairs=4)
    assert tiny.read_metrics(wrapped) == tiny.read_metrics(messages) != tiny.read_metrics(raw)
    assert abs(tiny.losses(raw)[1] - LN2) < 1e-6


# ------------------------------------------------------------------------------------------------- what goes wrong
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(
    base, data, train, tmp_path, monkeypatch
):
    def spoil(self, model, inputs, *args):
        loss = step(self, model, inputs, *args)
        weight = next(p for p in self.model.parameters() if p.grad is not None)
        weight.grad.fill_(torch.inf)
        return loss

    step = dpotrainer.PreferenceTrainer.training_step
    monkeypatch.setattr(dpotrainer.PreferenceTrainer, "training_step", spoil)
    _, printed = train(base, status=1)
    assert "gradient is not finite at step 1" in printed and "Traceback" not in printed


def test_an_overflow_is_left_to_the_scaler_of_fp16():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), torch.inf)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=object()), model=torch.nn.ParameterList([weight])
    )
    dpotrainer.Keeper(trainer).on_pre_optimizer_step(None, None, None)


def damage_weights(folder, change):
    """Rewrite a model's or an adapter's file of weights."""
    path = next(folder.glob("*model.safetensors"))
    weights = change(load_file(path))
    save_file(weights, path, metadata={"format": "pt"})


def without_a_layer(weights):
    return {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}


def with_another_prefix(weights):
    return {
        name.replace("base_model.model.", "base_model.model.model."): w
        for name, w in weights.items()
    }


def with_another_shape(weights):
    name = min(name for name in weights if "layers." in name)
    return weights | {name: torch.zeros(2, *weights[name].shape[1:])}


def with_one_more(weights):
    return weights | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "change, told",
    [
        (without_a_layer, "3 weights are missing"),
        (with_one_more, "1 weights are missing, left over"),
        (with_another_shape, "1 weights are missing, left over or of another shape"),
    ],
)
def test_weights_that_are_not_the_model_s_are_refused(change, told, base, train, tmp_path):
    damaged = shutil.copytree(base, tmp_path / "damaged")
    damage_weights(damaged, change)
    _, printed = train(damaged, status=2)
    assert told in printed and "layers." in printed and "Traceback" not in printed


@pytest.mark.parametrize("change", [with_another_prefix, without_a_layer, with_another_shape])
def test_an_adapter_that_does_not_fit_its_base_is_refused(change, sft, train, tmp_path):
    damaged = shutil.copytree(sft, tmp_path / "damaged")
    damage_weights(damaged, change)
    _, printed = train(damaged, status=2)
    assert "weights are missing" in printed and "lora_" in printed
    assert "Traceback" not in printed


def test_dropout_kept_as_a_number_is_off_and_the_first_loss_is_ln_2(data, train, tmp_path):
    """Llama's attention_dropout is a number in the layer, not a module."""
    model = tiny.make_model(tmp_path / "model", "llama", attention_dropout=0.5)
    output, _ = train(model, share_prefixes=False)
    assert abs(tiny.losses(output)[1] - LN2) < 1e-6
    check_evaluation(output, model, data, model)


def test_the_frozen_copy_of_an_sft_adapter_drops_nothing(
    base, sft, merged_sft, data, train, tmp_path
):
    """Its dropout would make the reference random: evaluation mode, whatever the policy does."""
    dropping = shutil.copytree(sft, tmp_path / "dropping")
    config = json.loads((dropping / "adapter_config.json").read_text())
    (dropping / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    output, _ = train(dropping)
    assert abs(tiny.losses(output)[1] - LN2) < 1e-6
    noisy, _ = train(dropping, "noisy", disable_dropout=False)
    assert abs(tiny.losses(noisy)[1] - LN2) > 1e-3, "the policy drops"
    check_evaluation(noisy, base, data, merged_sft)


def test_the_reference_is_the_same_at_each_of_its_passes(sft, build, tmp_path):
    """In training, too, where the policy's dropout is on."""
    dropping = shutil.copytree(sft, tmp_path / "dropping")
    config = json.loads((dropping / "adapter_config.json").read_text())
    (dropping / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    trainer = build(dropping, disable_dropout=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    first = trainer.compute_ref_log_probs(trainer.model, dict(batch))
    second = trainer.compute_ref_log_probs(trainer.model, dict(batch))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert trainer.model.training


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    sampler = dpotrainer.BalancedSampler(np.arange(1, 41), 4, 2, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([pair for dealt in sampler for pair in dealt])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    steps = [{*order[:8]} for order in orders]
    assert steps[0] != steps[1], "not only another order within each step"


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(base, train, tmp_path):
    larger = shutil.copytree(base, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(larger)
    _, printed = train(larger, status=2)
    assert "422 tokens" in printed and "420" in printed and "resize_token_embeddings" in printed


def test_a_tokenizer_without_eos_is_refused(base, train, tmp_path):
    endless = shutil.copytree(base, tmp_path / "endless")
    config = json.loads((endless / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no eos_token" in train(endless, status=2)[1]


def test_rows_longer_than_the_positions_are_refused_without_max_length(data, train, tmp_path):
    model = tiny.make_model(tmp_path / "short", max_position_embeddings=20)
    _, printed = train(model, status=2, max_length="null")
    assert "max_length=null" in printed and "positions for 20" in printed


def test_a_reference_of_another_family_is_refused(base, train, tmp_path):
    other = tiny.make_model(tmp_path / "other", vocab_size=500)
    _, printed = train(base, status=2, reference="copy", ref_model_name_or_path=other)
    assert "another vocabulary" in printed and str(other) in printed


def test_lora_on_tied_embeddings_is_not_merged(base, train):
    """The head's own weight would get the update of the embedding: another model."""
    output, printed = train(
        base,
        status=1,
        merge=True,
        lora_target_modules=["embed_tokens", "q_proj"],
        learning_rate=0.1,
    )
    assert "tied embeddings" in printed and "nats a token off" in printed
    assert (output / "adapter_model.safetensors").exists() and not (output / "merged").exists()
    assert not list(output.glob("merged*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True},
        {"early_stopping_patience": 2},
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"eval_on_start": True},
    ],
    ids=str,
)
def test_what_needs_an_evaluation_needs_pairs_that_are_held_out(
    settings, base, data, train, tmp_path
):
    shutil.copy(data / "train.jsonl", tmp_path / "train.jsonl")
    _, printed = train(base, status=2, data=tmp_path / "train.jsonl", eval_pairs=0, **settings)
    name, value = next(iter(settings.items()))
    assert f"{name}={value}: no pairs are held out" in printed and "eval_pairs" in printed


def test_a_merge_compares_rows_that_the_model_has_positions_for(data, train, tmp_path):
    """Held-out answers may be longer than max_length; GPT-2 has no positions beyond its own."""
    model = tiny.make_model(tmp_path / "short", "gpt2", max_position_embeddings=60)
    pairs = tiny.read_pairs(data / "test.jsonl")
    for pair in pairs:
        pair["chosen"][-1]["content"] *= 12
    long = tmp_path / "long"
    shutil.copytree(data, long)
    Path(long, "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    output, printed = train(
        model, data=long, max_length=60, merge=True, max_steps=1, sample_prompts=0
    )
    assert "merged into" in printed and (output / "merged" / "model.safetensors").exists()


def test_a_finished_run_merges(base, train):
    output, _ = train(base)
    before = tiny.hash_file(output / "adapter_model.safetensors")
    _, printed = train(base, merge=True)
    assert "nothing to train" in printed and "merged into" in printed
    assert (output / "merged" / "model.safetensors").exists() and (
        output / "merged" / "tokenizer.json"
    ).exists()
    assert tiny.hash_file(output / "adapter_model.safetensors") == before


def test_a_gpu_without_room_for_a_merge_keeps_the_run(base, train, monkeypatch):
    output, _ = train(base)

    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dpotrainer, "load_causal_lm", fail)
    _, printed = train(base, status=1, merge=True)
    assert "merge=true: the GPU has no room for the whole model in float32" in printed
    assert (
        "--overwrite" not in printed.partition("merge=true")[2] and (output / "README.md").exists()
    )


def test_a_metric_that_there_is_not_is_told_before_training(base, train):
    metric = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    output, printed = train(base, status=2, **metric)
    assert "metric_for_best_model=accuracy: must be one of loss, rewards/chosen, " in printed
    assert not output.exists()


def test_the_held_out_metrics_are_those_that_are_logged(base, train):
    output, _ = train(base)
    [row] = tiny.evaluations(output)[-1:]
    assert {f"eval_{name}" for name in dpotrainer.HELD_OUT_METRICS} == row.keys() - {
        "step",
        "epoch",
    }


def test_the_base_that_an_adapter_pins_is_the_one_that_is_loaded(sft, data, tmp_path, monkeypatch):
    pinned = shutil.copytree(sft, tmp_path / "pinned")
    config = json.loads((pinned / "adapter_config.json").read_text())
    (pinned / "adapter_config.json").write_text(json.dumps(config | {"revision": "v2"}))
    asked, load = {}, dpotrainer.transformers.AutoConfig.from_pretrained

    def watched(name, revision, **options):
        asked[str(name)] = revision
        return load(name, **options)

    monkeypatch.setattr(dpotrainer.transformers.AutoConfig, "from_pretrained", watched)
    dpotrainer.load_start(dpotrainer.read_settings(tiny.settings(pinned, data, tmp_path / "out")))
    assert asked[config["base_model_name_or_path"]] == "v2"


def test_a_prompt_learning_adapter_is_refused(base, data, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "a")
    assert dpotrainer.run(tiny.settings(tmp_path / "a", data, tmp_path / "out")) == 2
    assert "prompt-learning adapter; start from its base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
