"""Shared prefixes: the packed row against TRL's padded rows, and against a dense forward of each
row by itself.
"""

import copy
import functools
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from benchmarks import model_types
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import dpotrainer

VOCABULARY = 64
ARCHITECTURES = {  # four query heads each, over one, two or four key heads; windows of five tokens
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen2": {
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"num_key_value_heads": 2, "sliding_window": 5},
}
LOSS_TYPES = (
    *(
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
    ),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
)
METRICS += (
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


def pair(prompt, chosen, rejected):
    return {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}


def random_pairs(count, seed, longest=12):
    draw = torch.Generator().manual_seed(seed)

    def ids(least):
        size = int(torch.randint(least, longest + 1, (1,), generator=draw))
        return torch.randint(3, VOCABULARY, (size,), generator=draw).tolist()

    return [pair(ids(1), ids(1), ids(1)) for _ in range(count)]


BATCHES = {
    "answers that share a beginning": [
        pair([3, 4, 5], [6, 7, 8, 9], [6, 7, 10]),
        pair([9, 9], [9, 9, 4], [9, 5, 6]),
    ],
    "one answer a prefix of the other": [
        pair([3, 4], [5, 6], [5, 6, 7, 8]),
        pair([3, 4], [5, 6, 7, 8], [5, 6]),
    ],
    "answers equal but for their length of one": [
        pair([3, 4, 5], [6], [6, 7]),
        pair([8], [6, 7], [6]),
    ],
    "equal answers": [pair([3, 4, 5], [6, 7], [6, 7]), pair([3, 4], [8, 9, 10], [11])],
    "empty prompts": [
        pair([], [5, 6, 7], [5, 8]),
        pair([], [9, 3, 4], [10, 3]),
        pair([], [5], [6, 7]),
    ],
    "truncation": [
        pair(range(3, 20), range(20, 40), range(20, 50)),
        pair([3], range(3, 50), range(4, 60)),
    ],
    "very different lengths": [
        pair(range(3, 23), [4], [5]),
        pair([7], [8, 9], [10]),
        pair([3, 4], [5], range(3, 23)),
    ],
    "one pair": random_pairs(1, seed=1),
    "many pairs": random_pairs(9, seed=2),
}


class RawPairs(DPOTrainer):
    """The stock trainer over token ids: nothing to tokenize."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


@functools.cache
def tokenizer():
    words = {
        token: i
        for i, token in enumerate(["<pad>", "<eos>", "<bos>", *map(str, range(3, VOCABULARY))])
    }
    words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def tiny_model(architecture="qwen3", seed=0, **changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture, **{**sizes, **ARCHITECTURES.get(architecture, {}), **changes}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in (
        model.parameters()
    ):  # larger than a fresh model's, so that every token bears on what follows
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def lora(dropout=0.0):
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def move_adapter(model):
    """Give every LoRA a B other than zero, so that the policy is not its reference."""
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


def build_trainer(model, share, tmp_path, ref_model=None, adapter=lora, pairs=None, **options):
    """A DPO trainer over token ids, stock or with shared prefixes; its policy has moved away from
    its reference.
    """
    if share:
        dpotrainer.share_prefixes(model)
    options = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_length": 24,
        **options,
    }
    options = {
        "gradient_checkpointing": False,
        "label_smoothing": 0.1,
        "use_weighting": True,
        "beta": 0.5,
        **options,
    }
    options = {"use_cpu": True, "bf16": False, **options}
    arguments = DPOConfig(
        str(tmp_path), report_to=[], save_strategy="no", disable_tqdm=True, **options
    )
    collator = (dpotrainer.SharedPrefixCollator if share else DataCollatorForPreference)(0, 24)
    trainer = RawPairs(
        model,
        ref_model,
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_list(pairs or random_pairs(7, seed=3)),
        eval_dataset=Dataset.from_list(random_pairs(5, seed=4)),
        processing_class=tokenizer(),
        peft_config=adapter and adapter(),
    )
    move_adapter(trainer.model)
    return trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The stock trainer and ours, from the same weights."""
    folder = tmp_path_factory.mktemp("both")
    return build_trainer(tiny_model(), False, folder), build_trainer(tiny_model(), True, folder)


def set_loss(trainer, **attributes):
    """Set the trainer's loss, whatever the last test made of it."""
    plain = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "ld_alpha": None,
        "use_weighting": False,
    }
    plain |= {"f_divergence_type": "reverse_kl", "_total_train_tokens": 0}
    vars(trainer).update({**plain, **attributes})


def run_step(trainer, examples, loss_type="sigmoid", weighting=False, seed=0, **attributes):
    """One step: (loss, the trainer's metrics, the gradient of every trained weight)."""
    set_loss(trainer, loss_types=[loss_type], use_weighting=weighting, **attributes)
    trainer.model.train()
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    torch.manual_seed(seed)
    batch = trainer._prepare_inputs(trainer.data_collator([dict(example) for example in examples]))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name: w.grad.clone() for name, w in trainer.model.named_parameters() if w.grad is not None
    }
    return loss.item(), {name: trainer._metrics["train"][name][-1] for name in METRICS}, gradients


def same_gradients(ours, stock, tolerance=1e-4):
    assert ours.keys() == stock.keys() and len(stock) > 0
    for name, gradient in stock.items():
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


def same_step(ours, stock, tolerance=1e-5):
    """Loss and metrics to 1e-5 relative; gradients to 1e-4 of their norm.

    Metrics are differences of log-probs.
    """
    loss, metrics, gradients = ours
    scale = max(1.0, abs(stock[1]["logps/chosen"]), abs(stock[1]["logps/rejected"]))
    assert loss == pytest.approx(stock[0], rel=tolerance, abs=1e-6)
    for name in METRICS:
        smallest = tolerance * scale if name.startswith("rewards") else 1e-6
        assert metrics[name] == pytest.approx(stock[1][name], rel=tolerance, abs=smallest), name
    same_gradients(gradients, stock[2], 10 * tolerance)


