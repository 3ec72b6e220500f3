"""The plan: every number against an independent count, and what it warns of."""

import gc
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    TrainerState,
    get_scheduler,
)
from trl import DPOConfig

import dpotrainer

gc.freeze()
PATH = Path(__file__).parent / "benchmarks" / "operations.py"
SPEC = importlib.util.spec_from_file_location("operations", PATH)
operations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(operations)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 60)


@pytest.fixture
def plan(base, data, tmp_path, capsys, monkeypatch):
    """plan(status=0, model=..., pairs=..., **settings) -> a dry run, not rehearsed, a line each."""
    monkeypatch.setattr(dpotrainer, "rehearse", lambda *args: None)

    def run(status: int = 0, model=base, pairs=data, **changes) -> str:
        capsys.readouterr()
        flags = tiny.settings(model, pairs, tmp_path / "out", **{"dry_run": True} | changes)
        assert dpotrainer.run(flags) == status
        out, err = capsys.readouterr()
        assert not (tmp_path / "out").exists()
        if status:
            return err
        shown = out[: out.index("\nprompt ")]
        assert max(map(len, shown.splitlines())) <= 79 + len(str(tmp_path))
        return re.sub(r"\n {2,}", " ", shown)

    return run


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in\n{text}"
    return float(found[1].replace(",", ""))


