"""What only a real model shows: exactness on real weights, in float32 and in bf16 autocast, and that
the program tells of answers that fell apart.
"""

import gc
import math

import pytest
import real_model
import tiny
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.kernels import chunked_logprob

import dpotrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(real_model.why_missing()), reason=real_model.why_missing()),
]
PAIRS_PER_STEP = 2


@pytest.fixture(scope="module")
def model():
    return real_model.make_real_model()


def make_trainers(model, tmp_path, steps: int, bf16: bool) -> tuple[dict, dict]:
    """({name: trainer}, {name: its batches}): shared prefixes, rows apart, and stock TRL; all with
    the same adapter.
    """
    pairs = real_model.english_pairs("train")[: steps * PAIRS_PER_STEP]
    data = tmp_path / "pairs.jsonl"
    Dataset.from_list(pairs).to_json(data)
    trainers = {}
    rows = {}
    for name, share in (("shared", True), ("apart", False)):
        changes = {"share_prefixes": share, "bf16": bf16, "eval_pairs": 0, "max_length": 256}
        changes |= {"global_batch_size": PAIRS_PER_STEP, "eval_strategy": "no"}
        changes |= {"per_device_train_batch_size": PAIRS_PER_STEP, "learning_rate": 2e-4}
        job = dpotrainer.read_settings(tiny.settings(model, data, tmp_path / name, **changes))
        start = dpotrainer.load_start(job)
        preferences = dpotrainer.load_preferences(job, start.tokenizer)
        sharing = dpotrainer.check_sharing(job, start, preferences)
        assert sharing.is_used == share, sharing.line
        trainers[name] = dpotrainer.build_trainer(job, start, preferences, sharing)
        assert (type(trainers[name].data_collator) is dpotrainer.SharedPrefixCollator) == share
        rows[name] = preferences.train

    tokenizer = AutoTokenizer.from_pretrained(model)
    trainers["stock"] = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            str(tmp_path / "stock"),
            use_cpu=True,
            bf16=bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=PAIRS_PER_STEP,
            max_length=256,
            learning_rate=2e-4,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    rows["stock"] = trainers["stock"].train_dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    adapter = {
        name: weight.detach().clone()
        for name, weight in trainers["shared"].model.named_parameters()
        if weight.requires_grad
    }
    batches = {}
    for name, trainer in trainers.items():
        for weight_name, weight in trainer.model.named_parameters():
            if weight.requires_grad:
                weight.data.copy_(adapter[weight_name])
        examples = [{column: row[column] for column in names} for row in rows[name]]
        assert examples == [{column: row[column] for column in names} for row in rows["stock"]]
        batches[name] = [
            examples[i : i + PAIRS_PER_STEP] for i in range(0, len(examples), PAIRS_PER_STEP)
        ]
        trainer.current_gradient_accumulation_steps = 1  # what train() would have set
        prepared = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        trainer.model_wrapped, trainer.optimizer = prepared  # autocast comes with it
    return trainers, batches


def take_step(trainer, examples: list[dict]) -> tuple[float, torch.Tensor]:
    """(loss, gradient of all adapter weights in one row) of a step of AdamW."""
    loss = trainer.training_step(trainer.model_wrapped, trainer.data_collator(examples)).item()
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss, gradient


@pytest.mark.parametrize(
    "steps, bf16, loss_gap, gradient_gap",
    [(10, False, 1e-5, 1e-3), (3, True, 0.02, 0.1)],
    ids=["float32", "bf16 autocast"],
)
def test_shared_apart_and_stock_are_one_training(
    model, tmp_path, monkeypatch, steps, bf16, loss_gap, gradient_gap
):
    """The first loss is ln 2, and over the steps loss and gradient stay the same."""
    trainers, batches = make_trainers(model, tmp_path, steps, bf16)
    for step in range(steps):
        found = {}
        for name, trainer in trainers.items():
            with monkeypatch.context() as patch:
                if name == "stock":  # its head as TRL has it, which scores every position
                    patch.setattr(trl.trainer.utils, "_use_triton", chunked_logprob._use_triton)
                found[name] = take_step(trainer, batches[name][step])
        loss, gradient = found["stock"]
        if step == 0:
            assert all(first == pytest.approx(math.log(2), abs=1e-5) for first, _ in found.values())
        for name in ("shared", "apart"):
            other_loss, other_gradient = found[name]
            assert other_loss == pytest.approx(loss, abs=loss_gap), (step, name)
            gap = (other_gradient - gradient).norm() / gradient.norm()
            assert gap < gradient_gap, (step, name, gap)
    del trainers
    gc.collect()


def test_good_figures_with_bad_answers_are_told(model, tmp_path, capsys):
    """Without SFT, without the sft term and with a large learning rate accuracies reach 1.00 and the
    answers are one loop: the program says so, on the screen, in samples.md and in the card.
    """
    pairs = real_model.english_pairs("train")[:128]
    assert dpotrainer.run(real_model.make_run(model, tmp_path, pairs, learning_rate=8e-4)) == 0
    folder = tmp_path / "out"
    assert tiny.evaluations(folder)[-1]["eval_rewards/accuracies"] >= 0.95
    printed = capsys.readouterr().out
    told = [line for line in printed.splitlines() if line.startswith("! ")]
    assert told, printed
    for name in ("samples.md", "README.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert [line for line in told if line in text], (name, told)