def near_in_half_precision(ours, stock, exact):
    """Ours is about as near to the float32 step as stock's half-precision step is."""
    allowed = 2 * abs(stock[0] - exact[0]) + 0.02 * max(1, abs(exact[0]))
    assert abs(ours[0] - exact[0]) <= allowed
    for name in ("logps/chosen", "logps/rejected"):
        assert ours[1][name] == pytest.approx(exact[1][name], rel=0.02)
    flat = [
        torch.cat([step[2][name].float().flatten().cpu() for name in exact[2]])
        for step in (ours, stock, exact)
    ]
    errors = [(gradient - flat[2]).norm() / flat[2].norm() for gradient in flat[:2]]
    assert errors[0] <= 2 * errors[1] + 0.02


# --------------------------------------------------------------------------------------- the layout


def layout_of(examples, padding=0):
    batch = DataCollatorForPreference(0, 24)([dict(example) for example in examples])
    ids, mask = (
        torch.nn.functional.pad(batch[name], (0, padding))
        for name in ("input_ids", "attention_mask")
    )
    return ids, mask, dpotrainer.lay_out_packed_row(ids, mask)


tokens = st.lists(
    st.integers(3, 5), max_size=9
)  # three different ids, so that beginnings often agree
answers = st.lists(st.integers(3, 5), min_size=1, max_size=9)
some_pairs = st.lists(st.builds(pair, tokens, answers, answers), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(some_pairs, st.integers(0, 3))
def test_layout_holds_every_token_once_and_its_keys(examples, padding):
    ids, mask, layout = layout_of(examples, padding)
    count, rows = len(examples), [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    places = [row[keep.bool()].tolist() for row, keep in zip(layout["row_index"], mask)]
    packed, positions = layout["input_ids"][0].tolist(), layout["position_ids"][0].tolist()
    assert layout["row_index"].shape == ids.shape and layout["row_index"].min() >= 0
    assert layout["row_index"].max() < len(packed) == len(positions)
    for row, place in zip(
        rows, places
    ):  # each row reads its own tokens, each at the position it has in its row
        assert [packed[i] for i in place] == row
        assert [positions[i] for i in place] == list(range(len(row)))
    needed = []
    for chosen, rejected, a, b in zip(rows[:count], rows[count:], places[:count], places[count:]):
        limit = min(len(chosen), len(rejected)) - 1
        prefix = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
        assert a[:prefix] == b[:prefix]
        needed += a + b[prefix:]
    assert needed == list(range(len(packed)))  # every token of both rows once, the prefix once

    sequences = [
        place for both_places in zip(places[:count], places[count:]) for place in both_places
    ]
    queries, keys = layout["query_bounds"].tolist(), layout["key_bounds"].tolist()
    for i, place in enumerate(sequences):
        own_keys = layout["key_index"][keys[i] : keys[i + 1]].tolist()
        for query in range(queries[i], queries[i + 1]):  # causal, aligned at the bottom right
            seen = own_keys[: len(own_keys) - (queries[i + 1] - 1 - query)]
            assert seen == place[: place.index(query) + 1]
        assert layout["query_lengths"][i] == queries[i + 1] - queries[i]
        assert layout["key_lengths"][i] == keys[i + 1] - keys[i] == len(place)
    assert (
        queries[0] == keys[0] == 0
        and queries[-1] == len(packed)
        and keys[-1] == len(layout["key_index"])
    )


def test_layout_is_ready_for_the_kernel_and_never_makes_the_host_wait():
    _, _, layout = layout_of(random_pairs(3, seed=5))
    assert layout["query_bounds"].dtype == layout["key_bounds"].dtype == torch.int32
    assert all(
        type(length) is int for name in ("query", "key") for length in layout[f"{name}_lengths"]
    )
    assert min(layout["query_lengths"]) >= 1


def test_layout_points_padding_at_different_places():
    _, mask, layout = layout_of(
        [pair([3], [4], [5]), pair(range(3, 13), range(13, 23), range(23, 33))]
    )
    padding = layout["row_index"][mask == 0]
    assert padding.bincount().max() <= math.ceil(mask.numel() / layout["input_ids"].numel())


def test_collator_adds_one_entry_that_survives_the_way_to_the_model():
    from accelerate.utils import send_to_device
    from torch.nn.parallel.distributed import _to_kwargs

    examples = random_pairs(3, seed=6)
    stock = DataCollatorForPreference(0, 24)(examples)
    batch = dpotrainer.SharedPrefixCollator(0, 24)(examples)
    assert batch.keys() == stock.keys() | {"layout"}
    assert all(torch.equal(batch[name], stock[name]) for name in stock)
    for moved in (
        send_to_device(batch, "cpu"),
        _to_kwargs((), batch, torch.device("cpu"), False)[1][0],
    ):
        assert moved["layout"].keys() == batch["layout"].keys()
        assert moved["layout"]["query_lengths"] == batch["layout"]["query_lengths"]
        assert torch.equal(moved["layout"]["key_index"], batch["layout"]["key_index"])


# ------------------------------------------------------------------------------------ the attention


def dense_attention(query, key, value, layout, scaling=8**-0.5, window=None):
    """Each query against its keys one by one, in float64, straight from the definition."""
    groups = query.shape[1] // key.shape[1]
    keys = layout["key_bounds"].tolist()
    queries = layout["query_bounds"].tolist()
    outputs = []
    for i, (first, end) in enumerate(itertools.pairwise(queries)):
        for row in range(first, end):
            seen = layout["key_index"][keys[i] : keys[i + 1] - (end - 1 - row)]
            if window is not None:
                seen = seen[-window:]
            k, v = (x[0][:, seen].repeat_interleave(groups, 0) for x in (key, value))
            weights = torch.einsum("hd,hkd->hk", query[0, :, row], k) * scaling
            outputs.append(torch.einsum("hk,hkd->hd", weights.softmax(-1), v))
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("name", BATCHES)
def test_attention_is_that_of_each_row_alone(name, window):
    _, _, layout = layout_of(BATCHES[name])
    size = layout["input_ids"].shape[1]
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, size, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    options = {"shared_prefixes": layout, "scaling": 0.5, "sliding_window": window}
    ours, weights = dpotrainer.attend_packed_row(None, *inputs, None, **options)
    dense = dense_attention(*inputs, layout, scaling=0.5, window=window)
    assert weights is None and ours.shape == (1, size, 4, 8)
    torch.testing.assert_close(ours, dense)
    upstream = torch.randn_like(dense)
    mine = torch.autograd.grad(ours, inputs, upstream)
    for gradient, expected in zip(mine, torch.autograd.grad(dense, inputs, upstream)):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("option", dpotrainer.UNKNOWN_TO_PACKED)
def test_attention_refuses_what_it_would_leave_out(option):
    _, _, layout = layout_of(random_pairs(2, seed=8))
    inputs = [torch.randn(1, 2, layout["input_ids"].shape[1], 8) for _ in range(3)]
    with pytest.raises(ValueError, match="attention has"):
        dpotrainer.attend_packed_row(None, *inputs, None, shared_prefixes=layout, **{option: 30.0})


def test_attention_without_a_plan_is_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    options = {"dropout": 0.0, "scaling": 0.3, "sliding_window": None}
    ours = dpotrainer.attend_packed_row(module, query, key, value, None, **options)
    assert torch.equal(
        ours[0], sdpa_attention_forward(module, query, key, value, None, **options)[0]
    )


def test_attention_casts_what_a_norm_left_in_float32_as_autocast_would():
    _, _, layout = layout_of(random_pairs(2, seed=8))
    size = layout["input_ids"].shape[1]
    query, key, value = (torch.randn(1, heads, size, 8) for heads in (4, 2, 2))
    run = functools.partial(
        dpotrainer.attend_packed_row, None, attention_mask=None, shared_prefixes=layout
    )
    assert run(query, key, value.bfloat16())[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert run(query, key, value)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert run(query, key, value)[0].dtype == torch.float32


@pytest.mark.parametrize("window", [None, 4])
def test_kernel_is_asked_for_the_window(monkeypatch, window):
    """A stand-in, since the kernel needs a GPU: bottom-right causal, `before` keys back."""
    _, _, layout = layout_of(random_pairs(3, seed=9))

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa, scale=None
    ):
        assert (max_q, max_k) == (max(layout["query_lengths"]), max(layout["key_lengths"]))
        assert cu_seq_q is layout["query_bounds"] and cu_seq_k is layout["key_bounds"]
        before, after = window_size
        assert after == 0 and enable_gqa
        kept = None if before == -1 else before + 1
        return dpotrainer.attend_one_by_one(query, key, value, layout, kept, scale)

    monkeypatch.setattr(dpotrainer, "varlen_attn", varlen_attn)
    monkeypatch.setattr(dpotrainer, "kernel_takes", lambda *_: True)
    inputs = [torch.randn(1, heads, layout["input_ids"].shape[1], 8) for heads in (4, 2, 2)]
    options = {"shared_prefixes": layout, "scaling": 8**-0.5, "sliding_window": window}
    ours, _ = dpotrainer.attend_packed_row(None, *inputs, None, **options)
    torch.testing.assert_close(ours, dense_attention(*inputs, layout, window=window))


def test_kernel_of_an_older_torch_is_asked_in_its_words(monkeypatch):
    """torch 2.10 says is_causal, and knows no windows."""
    _, _, layout = layout_of(random_pairs(3, seed=9))

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert is_causal
        return dpotrainer.attend_one_by_one(query, key, value, layout, None, None)

    monkeypatch.setattr(dpotrainer, "varlen_attn", varlen_attn)
    monkeypatch.setattr(dpotrainer, "KNOWS_WINDOWS", False)
    inputs = [torch.randn(layout["input_ids"].shape[1], heads, 8) for heads in (4, 2, 2)]
    query, key, value = inputs[0], inputs[1][layout["key_index"]], inputs[2][layout["key_index"]]
    ours = dpotrainer.attend_with_kernel(query, key, value, layout, None, 8**-0.5)
    dense = dense_attention(*(x.transpose(0, 1)[None] for x in inputs), layout)
    torch.testing.assert_close(ours[None], dense)


# ---------------------------------------------------------------------- the step, against stock TRL


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_is_exact(both, loss_type):
    stock, ours = (run_step(trainer, random_pairs(4, seed=10), loss_type) for trainer in both)
    same_step(ours, stock)


def test_loss_types_are_all_that_trl_offers():
    """TRL's own list, from its refusal of a loss type that it does not know."""
    import inspect
    import re

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSS_TYPES)


@pytest.mark.parametrize("name", BATCHES)
def test_every_kind_of_batch_is_exact(both, name):
    stock, ours = (run_step(trainer, BATCHES[name], "sigmoid") for trainer in both)
    same_step(ours, stock)


@pytest.mark.parametrize(
    "change",
    [
        {"ld_alpha": 0.5},
        {"weighting": True},
        {"ld_alpha": 0, "weighting": True},
        {"f_divergence_type": "forward_kl"},
    ],
    ids=str,
)
def test_every_option_of_the_loss_is_exact(both, change):
    stock, ours = (run_step(trainer, random_pairs(4, seed=11), **change) for trainer in both)
    same_step(ours, stock)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_exact(architecture, tmp_path):
    trainers = [build_trainer(tiny_model(architecture), share, tmp_path) for share in (False, True)]
    stock, ours = (run_step(trainer, random_pairs(4, seed=12)) for trainer in trainers)
    same_step(ours, stock)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_those_of_each_row_alone_in_float64(architecture):
    """Independent of TRL, SDPA and padding: eager attention, one row at a time, in float64."""
    examples = (
        BATCHES["answers that share a beginning"]
        + BATCHES["very different lengths"]
        + random_pairs(3, seed=13)
    )
    batch = dpotrainer.SharedPrefixCollator(0, 24)(examples)
    plain = tiny_model(architecture).double()
    plain.set_attn_implementation("eager")
    packed = tiny_model(architecture).double()
    dpotrainer.share_prefixes(packed)
    logits = packed(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "layout")}
    ).logits
    for row, keep, ours in zip(batch["input_ids"], batch["attention_mask"], logits):
        ids = row[keep.bool()]
        alone = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(ours[: len(ids)].log_softmax(-1), alone, rtol=1e-6, atol=1e-6)


