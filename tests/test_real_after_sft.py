"""What the tutorial teaches, on a real model: SFT first, then DPO from its adapter.

Whether the answers, not only the figures, are what was asked for; whether the reference is the SFT
model; and whether what was saved, loaded by plain transformers and peft, is what was trained.
"""

import importlib.util
import sys

import pytest
import real_model
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dpotrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(real_model.why_missing()), reason=real_model.why_missing()),
]
QUESTIONS = {  # with a word of the right answer: the model knows these before it is trained
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of England?": "London",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of China?": "Beijing",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Greece?": "Athens",
    "Which planet do we live on?": "Earth",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "What is the largest ocean on Earth?": "Pacific",
    "What gas do plants absorb from the air?": "carbon dioxide",
    "What is the chemical symbol for gold?": "Au",
    "What is the longest river in Africa?": "Nile",
    "Who painted the Mona Lisa?": "Leonardo",
    "On which continent is Brazil?": "South America",
    "What is the tallest mountain in the world?": "Everest",
    "What language is spoken in Portugal?": "Portuguese",
    "What is the currency of Japan?": "yen",
    "What color is the sky on a clear day?": "blue",
}


def load_maker():
    """configs/quickstart/make.py as a module: it knows the phrases of the preferred style."""
    path = real_model.QUICKSTART / "make.py"
    spec = importlib.util.spec_from_file_location("quickstart_make", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def answer(model, tokenizer, prompts: list[list[dict]], sampled: bool) -> tuple[list[str], float]:
    """(answers of at most 48 tokens, share of them that ended); sampled at temperature 1."""
    torch.manual_seed(0)
    rows = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    batch = tokenizer(rows, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 48, "pad_token_id": tokenizer.pad_token_id, "do_sample": sampled}
    if sampled:
        options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    ids = model.eval().generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    ended = (ids == tokenizer.eos_token_id).any(dim=1).float().mean().item()
    return tokenizer.batch_decode(ids, skip_special_tokens=True), ended


def judge(model, tokenizer) -> dict[str, float]:
    """Shares: sampled answers with a phrase of the preferred style, ended ones, plain questions
    answered right.
    """
    maker = load_maker()
    phrases = (*maker.OPENINGS["en"], *maker.CLOSINGS["en"])
    prompts = [
        pair["prompt"] for pair in real_model.english_pairs("test") if len(pair["prompt"]) == 1
    ]
    answers, ended = answer(model, tokenizer, prompts[:40], sampled=True)
    styled = [any(phrase in text for phrase in phrases) for text in answers]
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    plain, _ = answer(model, tokenizer, asked, sampled=False)
    right = [word in text for word, text in zip(QUESTIONS.values(), plain)]
    return {
        "style": sum(styled) / len(styled),
        "ended": ended,
        "right": sum(right) / len(right),
    }


@torch.no_grad()
def answer_logps(model, tokenizer, pairs: list[dict]) -> torch.Tensor:
    """Summed log-probs of the answers, (N, 2) in nats, row by row: plain transformers, float32."""
    values = []
    for pair in pairs:
        for ids, start in tiny.encode_pair(tokenizer, pair, 256):
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double()
            targets = torch.tensor(ids[start:])[:, None]
            values.append(logits.log_softmax(-1).gather(1, targets).sum())
    return torch.stack(values).view(-1, 2)


@pytest.fixture(scope="module")
def model():
    return real_model.make_real_model()


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def sft(model, tokenizer, tmp_path_factory):
    """An adapter that has seen a third of the chosen answers once: short answers that end."""
    folder = tmp_path_factory.mktemp("sft")
    answers = [
        {"prompt": pair["prompt"], "completion": pair["chosen"]}
        for pair in real_model.english_pairs("train")[: real_model.SFT_ANSWERS]
    ]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=2e-4,
            num_train_epochs=1,
            warmup_steps=2,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(answers),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.model.config.name_or_path = str(model)
    trainer.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def aligned(sft, tmp_path_factory):
    """SFT first, then DPO from that adapter, with a term that keeps the chosen answers likely."""
    folder = tmp_path_factory.mktemp("aligned")
    flags = real_model.make_run(
        sft,
        folder,
        real_model.english_pairs("train")[real_model.SFT_ANSWERS :],
        learning_rate=4e-4,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        merge=True,
    )
    assert dpotrainer.run(flags) == 0
    return folder / "out"


def test_answers_change_their_manner_and_stay_right(model, sft, aligned, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = judge(base, tokenizer)
    after = judge(PeftModel.from_pretrained(base, aligned), tokenizer)
    assert before["style"] <= 0.1 and before["right"] >= 0.9, before
    assert after["style"] >= 0.6, (before, after)
    assert after["ended"] >= 0.9 and after["right"] >= 0.7, (before, after)


def test_the_reference_is_the_sft_model_and_reloaded_models_are_the_trainers(
    model, sft, aligned, tokenizer
):
    """Held-out log-probs and rewards, computed again by plain transformers from what was saved."""
    pairs = real_model.english_pairs("test")[: real_model.HELD_OUT]
    options = {"dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(model, **options)
    reference = answer_logps(PeftModel.from_pretrained(base, sft).eval(), tokenizer, pairs)
    base = AutoModelForCausalLM.from_pretrained(model, **options)
    saved = answer_logps(PeftModel.from_pretrained(base, aligned).eval(), tokenizer, pairs)
    merged_model = AutoModelForCausalLM.from_pretrained(aligned / "merged", **options)
    merged = answer_logps(merged_model.eval(), tokenizer, pairs)

    told = tiny.evaluations(aligned)[-1]
    means = saved.mean(dim=0).tolist()
    assert told["eval_logps/chosen"] == pytest.approx(means[0], abs=1e-3)
    assert told["eval_logps/rejected"] == pytest.approx(means[1], abs=1e-3)
    rewards = (real_model.BETA * (saved - reference)).mean(dim=0).tolist()
    assert told["eval_rewards/chosen"] == pytest.approx(rewards[0], abs=1e-3)
    assert told["eval_rewards/rejected"] == pytest.approx(rewards[1], abs=1e-3)
    torch.testing.assert_close(merged, saved, atol=1e-2, rtol=1e-4)