def make_config(folder: Path, kind: str = "qwen3", **changes) -> Path:
    """A configuration of any size, with a tokenizer."""
    tokenizer = tiny.make_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CONFIG_MAPPING[kind](
        **{"vocab_size": len(tokenizer), "bos_token_id": None} | special | changes
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encode(model: Path, data: Path, max_length: int = 96) -> list[list[list[int]]]:
    """[chosen ids, rejected ids] of each pair, cut."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = tiny.read_pairs(data)
    return [[ids for ids, _ in tiny.encode_pair(tokenizer, pair, max_length)] for pair in pairs]


def count_distinct(chosen: list[int], rejected: list[int]) -> int:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return len(chosen) + len(rejected) - shared


# ------------------------------------------------------------------------- what is trained, and how
def test_weights_are_those_of_the_loaded_model(base, plan):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    trainable, total = policy.get_nb_trainable_parameters()
    reached = sum(
        weight.numel() for name, weight in policy.named_parameters() if "base_layer" in name
    )
    text = plan()
    assert number(text, r"([\d,]+) weights in float32") == total - trainable
    assert number(text, r"([\d,]+) trained weights") == trainable
    assert number(text, r"(\d+)% of the weights have one") == round(
        100 * reached / (total - trainable)
    )


def test_steps_and_batch_are_derived(plan):
    text = plan(global_batch_size=8, per_device_train_batch_size=2, num_train_epochs=3)
    kept = number(text, r"([\d,]+) pairs to train on")
    assert "8 pairs = 2 (per device) x 4 (accumulation) x 1 (processes)" in text
    assert number(text, r"steps +([\d,]+) =") == 3 * math.ceil(kept / 8)
    assert (
        f"= 3 (epochs) x {math.ceil(kept / 8)} (steps: {kept:.0f} pairs / 8, rounded up);" in text
    )
    assert "learning rate 0.002, cosine, warm-up 0" in text
    assert "steps      7 = max_steps" in plan(max_steps=7)


def test_a_part_of_an_epoch_is_rounded_up_too(plan):
    """Both roundings are told: 51 pairs are 7 steps of 8, and half of them are 4."""
    text = plan(global_batch_size=8, num_train_epochs=0.5)
    assert "steps      4 = 0.5 (epochs) x 7 (steps: 51 pairs / 8, rounded up), rounded up;" in text


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "reduce_lr_on_plateau"])
def test_warm_up_is_that_of_the_schedule(schedule, plan):
    """As the library's own schedule has it in its first steps."""
    settings = {"lr_scheduler_type": schedule, "warmup_steps": 30, "max_steps": 30}
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    get_scheduler(schedule, optimizer, num_warmup_steps=30, num_training_steps=30)
    has_warmup = optimizer.param_groups[0]["lr"] == 0
    text = plan(**settings)
    assert (", warm-up 30" in text) == has_warmup and (", warm-up 0" in text) != has_warmup
    assert ("all 30 steps are warm-up" in text) == has_warmup


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_a_run_without_warm_up_is_late_after_a_third(schedule, base, data, tmp_path):
    settings = {"lr_scheduler_type": schedule, "warmup_steps": 20}
    job = dpotrainer.read_settings(tiny.settings(base, data, tmp_path / "out", **settings))
    row = {"loss": 0.69, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/accuracies": 0.5}
    state = TrainerState(max_steps=60, global_step=20, log_history=[row | {"step": 20}])
    trend = dpotrainer.read_trend(state, job, answer_tokens=10)
    assert trend.is_late == (schedule == "constant")


def test_objective_and_reference_are_told(base, plan, tmp_path):
    text = plan(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.05)
    assert "objective  sigmoid + sft, weighted [1.0, 0.2], beta 0.05" in text
    assert "reference  the policy with its adapter switched off" in text
    assert "reference  a second, frozen model" in plan(reference="copy")
    lora = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(
        tmp_path / "sft"
    )
    text = plan(model=tmp_path / "sft")
    assert "reference  a frozen copy of the adapter" in text and "rank 3, alpha 8" in text


def test_experts_without_an_adapter_are_told_with_the_setting_that_reaches_them(plan, tmp_path):
    model = make_config(tmp_path / "moe", "gpt_oss", num_hidden_layers=2)
    text = plan(model=model)
    names = re.search(r"! no expert has an adapter.*`lora_target_parameters: \[(.*)\]`", text)
    assert names and number(text, r"only ([\d.]+)% of the weights") < 3
    text = plan(model=model, lora_target_parameters=names[1].split(", "))
    assert "no expert" not in text and number(text, r"(\d+)% of the weights have one") > 90


def test_an_adapter_that_is_the_start_is_not_told_to_reach_experts(plan, tmp_path):
    base = make_config(tmp_path / "moe", "gpt_oss", num_hidden_layers=2)
    lora = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(tmp_path / "sft")
    tiny.make_tokenizer().save_pretrained(tmp_path / "sft")
    text = plan(model=tmp_path / "sft")
    assert "! no expert has an adapter" in text and "lora_target_parameters" not in text


def test_a_real_run_prints_the_same_plan(plan, base, data, tmp_path, capsys, monkeypatch):
    expected = plan()
    for step in ("train_policy", "save_adapter", "show_samples", "save_report"):
        monkeypatch.setattr(dpotrainer, step, lambda *args: None)
    assert dpotrainer.run(tiny.settings(base, data, tmp_path / "out")) == 0
    shown = re.sub(r"\n {2,}", " ", capsys.readouterr().out)
    for label in ("policy", "adapter", "batch", "steps", "prefixes", "compute", "memory"):
        line = next(line for line in expected.splitlines() if line.startswith(label))
        assert line in shown


def test_a_plan_is_at_most_a_screen(plan):
    lines = [line for line in plan(use_cpu=False, bf16=True, dtype="bfloat16").splitlines()]
    assert len(lines) <= 24 and all(line.strip() for line in lines)


def test_what_cannot_be_built_is_a_mistake(plan):
    assert "nothing" in plan(status=2, lora_target_modules=["nothing"])


def test_the_constants_without_network_are_one_clear_message(capsys):
    assert dpotrainer.run(["--dry_run", "true"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) <= 2 and "Qwen/Qwen3-8B" in err


# ------------------------------------------------------------------------------------ too few steps
def test_few_steps_that_max_steps_asks_for_are_told_so(plan):
    assert "! 5 steps hardly move the policy; raise max_steps to 20 or more" in plan(max_steps=5)


@pytest.mark.parametrize("pairs, epochs", [(20, 1), (40, 2), (200, 1), (1500, 0.5)])
def test_settings_that_are_named_for_few_pairs_do(pairs, epochs, plan, tmp_path):
    """The shipped batch of 64 on few pairs: warned of, with settings that are not."""
    few = tiny.make_pairs(tmp_path / "few.jsonl", pairs)
    given = {"global_batch_size": 64, "num_train_epochs": epochs, "warmup_steps": 0.1}
    text = plan(pairs=few, eval_pairs=0, eval_strategy="no", **given)
    steps = number(text, r"steps +([\d,]+) =")
    assert f"! {steps:.0f} steps hardly move the policy" in text
    assert ("! a step of 64 pairs is more than there are" in text) == (pairs < 64)
    assert ("steps are warm-up" in text) == (steps == 1)
    named = {name: float(value) for name, value in re.findall(r"`(\w+): ([\d.]+)`", text)}
    for name in ("global_batch_size", "per_device_train_batch_size"):
        named[name] = int(named[name])
    text = plan(pairs=few, eval_pairs=0, eval_strategy="no", warmup_steps=0.1, **named)
    assert number(text, r"steps +([\d,]+) =") >= 20
    assert (
        "hardly" not in text and "warm-up, from" not in text and "more than there are" not in text
    )


def test_an_accumulation_that_is_given_is_left_out_of_what_is_named(plan, tmp_path):
    few = tiny.make_pairs(tmp_path / "few.jsonl", 40)
    text = plan(pairs=few, global_batch_size=32, gradient_accumulation_steps=8)
    assert "make 20 or more; leave gradient_accumulation_steps out" in text


# ------------------------------------------------------------------------------- passes, operations
def test_the_largest_pass_is_the_one_that_the_sampler_deals(base, data, plan):
    """Packed rows, counted here: the longest pair goes to the lightest pass that has room."""
    text = plan(
        eval_pairs=0, eval_strategy="no", global_batch_size=12, per_device_train_batch_size=3
    )
    distinct = [count_distinct(*rows) for rows in encode(base, data)]
    kept = int(number(text, r"([\d,]+) pairs to train on"))
    assert kept == len(distinct), "no pair was dropped, or the count below is another one"
    order = np.random.default_rng([42, 0]).permutation(kept)
    largest = 0
    for step in np.resize(order, (math.ceil(kept / 12), 12)):
        loads = [[] for _ in range(4)]
        for tokens in sorted((distinct[pair] for pair in step), reverse=True):
            lightest = min((load for load in loads if len(load) < 3), key=sum)
            lightest.append(tokens)
        largest = max(largest, *(3 * math.ceil(sum(load) / 3) for load in loads))
    assert number(text, r"largest pass, of ([\d,]+) tokens") == largest
    assert largest < sum(sorted(distinct)[-3:]), "the three longest pairs never meet"


def test_padded_passes_have_the_length_of_their_longest_row(base, data, plan):
    text = plan(
        eval_pairs=0,
        eval_strategy="no",
        global_batch_size=1,
        per_device_train_batch_size=1,
        share_prefixes=False,
    )
    longest = max(max(map(len, rows)) for rows in encode(base, data))
    assert number(text, r"largest pass, of ([\d,]+) tokens") == 2 * longest


def make_pass(config, rows=2, length=64, **options):
    """(operations, bytes kept) of a pass of a model with LoRA of rank 4, as the plan has them."""
    with torch.device("meta"):
        dtype = torch.bfloat16 if options.get("bf16") else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = get_peft_model(model, lora)
    size = dpotrainer.Pass(rows, length, scored=0)
    return dpotrainer.measure_pass(policy, size, DPOConfig("unused", use_cpu=True, **options))


SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 420,
}


def count_layer(tokens: int, rank: int) -> int:
    """Operations of the matrix products of one dense layer of SHAPE, and of its adapter."""
    sizes = [(256, 256), (256, 64), (256, 64), (256, 256), (256, 512), (256, 512), (512, 256)]
    weights = sum(width * height for width, height in sizes)
    adapter = sum(rank * (width + height) for width, height in sizes)
    return 2 * tokens * (weights + adapter)


def test_operations_of_a_dense_layer_are_those_by_hand():
    found, _ = make_pass(Qwen3Config(**SHAPE))
    attention = 4 * 2 * 64 * 64 * 256  # two products, of 2 rows, 64 queries, 64 keys, 8 heads of 32
    assert found == 2 * (count_layer(2 * 64, rank=4) + attention)


def test_operations_of_experts_are_those_of_the_active_ones():
    shape = SHAPE | {"moe_intermediate_size": 128, "num_experts_per_tok": 2, "bos_token_id": None}

    def count(**changes):
        return make_pass(CONFIG_MAPPING["qwen3_moe"](**shape | changes), bf16=True)[0]

    few, more = (count(num_experts=8, num_experts_per_tok=number) for number in (2, 4))
    assert more - few == 2 * 2 * 128 * 2 * (3 * 256 * 128)  # layers, experts, tokens, products


def test_the_cost_of_the_run_is_that_of_its_pairs(base, data, plan):
    """Three passes of the layers, and the head four times, over all pairs."""
    text = plan(
        eval_pairs=0, eval_strategy="no", global_batch_size=1, per_device_train_batch_size=1
    )
    rows = encode(base, data)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tiny.encode_pair(tokenizer, pair, 96)[0][1] for pair in tiny.read_pairs(data)]
    distinct = sum(count_distinct(*pair) for pair in rows)
    scored = sum(len(a) + len(b) - 2 * prompt for (a, b), prompt in zip(rows, prompts))
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    weights = sum(width * height + 4 * (width + height) for width, height in sizes)
    attention = 4 * 32 * max(count_distinct(*pair) for pair in rows)  # keys of the largest pass
    layers = 3 * 2 * (2 * weights + attention) * distinct
    head = 4 * 2 * 420 * 32 * scored
    found = number(text, r"compute +([\d.e+]+) operations")
    assert found == pytest.approx(layers + head, rel=0.05)  # two digits are shown
    assert number(text, r"= ([\d,]+) \(pairs\)") == len(rows)
    with_checkpointing = plan(gradient_checkpointing=True)
    assert "recomputation" in with_checkpointing and "recomputation" not in text


def make_examples(count: int) -> list[dict]:
    """Pairs of a prompt of 40 tokens with answers of 24 and of 8 to 32, from a prefix of 2."""
    examples = []
    for number in range(count):
        answer = [7, 8] + [9 + number] * 22
        other = [7, 8] + [50 + number] * (6 + 8 * (number % 4))
        examples.append({"prompt_ids": [5] * 40, "chosen_ids": answer, "rejected_ids": other})
    return examples


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefixes_save_the_operations_that_they_promise(checkpointing):
    """Guards the ratio: nobody has to time it."""
    examples = make_examples(8)
    config = Qwen3Config(**SHAPE)
    shared, stock = (
        operations.count_operations(config, examples, is_shared, checkpointing)
        for is_shared in (True, False)
    )
    distinct = sum(64 + len(pair["rejected_ids"]) - 2 for pair in examples)
    padded = 2 * 8 * 72
    for count, tokens in ((shared, distinct), (stock, padded)):
        assert count.forward == pytest.approx(2 * count_layer(tokens, rank=32), rel=0.25)
        # adapters, 32 wide on layers of 256, cost another product each on the way back
        assert count.backward / count.forward == pytest.approx(
            2.1 if checkpointing else 1.1, abs=0.2
        )
        assert count.reference < count.forward
    assert (
        stock.head
        == shared.head
        == 8 * 420 * 256 * sum(24 + len(pair["rejected_ids"]) for pair in examples)
    )
    layers = [count.total - count.head for count in (stock, shared)]
    assert layers[0] / layers[1] == pytest.approx(padded / distinct, rel=0.05)


# ------------------------------------------------------------------------------------------- memory
def keep_bytes(policy, run) -> int:
    """Bytes that autograd keeps of a real forward pass, weights left out."""
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no place comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run()
    own = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    return sum(size for place, (size, _) in saved.items() if place not in own)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(bf16):
    """A real pass of real pairs, their prefixes shared, against fake rows of as many tokens."""
    config = Qwen3Config(**SHAPE)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    dpotrainer.share_prefixes(model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora).train()
    batch = operations.make_batch(make_examples(8), shared=True, max_length=2048)

    def run():
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            disable_input_dtype_casting(policy, active=bf16),
        ):
            model.base_model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                layout=batch["layout"],
                use_cache=False,
            )

    tokens = batch["layout"]["input_ids"].numel()
    _, estimate = make_pass(config, rows=8, length=tokens // 8, bf16=bf16)
    assert estimate == pytest.approx(keep_bytes(policy, run) * (tokens // 8 * 8) / tokens, rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_the_tracked_peak(shared, checkpointing):
    """torch's memory tracker over forward and backward pass, every temporary tensor counted."""
    config = Qwen3Config(**SHAPE | {"num_hidden_layers": 4})
    what = (config, make_examples(4), shared, checkpointing)
    assert operations.estimate_peak(*what) == pytest.approx(operations.track_peak(*what), rel=0.2)


def memory(text: str) -> dict[str, float]:
    """{part: GiB} of the memory line."""
    line = re.search(r"tokens: (.*?)(;|\n|$)", text)[1]
    return {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", line)}


BIG = {  # some 12 billion weights in few layers, which is fast to count
    "hidden_size": 8192,
    "intermediate_size": 98_304,
    "num_hidden_layers": 5,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
ON_A_GPU = {"use_cpu": False, "bf16": True, "dtype": "bfloat16", "gradient_checkpointing": True}


def test_parts_of_the_memory_are_those_of_the_weights(plan, tmp_path):
    model = make_config(tmp_path / "big", **BIG)
    weights = 5 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 98_304) * 2 / 2**30  # bf16
    text = plan(model=model, lora_r=64, **ON_A_GPU)
    parts = memory(text)
    trained = number(text, r"([\d,]+) trained weights")
    assert parts["weights"] == pytest.approx(weights, abs=0.1)
    assert parts["adapter"] == parts["gradients"] == pytest.approx(4 * trained / 2**30, abs=0.06)
    assert parts["optimizer"] == pytest.approx(8 * trained / 2**30, abs=0.06)
    assert number(text, r"memory +([\d.]+) GiB") == pytest.approx(sum(parts.values()), abs=0.4)
    assert memory(plan(model=model, reference="copy", **ON_A_GPU))["reference"] == parts["weights"]


def test_memory_is_told_with_and_without_checkpointing(plan, tmp_path):
    """Each plan names the total that the other one has."""
    model = make_config(tmp_path / "big", **BIG | {"intermediate_size": 8192})
    changes = ON_A_GPU | {"max_length": 2048}
    texts = {
        on: plan(model=model, **changes | {"gradient_checkpointing": on}) for on in (True, False)
    }
    totals = {on: number(text, r"memory +([\d.]+) GiB") for on, text in texts.items()}
    assert number(texts[True], r"GiB \(([\d.]+) without gradient_checkpointing") == totals[False]
    assert number(texts[False], r"GiB \(([\d.]+) with gradient_checkpointing") == totals[True]
    kept = {on: memory(text)["activations"] for on, text in texts.items()}
    assert kept[False] > 2 * kept[True]
    assert totals[False] - totals[True] == pytest.approx(1.1 * (kept[False] - kept[True]), rel=0.1)


def test_quantised_models_weigh_less(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: True)  # of bitsandbytes
    shape = BIG | {"num_hidden_layers": 2}
    whole = memory(plan(model=make_config(tmp_path / "bf16", **shape), **ON_A_GPU))["weights"]
    awq = make_config(tmp_path / "awq", **shape)
    path = awq / "config.json"
    for quantization, bits in (
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_8bit": True,
                "load_in_4bit": False,
                "bnb_4bit_quant_type": "fp4",
            },
            8,
        ),
        (None, 4),
    ):
        values = json.loads(path.read_text()) | {"quantization_config": quantization}
        path.write_text(json.dumps(values))
        text = plan(model=awq, load_in_4bit=quantization is None, **ON_A_GPU)
        assert f"bfloat16, {bits} bits in its layers" in text
        assert memory(text)["weights"] == pytest.approx(whole * (bits + 0.25) / 16, rel=0.05)


def test_the_card_that_has_room_is_named(plan, tmp_path, monkeypatch):
    text = plan(model=make_config(tmp_path / "big", **BIG), **ON_A_GPU)
    need = number(text, r"memory +([\d.]+) GiB")
    assert 23.5 < need < 39 and "fits in 39, with" in text
    assert "h on 1 A100" in text
    model = make_config(
        tmp_path / "huge", **BIG | {"num_hidden_layers": 4, "intermediate_size": 800_000}
    )
    text = plan(model=model, **ON_A_GPU)
    told = (
        "! 138 GiB are not enough: lower max_length, or halve per_device_train_batch_size, or turn"
    )
    assert f"{told} load_in_4bit on, or share" in text
    assert "fits" not in plan() and "A100" not in plan(), "a run on a CPU needs no card"


def test_savings_that_are_made_already_are_not_named(plan, tmp_path):
    shape = BIG | {"num_hidden_layers": 4, "intermediate_size": 800_000}
    model = make_config(tmp_path / "huge", **shape)
    changes = {"gradient_checkpointing": False, "reference": "copy", "dtype": "float32"}
    one = {"global_batch_size": 1, "per_device_train_batch_size": 1}
    text = plan(model=model, **ON_A_GPU | changes | one)
    assert "turn gradient_checkpointing on, or turn load_in_4bit on" in text
    assert "halve" not in text
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    text = plan(model=model, **ON_A_GPU | changes)
    assert "halve" in text and "load_in_4bit" not in text


def test_no_hours_are_told_at_a_rate_that_the_run_cannot_reach(plan):
    """The peaks are those of half precision."""
    settings = {"use_cpu": False, "gradient_checkpointing": True}
    assert " h on 1 A100" in plan(bf16=True, **settings)
    assert " h on 1 A100" in plan(dtype="bfloat16", **settings)
    assert " h on 1 A100" not in plan(**settings)


def test_an_attention_that_wants_a_gpu_does_not_stop_the_plan_without_one(plan):
    text = plan(use_cpu=False, attn_implementation="flash_attention_2")
    assert "memory " in text and "could not be counted" not in text


def test_bitsandbytes_leaves_experts_as_they_are(plan, tmp_path, monkeypatch):
    """It replaces linear layers; a base that is quantised already has its experts in it, too."""
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: True)  # of bitsandbytes
    shape = {
        "hidden_size": 1024,
        "moe_intermediate_size": 2048,
        "num_experts": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    model = make_config(tmp_path / "moe", "qwen3_moe", **shape)
    experts = 4 * 64 * 3 * 1024 * 2048
    attention = 4 * 4 * 1024**2
    parts = memory(plan(model=model, load_in_4bit=True, **ON_A_GPU))
    expected = (2 * experts + 4.25 / 8 * attention) / 2**30
    assert parts["weights"] == pytest.approx(expected, rel=0.01)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    parts = memory(plan(model=model, **ON_A_GPU))
    assert parts["weights"] == pytest.approx(4.25 / 8 * (experts + attention) / 2**30, rel=0.01)


def test_shards_leave_4_bit_weights_whole(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: True)  # of bitsandbytes
    model = make_config(tmp_path / "big", **BIG)
    changes = ON_A_GPU | {"load_in_4bit": True, "share_prefixes": False}
    alone = memory(plan(model=model, **changes))
    monkeypatch.setattr(dpotrainer, "is_sharded", lambda: True)
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    shared = memory(plan(model=model, **changes))
    assert shared["weights"] == pytest.approx(alone["weights"], rel=0.01)
    assert shared["optimizer"] == pytest.approx(alone["optimizer"] / 2, rel=0.01)
    shared = memory(plan(model=model, bnb_4bit_quant_storage="bfloat16", **changes))
    assert shared["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)


def test_a_model_that_cannot_be_counted_says_so(plan, monkeypatch):
    def fail(*args):
        raise RuntimeError("needs values")

    monkeypatch.setattr(dpotrainer, "measure_pass", fail)
    assert "! operations and memory could not be counted: needs values" in plan()


def test_the_measured_peak_is_told_after_the_first_step(base, data, tmp_path, capsys, monkeypatch):
    for step in ("save_adapter", "show_samples", "save_report"):
        monkeypatch.setattr(dpotrainer, step, lambda *args: None)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    flags = tiny.settings(base, data, tmp_path / "out", max_steps=3, eval_strategy="no")
    assert dpotrainer.run(flags) == 0
    told = "5.0 GiB of GPU memory at the peak of the first step"
    assert capsys.readouterr().out.count(told) == 1