def test_token_of_one_row_bears_on_no_other_row():
    """Changing a token of rejected's tail moves that row from there on, and nothing else by a
    single bit.
    """
    model = tiny_model()
    dpotrainer.share_prefixes(model)
    examples = random_pairs(3, seed=14, longest=6)
    ids, mask, layout = layout_of(examples)
    tail = sum(layout["query_lengths"][:3])  # the first place of pair 1's tail
    changed = {**layout, "input_ids": layout["input_ids"].clone()}
    changed["input_ids"][0, tail] = (changed["input_ids"][0, tail] + 1) % VOCABULARY
    run = functools.partial(model.base_model, input_ids=ids, attention_mask=mask)
    before, after = (run(layout=each).last_hidden_state for each in (layout, changed))
    moved = (before != after).any(-1) & mask.bool()
    first = layout["position_ids"][0, tail]
    expected = torch.zeros_like(moved)
    expected[4, first:] = mask[4, first:].bool()
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_exact(both, reentrant, tmp_path):
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    stock, ours = (
        build_trainer(tiny_model(), share, tmp_path, **options) for share in (False, True)
    )
    for trainer in (stock, ours):
        trainer.model.gradient_checkpointing_enable(options["gradient_checkpointing_kwargs"])
    examples = random_pairs(4, seed=15)
    step = run_step(ours, examples)
    same_step(step, run_step(stock, examples))
    same_step(step, run_step(both[1], examples))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_the_dropout_of_lora(reentrant, tmp_path):
    options = {"disable_dropout": False, "adapter": functools.partial(lora, dropout=0.3)}
    kwargs = {"use_reentrant": reentrant}
    plain = build_trainer(tiny_model(), True, tmp_path, **options)
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    checkpointed = build_trainer(tiny_model(), True, tmp_path, **options)
    checkpointed.model.gradient_checkpointing_enable(kwargs)
    examples = random_pairs(4, seed=16)
    same_step(run_step(checkpointed, examples), run_step(plain, examples))
    assert run_step(plain, examples, seed=1)[0] != run_step(plain, examples, seed=2)[0]


