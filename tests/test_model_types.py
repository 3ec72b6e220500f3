"""Types of models: those that TRL cannot train are refused, those that it can give the log-probs of
plain transformers, each row by itself, without TRL and without padding.

test_shared_prefixes.py compares with rows apart, which go through TRL's head and collator as well.
"""

import functools
import re

import pytest
import tiny
import torch
from benchmarks import model_types
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import dpotrainer

TYPES = (
    "mistral",  # a window in each layer
    "gemma3_text",  # windows in most layers, another rotation in the others
    "cohere2",  # no positions in the layers without a window; scaled logits
    "granite",  # scaled logits
    "opt",  # learned positions that begin at two
    "granitemoe",  # experts
    "deepseek_v3",  # keys and values of different widths
)
MAX_LENGTH = tiny.FAST["max_length"]


def answer_logps(trainer, rows: list[dict]) -> torch.Tensor:
    """Log-probs of the answers' tokens, chosen rows first, as the trainer computes them."""
    batch = trainer.data_collator(rows)
    assert "layout" in batch
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    found = trainer.model(**batch, labels=labels, fused_lm_head=True).log_probs
    return found[labels[:, 1:] != -100]


def lone_logps(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """The same from the logits of one row after the other."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([(row["prompt_ids"] + row[side])[:MAX_LENGTH]])
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            scored = logps.gather(1, ids[0, 1:, None])[:, 0]
            found.append(scored[len(row["prompt_ids"]) - 1 :])
    return torch.cat(found)


def load_again(trainer, folder) -> torch.nn.Module:
    trainer.model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


def compare(kind: str, folder) -> float:
    """The largest difference of a log-prob, in nats."""
    model_types.save_model(kind, folder)
    tiny.make_pairs(folder / "pairs.jsonl", model_types.PAIRS)
    sharing, trainer = model_types.build_trainer(folder, True)
    assert sharing.is_used, sharing.line
    model_types.move_adapter(trainer)
    trainer.model.eval()
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: row[name] for name in columns} for row in trainer.train_dataset]
    with torch.no_grad():
        ours = answer_logps(trainer, rows)
        lone = lone_logps(load_again(trainer, folder), rows)
    assert len(ours) == len(lone) > 100
    return (ours - lone).abs().max().item()


@pytest.mark.parametrize("kind", TYPES)
def test_shared_prefixes_give_the_log_probs_of_plain_transformers(kind, tmp_path):
    assert compare(kind, tmp_path) <= 1e-5


def test_a_forgotten_window_would_be_seen(tmp_path, monkeypatch):
    """The proofs switched off: the comparison above has to fail."""
    attend = dpotrainer.attend_one_by_one
    believed = dpotrainer.Sharing(True, "shared, not checked")

    def forget_window(query, key, value, layout, window, scale):
        return attend(query, key, value, layout, None, scale)

    def believe(model, *_):
        dpotrainer.share_prefixes(model)
        return believed

    monkeypatch.setattr(dpotrainer, "attend_one_by_one", forget_window)
    monkeypatch.setattr(dpotrainer, "check_sharing", lambda *_: believed)
    monkeypatch.setattr(dpotrainer, "prove_sharing", believe)
    assert compare("mistral", tmp_path) > 1e-2


# ---- refused before any weight is read
@pytest.fixture
def try_out(tmp_path, capsys):
    """try_out(kind, settings, **config): what the command says of a type of whose model only the
    configuration is there, at full size.
    """

    def run(kind: str, settings: dict | None = None, **config) -> str:
        model_types.save_config(kind, tmp_path, **config)
        pairs = tiny.make_pairs(tmp_path / "pairs.jsonl", model_types.PAIRS)
        flags = tiny.settings(tmp_path, pairs, tmp_path / "out", **settings or {})
        assert dpotrainer.run(flags) == 2
        return capsys.readouterr().err.rpartition("dpotrainer: ")[2]

    return run


GOES_ASTRAY = "cannot train the type .*; take another model\n  .* in TRL are .* nats off its own"
REFUSED = {  # type, its configuration, what is said of it
    "a head with a layer of its own": ("roberta", {"is_decoder": True}, GOES_ASTRAY),
    "the same in a decoder": ("modernbert-decoder", {}, GOES_ASTRAY),
    "soft-capping under another name": ("recurrent_gemma", {}, GOES_ASTRAY),
    "tokens that see later ones": ("bert-generation", {}, GOES_ASTRAY),
    "a head of another width": ("rembert", {}, "cannot train the type rembert.*\n  RuntimeError: "),
    "no hidden states": ("llama4", {}, "cannot train .*\n  AttributeError: .*last_hidden_state"),
    "a router that LoRA breaks": (
        "phimoe",
        {"router_aux_loss_coef": 0.0},
        "^lora_target_modules=all-linear: TRL cannot train .* there.*\n  AttributeError: ",
    ),
    "names that PEFT loses": (
        "laguna",
        {},
        "^lora_target_modules=all-linear: PEFT would not load .*\n  6 weights are lost",
    ),
    "Mamba's layers": ("mamba", {}, "cannot be built: .*incompatible with Mamba"),
    "a router loss without its number of experts": (
        "granitemoe",
        {"router_aux_loss_coef": 0.02},
        "^router_aux_loss_coef=0.02: TRL has no router loss for the type granitemoe; set it to 0",
    ),
    "a router loss without a router": ("doge", {}, "^router_aux_loss_coef=0.001: .*; set it to 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_trl_cannot_train_is_refused_before_its_weights_are_read(name, try_out):
    kind, config, told = REFUSED[name]
    assert re.search(told, try_out(kind, **config))


SHALLOW = {"num_hidden_layers": 4}
TRAINED = {  # type, its configuration, settings
    "scaled and soft-capped logits": ("gemma2", SHALLOW | {"final_logit_softcapping": 5.0}, {}),
    "multiplied logits": ("cohere", SHALLOW | {"logit_scale": 0.0625}, {}),
    "divided logits": ("granite", SHALLOW | {"logits_scaling": 8.0}, {}),
    "logits multiplied under another name": ("hyperclovax", SHALLOW | {"logits_scaling": 0.2}, {}),
    "a decoder made of an encoder": ("bert-generation", SHALLOW | {"is_decoder": True}, {}),
    "a router loss": ("qwen3_moe", SHALLOW, {"router_aux_loss_coef": 0.02}),
    "a router loss switched off": ("granitemoe", {}, {"router_aux_loss_coef": 0.0}),
    "LoRA beside the router": (
        "phimoe",
        {"router_aux_loss_coef": 0.0},
        {"lora_target_modules": ["q_proj", "v_proj"]},
    ),
    "LoRA where PEFT loads it": ("laguna", {}, {"lora_target_modules": ["q_proj", "v_proj"]}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_trl_can_train_goes_on_to_its_weights(name, try_out):
    kind, config, settings = TRAINED[name]
    assert "cannot be loaded: " in try_out(kind, settings, **config)


def test_a_head_that_trl_gets_wrong_is_refused(try_out, monkeypatch):
    add_head = functools.partial(dpotrainer.add_fused_lm_head, temperature=1.05)
    monkeypatch.setattr(dpotrainer, "add_fused_lm_head", add_head)
    assert re.search(GOES_ASTRAY, try_out("qwen3"))


def test_a_model_that_cannot_be_made_small_is_not_refused(try_out, monkeypatch):
    def fail(config):
        raise ValueError("an odd one")

    monkeypatch.setattr(dpotrainer, "make_miniature", fail)
    assert "cannot be loaded: " in try_out("roberta")


def test_a_miniature_is_not_tried_where_deepspeed_would_gather_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    dpotrainer.check_architecture(None, None, None)


def test_a_router_loss_is_refused_where_there_is_no_router(try_out):
    told = try_out("qwen3", {"router_aux_loss_coef": 0.1})
    assert told == "router_aux_loss_coef=0.1: a qwen3 has no router to train; leave it out\n"


def test_a_model_of_several_texts_is_refused(tmp_path, capsys):
    AutoConfig.for_model("musicgen").save_pretrained(tmp_path)
    pairs = tiny.make_pairs(tmp_path / "pairs.jsonl", 4)
    assert dpotrainer.run(tiny.settings(tmp_path, pairs, tmp_path / "out")) == 2
    assert "cannot be read: Multiple valid text configs" in capsys.readouterr().err