@pytest.mark.parametrize("shared_reference", [False, True])
def test_separate_reference_is_exact_with_and_without_sharing(shared_reference, tmp_path):
    steps = []
    for share in (False, True):
        reference = tiny_model(seed=1)
        if share and shared_reference:
            dpotrainer.share_prefixes(reference)
        trainer = build_trainer(tiny_model(), share, tmp_path, adapter=None, ref_model=reference)
        steps.append(run_step(trainer, random_pairs(4, seed=17)))
    same_step(steps[1], steps[0])


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_reference_log_prob_pass_is_exact(both, ld_alpha):
    found = []
    for trainer in both:
        set_loss(trainer, ld_alpha=ld_alpha)
        batch = trainer.data_collator(random_pairs(5, seed=18))
        found.append(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


def test_precomputed_reference_log_probs_are_exact(tmp_path):
    pairs = random_pairs(5, seed=19)
    stock, ours = (
        build_trainer(
            tiny_model(), share, tmp_path / str(share), precompute_ref_log_probs=True, pairs=pairs
        )
        for share in (False, True)
    )
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert ours.train_dataset[name] == pytest.approx(stock.train_dataset[name], rel=1e-5)
    same_step(run_step(ours, list(ours.train_dataset)), run_step(stock, list(stock.train_dataset)))


def test_evaluation_with_a_last_batch_of_one_is_exact(both):
    for trainer in both:
        set_loss(trainer)
    stock, ours = (trainer.evaluate() for trainer in both)
    timings = {name for name in stock if name.endswith(("runtime", "per_second", "time"))}
    assert stock.keys() == ours.keys() and len(stock) > 8
    for name in stock.keys() - timings:
        assert ours[name] == pytest.approx(stock[name], rel=1e-5, abs=1e-5), name


def test_training_follows_the_stock_trajectory(tmp_path):
    """Through the data loader, accumulation and the optimizer, with steps that move."""
    options = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    histories = []
    for share in (False, True):
        trainer = build_trainer(tiny_model(), share, tmp_path, **options, use_weighting=False)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(histories[0]) == 4 and max(histories[0]) - min(histories[0]) > 0.1
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


def test_bf16_autocast_stays_as_near_as_bf16_can(both):
    examples = random_pairs(4, seed=20)
    exact = run_step(both[0], examples)
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = (run_step(trainer, examples) for trainer in both)
    near_in_half_precision(ours, stock, exact)


@pytest.mark.slow
def test_compiled_model_gives_the_same():
    """The graphs of a compiled model, run as traced, over batches of different shapes."""
    model = tiny_model(num_hidden_layers=1)
    dpotrainer.share_prefixes(model)
    compiled = torch.compile(model, backend="eager")
    for seed in (21, 22):
        batch = dpotrainer.SharedPrefixCollator(0, 24)(random_pairs(2, seed=seed))
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "layout")}
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
    torch._dynamo.reset()


def test_packed_row_is_what_runs(both):
    """Not a comparison of the padded rows with themselves: the layers see one row of T tokens and
    no mask.
    """
    layer, seen = both[1].model.base_model.model.model.layers[0], []

    def look(module, args, kwargs):
        seen.append((tuple(args[0].shape), kwargs["attention_mask"].shape[-2]))

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    batch = both[1].data_collator(BATCHES["truncation"])
    both[1].compute_loss(both[1].model, batch)
    handle.remove()
    assert set(seen) == {((1, batch["layout"]["input_ids"].numel(), 32), 1)}  # policy and reference
    assert batch["layout"]["input_ids"].numel() < batch["attention_mask"].sum()


# ------------------------------------------------------------------------- all that must not change


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_untouched(architecture):
    prompts = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])
    options = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 8, "do_sample": False}
    model = tiny_model(architecture)
    before = model.generate(prompts, **options)
    dpotrainer.share_prefixes(model)
    assert torch.equal(model.generate(prompts, **options), before)
    model.config.use_cache = False
    assert torch.equal(model.generate(prompts, **options), before)


def test_call_without_a_plan_is_untouched():
    plain, shared = tiny_model(), tiny_model()
    dpotrainer.share_prefixes(shared)
    ids, mask, _ = layout_of(random_pairs(3, seed=23))
    assert torch.equal(
        plain(ids, attention_mask=mask).logits, shared(ids, attention_mask=mask).logits
    )


def test_sharing_twice_is_sharing_once():
    model = tiny_model()
    ids, mask, layout = layout_of(random_pairs(3, seed=24))
    dpotrainer.share_prefixes(model)
    once = model(ids, attention_mask=mask, layout=layout).logits
    dpotrainer.share_prefixes(model)
    assert torch.equal(model(ids, attention_mask=mask, layout=layout).logits, once)


def test_copied_model_runs_its_own_weights():
    """The trainer and its callbacks copy models; a copy that ran the original's layers would go
    unnoticed.
    """
    model = tiny_model()
    dpotrainer.share_prefixes(model)
    twin = copy.deepcopy(model)
    ids, mask, layout = layout_of(random_pairs(2, seed=25))
    before = twin(ids, attention_mask=mask, layout=layout).logits
    torch.nn.init.zeros_(model.base_model.layers[0].mlp.down_proj.weight)
    assert torch.equal(twin(ids, attention_mask=mask, layout=layout).logits, before)


def test_saved_model_keeps_no_trace(tmp_path):
    model = tiny_model()
    dpotrainer.share_prefixes(model)
    model.save_pretrained(tmp_path)
    assert "shared_prefixes" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------- the proof
def a_job(**changes):
    """The settings that the proof reads."""
    ours = {"share_prefixes": True, "attn_implementation": None, "router_aux_loss_coef": None}
    ours |= {"disable_dropout": True, "bf16": False, "fp16": False, "max_length": 64}
    ours |= {"device": torch.device("cpu"), **changes}
    parts = SimpleNamespace(**ours)
    return SimpleNamespace(settings=parts, model_args=parts, training_args=parts)


def a_start(config):
    return SimpleNamespace(config=config, tokenizer=tokenizer())


def preferences():
    """Pairs with prompts of 3 to 40 tokens, so that a window of a miniature is shorter."""
    pairs = [
        pair(range(3, 6), range(7, 12), range(9, 20)),
        pair(range(3, 43), range(20, 34), range(25, 50)),
        *random_pairs(4, seed=31),
    ]
    for example in pairs:
        example["prompt_tokens"] = len(example["prompt_ids"])
    return dpotrainer.Preferences(Dataset.from_list(pairs), None, [])


def check(config, **changes):
    return dpotrainer.check_sharing(a_job(**changes), a_start(config), preferences())


def config_of(architecture, **changes):
    return tiny_model(architecture, **changes).config


LARGE = {  # as on the hub: what a miniature has to make small
    "mistral": {"sliding_window": 4096},
    "gemma3_text": {},
    "olmo3": {},
    "cohere2": {},
    "exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "phi3": {
        "sliding_window": 2047,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": [1.1] * 48,
            "short_factor": [1.0] * 48,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 20},
    "granite": {"attention_dropout": 0.1},
    "granitemoehybrid": {"layer_types": ["attention"] * 32, "router_aux_loss_coef": 0.0},
    "gpt2": {},
    "opt": {},
    "mixtral": {"router_aux_loss_coef": 0.0},
    "deepseek_v3": {},
    "gemma4_text": {},
}


@pytest.mark.parametrize("architecture", LARGE)
def test_architectures_share_once_a_miniature_has_proven_it(architecture):
    config = AutoConfig.for_model(architecture, **LARGE[architecture])
    config.vocab_size = VOCABULARY
    config.pad_token_id = 0
    sharing = check(config)
    assert sharing.is_used, sharing.line
    assert re.fullmatch(r"shared, checked: log-probs differ by \de[-+]\d\d", sharing.line)


@pytest.mark.parametrize("architecture", ["mistral", "deepseek_v3", "gpt2", "gemma4_text"])
def test_a_miniature_is_whole(architecture, tmp_path):
    """It is the same each time, leaves the random numbers alone, and can be saved and loaded."""
    config = AutoConfig.for_model(architecture)
    torch.manual_seed(5)
    miniature = dpotrainer.make_miniature(config).eval()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert type(miniature.config) is type(config)
    assert miniature.config.vocab_size == config.vocab_size
    assert sum(weight.numel() for weight in miniature.parameters()) < 4e7

    ids = torch.arange(3, 23)[None]
    miniature.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = dpotrainer.make_miniature(config).eval()
    for other in (loaded, again):
        assert torch.equal(other(ids).logits, miniature(ids).logits)


def test_a_miniature_keeps_a_layer_of_each_kind():
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=8, layer_types=kinds * 2)
    small = dpotrainer.make_miniature(config).config
    assert small.layer_types == ["linear_attention", "full_attention"]
    assert small.num_hidden_layers == 2


def test_what_cannot_be_made_small_says_so():
    config = AutoConfig.for_model("nemotron")  # without num_key_value_heads, as no real one is
    with pytest.raises(ValueError, match="a nemotron cannot be made small: "):
        dpotrainer.make_miniature(config)
    assert check(config).line.startswith("rows apart: a nemotron cannot be made small: ")


REFUSED = {
    "`share_prefixes: false`": lambda: (config_of("qwen3"), {"share_prefixes": False}),
    "`attn_implementation`": lambda: (config_of("qwen3"), {"attn_implementation": "sdpa"}),
    "linear_attention": lambda: (AutoConfig.for_model("qwen3_next"), {}),
    "chunked_attention": lambda: (AutoConfig.for_model("llama4_text"), {}),
    "dropout": lambda: (config_of("qwen3", attention_dropout=0.1), {"disable_dropout": False}),
    "router loss": lambda: (config_of("mixtral"), {}),
    "router loss counts": lambda: (config_of("mixtral"), {"router_aux_loss_coef": 0.01}),
    "soft-capping": lambda: (config_of("gemma2", head_dim=8), {}),
    "sinks": lambda: (AutoConfig.for_model("gpt_oss", router_aux_loss_coef=0.0), {}),
    "cannot be replaced": lambda: (config_of("falcon"), {}),
    "keyword arguments": lambda: (config_of("nemotron", num_key_value_heads=2, head_dim=8), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_stepping_aside_says_why_in_one_line(reason):
    config, changes = REFUSED[reason]()
    sharing = check(config, **changes)
    assert not sharing.is_used
    assert sharing.line.startswith("rows apart: ") and reason in sharing.line
    assert "\n" not in sharing.line and len(sharing.line) < 160


def drop_keywords(model):
    """As Nemotron: its attention can be replaced, but never sees the layout."""
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {name: value for name, value in kwargs.items() if name != "shared_prefixes"},
            ),
            with_kwargs=True,
        )


def drop_keywords_and_mask(model):
    """The same without a crash: the packed row is taken for one long text."""
    gone = ("shared_prefixes", "attention_mask")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {name: None if name in gone else value for name, value in kwargs.items()},
            ),
            with_kwargs=True,
        )


def mask_by_values(model):
    """As Doge: what attention may see depends on what is there, as its mask would say."""
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def masked(hidden_states, *args, forward=forward, attention_mask=None, **kwargs):
            if attention_mask is None or attention_mask.dtype == torch.bool:
                shape = (len(hidden_states), 1, hidden_states.shape[1], hidden_states.shape[1])
                seen = hidden_states[..., 0].gt(0)[:, None, None].expand(shape)
                own = torch.eye(shape[-1], dtype=torch.bool)
                causal = torch.ones(shape[2:], dtype=torch.bool).tril()
                before = causal if attention_mask is None else attention_mask
                attention_mask = before & (seen | own)
            return forward(hidden_states, *args, attention_mask=attention_mask, **kwargs)

        layer.self_attn.forward = masked


def start_positions_elsewhere(model):
    """As RoBERTa: it counts positions itself where it is given none, and from another number."""

    def shift(module, args, kwargs):
        given = kwargs.get("position_ids")
        if given is None:
            length = kwargs["input_ids"].shape[1]
            # squares: with rotary embeddings a plain shift changes nothing
            kwargs["position_ids"] = torch.arange(length)[None] ** 2 // 8
        return args, kwargs

    model.base_model.register_forward_pre_hook(shift, with_kwargs=True)


LIES = [drop_keywords, drop_keywords_and_mask, mask_by_values, start_positions_elsewhere]


@pytest.mark.parametrize("lie", LIES)
def test_model_types_that_lie_run_their_rows_apart(lie, monkeypatch):
    """On the miniature before the run, and on the real model where only that one lies."""
    config = config_of("qwen3")
    make_honest = dpotrainer.make_miniature

    def make_liar(config):
        miniature = make_honest(config)
        lie(miniature)
        return miniature

    assert check(config).is_used
    monkeypatch.setattr(dpotrainer, "make_miniature", make_liar)
    sharing = check(config)
    assert not sharing.is_used and sharing.line.startswith("rows apart: ")

    model = tiny_model()
    lie(model)
    sharing = dpotrainer.prove_sharing(model, a_job(), a_start(config), preferences())
    assert not sharing.is_used and sharing.line.startswith("rows apart: ")
    assert model.config._attn_implementation == "sdpa"


def test_one_model_that_lies_keeps_both_apart():
    policy = get_peft_model(tiny_model(), lora())
    reference = tiny_model(seed=1)
    drop_keywords(reference)
    models = [policy, reference]
    arguments = (a_job(), a_start(reference.config), preferences())
    assert not dpotrainer.share_where_proven(models, *arguments).is_used
    for model in models:
        assert model.config._attn_implementation == "sdpa"

    reference = tiny_model(seed=1)
    sharing = dpotrainer.share_where_proven([policy, reference], *arguments)
    assert sharing.is_used and sharing.line.startswith("shared, checked: ")
    for model in (policy.get_base_model(), reference):
        assert model.config._attn_implementation == "shared_prefixes"


@pytest.mark.parametrize("wrong", ["position_ids", "key_index", "row_index", "input_ids"])
@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gpt2", "deepseek_v3"])
def test_a_wrong_plan_is_far_beyond_the_tolerance(architecture, wrong, monkeypatch):
    """One entry off by one, in the long pair's tail: what a wrong mask or position would do."""
    config = AutoConfig.for_model(architecture)
    config.vocab_size = VOCABULARY
    assert check(config).is_used
    lay_out_right = dpotrainer.lay_out_packed_row

    def lay_out_wrong(*batch):
        layout = lay_out_right(*batch)
        tail = layout["query_bounds"][-2]  # its first token
        if wrong == "key_index":
            layout["key_index"][-2] -= 1
        elif wrong == "row_index":
            layout["row_index"][-1][layout["row_index"][-1] == tail] -= 1
        else:
            layout[wrong][0, tail] -= 1
        return layout

    monkeypatch.setattr(dpotrainer, "lay_out_packed_row", lay_out_wrong)
    sharing = check(config)
    found = re.search(r"differ by (\S+)", sharing.line)
    assert not sharing.is_used and float(found[1]) > 100 * dpotrainer.MINIATURE_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_model_is_proven_in_its_own_dtype(dtype):
    model = tiny_model().to(dtype).train()
    job = a_job(bf16=dtype == torch.bfloat16)
    sharing = dpotrainer.prove_sharing(model, job, a_start(model.config), preferences())
    assert sharing.is_used and sharing.line.startswith("shared, checked: log-probs differ by ")
    assert model.training and model.config._attn_implementation == "shared_prefixes"
    dpotrainer.stop_sharing(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_miniature_stands_in_for_a_sharded_model(monkeypatch):
    """No process has all weights then: the model itself must not be run before training."""
    model = tiny_model().bfloat16()

    def refuse(*_):
        raise AssertionError("the sharded model was run")

    hook = model.base_model.register_forward_pre_hook(refuse)
    monkeypatch.setattr(dpotrainer, "is_sharded", lambda: True)
    arguments = (model, a_job(bf16=True), a_start(model.config), preferences())
    sharing = dpotrainer.prove_sharing(*arguments)
    assert sharing.is_used and model.config._attn_implementation == "shared_prefixes"
    hook.remove()
    batch = dpotrainer.SharedPrefixCollator(0)(random_pairs(2, seed=31))
    assert (
        dpotrainer.run_backbone(model, batch, batch["layout"]).shape[:2] == batch["input_ids"].shape
    )

    monkeypatch.setattr(dpotrainer, "attend_one_by_one", refuse)
    sharing = dpotrainer.prove_sharing(*arguments)
    assert not sharing.is_used and sharing.line.startswith("rows apart: AssertionError")
    assert model.config._attn_implementation == "sdpa"


def test_a_kernel_that_is_wrong_is_found_in_bf16(monkeypatch):
    """As a window that counts one token less would be, on the device alone."""
    model = tiny_model("mistral").bfloat16()
    stock = dpotrainer.attend_one_by_one

    def off_by_one(query, key, value, layout, window, scale):
        return stock(query, key, value, layout, window - 1, scale)

    monkeypatch.setattr(dpotrainer, "attend_one_by_one", off_by_one)
    sharing = dpotrainer.prove_sharing(
        model, a_job(bf16=True), a_start(model.config), preferences()
    )
    assert not sharing.is_used and "may be rounding" in sharing.line


# what the table of RESULTS.md measures for every type
FAST_TYPES = {  # whether it shares
    **dict.fromkeys(["mistral", "gemma3_text", "olmo3", "cohere2", "exaone4", "phi3"], True),
    **dict.fromkeys(["qwen2", "qwen3", "granite", "granitemoehybrid", "gpt2", "opt"], True),
    **dict.fromkeys(["mixtral", "deepseek_v3", "gemma3"], True),  # the last one sees images too
    **dict.fromkeys(["nemotron", "doge", "gemma2", "gpt_oss"], False),
}


@pytest.mark.parametrize("kind", FAST_TYPES)
def test_each_type_starts_at_ln_2_and_shares_exactly(kind, tmp_path):
    """Through the program's trainer, and with an adapter that has moved."""
    found = model_types.measure(kind, tmp_path)
    assert found["first loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["sharing"].startswith("shared, checked: ") == FAST_TYPES[kind]
    if FAST_TYPES[kind]:
        assert found["moved"] > 1e-4
        assert found["loss"] < 1e-5
        assert found["gradient"] < 1e-4


def test_a_tokenizer_with_more_ids_than_the_embedding_can_still_be_checked():
    config = config_of("qwen3")
    config.vocab_size = VOCABULARY - 20
    assert check(config).is_used


def test_mixture_of_experts_without_router_loss_is_exact(tmp_path):
    sizes = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "sliding_window": None,
    }
    model = functools.partial(tiny_model, "mixtral", **sizes)
    attention = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    outputs = []
    for share in (False, True):
        policy = model()
        if share:
            dpotrainer.share_prefixes(policy)
        torch.manual_seed(7)
        policy = get_peft_model(policy, attention)
        ids, mask, layout = layout_of(random_pairs(3, seed=26))
        outputs.append(
            policy(input_ids=ids, attention_mask=mask, layout=layout if share else None).logits[
                mask.bool()
            ]
        )
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ two processes


def log_probs_and_gradients(model, examples):
    """A loss that needs no reference, over the fused head that TRL puts on a model."""
    batch = dpotrainer.SharedPrefixCollator(0, 24)(examples)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    loss = -model(**batch, labels=labels, fused_lm_head=True).log_probs.sum()
    loss.backward()
    gradients = {
        name.removeprefix("module."): w.grad
        for name, w in model.named_parameters()
        if w.requires_grad
    }
    return loss.item(), {
        name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients.items()
    }


def adapted_model():
    from trl.trainer.utils import add_fused_lm_head

    model = tiny_model()
    dpotrainer.share_prefixes(model)
    add_fused_lm_head(model)
    model = get_peft_model(model, lora())
    move_adapter(model)
    return model.train()


def run_process(rank, folder):
    """One of two processes, each with its own pairs: gradients must be the mean of what one process
    finds for each.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    shares = [random_pairs(2, seed=27), random_pairs(3, seed=28)]
    (first_loss, first), (second_loss, second) = (
        log_probs_and_gradients(adapted_model(), share) for share in shares
    )
    ddp = torch.nn.parallel.DistributedDataParallel(adapted_model())
    fsdp2 = adapted_model()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for module in (*fsdp2.base_model.model.model.layers, fsdp2):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    for model in (ddp, fsdp2):
        loss, gradients = log_probs_and_gradients(model, shares[rank])
        assert loss == pytest.approx((first_loss, second_loss)[rank], rel=1e-5)
        same_gradients(
            gradients, {name: (gradient + second[name]) / 2 for name, gradient in first.items()}
        )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_and_fsdp2_give_the_mean_of_their_gradients(tmp_path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)


# ----------------------------------------------------------------------------------------- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
has_kernel = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def gpu_trainers(tmp_path, dtype, **options):
    """Stock and ours on the GPU: float32 throughout, or a bf16 base under autocast, as TRL trains
    by default.
    """
    options |= {"use_cpu": False, "bf16": dtype == torch.bfloat16}
    return [
        build_trainer(tiny_model(head_dim=64).to("cuda", dtype), share, tmp_path, **options)
        for share in (False, True)
    ]


def to_gpu(layout):
    from accelerate.utils import send_to_device

    return send_to_device(layout, "cuda")


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_kernel_agrees_with_one_sequence_after_the_other(name, heads, window):
    if not has_kernel:
        pytest.skip("the variable-length kernel needs compute capability 8.0")
    layout = to_gpu(layout_of(BATCHES[name])[2])
    torch.manual_seed(0)
    size, dtype = layout["input_ids"].shape[1], torch.bfloat16
    query, key, value = (
        torch.randn(1, n, size, 64, device="cuda") for n in (heads[0], heads[1], heads[1])
    )
    exact = [x.to(dtype).float().requires_grad_() for x in (query, key, value)]
    half = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    assert dpotrainer.kernel_takes(half[0], half[2], None)
    assert not dpotrainer.kernel_takes(exact[0], exact[2], None)
    attend = functools.partial(
        dpotrainer.attend_packed_row,
        None,
        attention_mask=None,
        shared_prefixes=layout,
        sliding_window=window,
    )
    for scaling in (64**-0.5, 0.2):
        slow, fast = attend(*exact, scaling=scaling)[0], attend(*half, scaling=scaling)[0]
        torch.testing.assert_close(fast.float(), slow, rtol=2e-2, atol=2e-2)
        upstream = torch.randn_like(slow).to(dtype)
        gradients = (
            torch.autograd.grad(slow, exact, upstream.float()),
            torch.autograd.grad(fast, half, upstream),
        )
        for theirs, mine in zip(*gradients):
            assert (mine.float() - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_gpu_step_in_float32_is_exact(name, checkpointing, tmp_path):
    options = {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    trainers = gpu_trainers(tmp_path, torch.float32, **(options if checkpointing else {}))
    for trainer in trainers if checkpointing else ():
        trainer.model.gradient_checkpointing_enable(options["gradient_checkpointing_kwargs"])
    stock, ours = (run_step(trainer, BATCHES[name]) for trainer in trainers)
    same_step(ours, stock, tolerance=1e-4)


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("name", BATCHES)
def test_gpu_step_in_bf16_is_as_near_as_stock(name, tmp_path):
    stock, ours = (
        run_step(trainer, BATCHES[name]) for trainer in gpu_trainers(tmp_path, torch.bfloat16)
    )
    rounded = (
        tiny_model(head_dim=64).bfloat16().float()
    )  # the same weights, so that the arithmetic alone differs
    exact = run_step(build_trainer(rounded, False, tmp_path), BATCHES[name])
    near_in_half_precision(ours, stock, exact)


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_backbone_never_waits_for_the_gpu(dtype):
    model = tiny_model(head_dim=64).to("cuda", dtype)
    dpotrainer.share_prefixes(model)
    ids, mask, layout = layout_of(random_pairs(4, seed=29))
    ids, mask, layout = ids.cuda(), mask.cuda(), to_gpu(layout)
    for mode in ("default", "error"):  # once for what is set up at first use
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model.base_model(
                input_ids=ids, attention_mask=mask, layout=layout
            ).last_hidden_state.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_on_the_gpu_is_untouched(dtype):
    prompts = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]], device="cuda")
    options = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 8, "do_sample": False}
    model = tiny_model(head_dim=64).to("cuda", dtype)
    before = model.generate(prompts, **options)
    dpotrainer.share_prefixes(model)
    assert torch.equal(model.generate(prompts, **options), before)


@pytest.mark.cuda
@on_gpu
def test_layout_comes_through_pinned_memory():
    examples = random_pairs(4, seed=30)
    collator = dpotrainer.SharedPrefixCollator(0, 24)
    batch = next(
        iter(torch.utils.data.DataLoader(examples, 4, collate_fn=collator, pin_memory=True))
    )
    layout = collator(examples)["layout"]
    assert (
        batch["layout"]["input_ids"].is_pinned()
        and list(batch["layout"]["key_lengths"]) == layout["key_lengths"]
    )
    assert torch.equal(to_gpu(batch["layout"])["key_index"].cpu(), layout["key_index"])
