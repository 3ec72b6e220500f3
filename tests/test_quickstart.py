"""The quickstart as the README starts it: in time, better answers, files that agree."""

import importlib.util
import json
import os
import random
import re
import sys
import unicodedata

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = tiny.ROOT / "configs" / "quickstart"
HELD_OUT = FOLDER / "preferences" / "test.jsonl"


def quickstart(output, **changes):
    """The README's command, from the root of the repository, into another folder."""
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    command = ["--config", "configs/quickstart.yaml", "--output_dir", output, *flags]
    return tiny.run_program(command, cwd=tiny.ROOT, timeout=240)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output_dir, what was printed, seconds of one core)."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    begun = os.times()
    ended = quickstart(output)
    assert ended.returncode == 0, ended.stderr
    used = os.times()
    return output, ended.stdout + ended.stderr, sum(used[2:4]) - sum(begun[2:4])


@pytest.fixture(scope="module")
def maker():
    """configs/quickstart/make.py as a module: it knows which answers are friendly and right."""
    spec = importlib.util.spec_from_file_location("quickstart_make", FOLDER / "make.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(model, tokenizer, prompts) -> list[str]:
    """One answer to each prompt, at temperature 1."""
    torch.manual_seed(0)
    rows = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    batch = tokenizer(rows, return_tensors="pt", padding=True, padding_side="left")
    options = {
        "max_new_tokens": 64,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    answers = model.eval().generate(**batch, **options, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(
        answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_it_is_done_within_a_minute_and_prefers_what_it_should(finished):
    output, printed, seconds = finished
    last = tiny.evaluations(output)[-1]
    assert last["eval_rewards/accuracies"] >= 0.95 and last["eval_rewards/margins"] > 0.2
    assert seconds < 60
    assert tiny.losses(output)[1] == pytest.approx(0.693147, abs=1e-6)
    remarks = [line for line in printed.splitlines() if line.startswith("! ")]
    assert not remarks, "a healthy run gets no advice"


def test_its_screen_fits_a_terminal(finished):
    """No wider line than 79 columns, no bar, no word of the libraries, nothing empty."""
    output, printed, _ = finished
    lines = printed.replace(str(output), "quickstart-dpo").splitlines()
    wide = [line for line in lines if columns(line) > 79]
    assert not wide
    for word in ("Warning", "[transformers]", "it/s", "examples/s", "None", "{}", "[]", "<|im_"):
        assert word not in printed, word


def columns(line):
    """The columns that a terminal needs; Chinese letters are two wide."""
    return len(line) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)


def test_its_answers_change_style_and_stay_right(finished, maker):
    """Sampled answers to held-out questions: the preferred style goes from half to 90% or more."""
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    pairs = tiny.read_pairs(HELD_OUT)
    prompts = [pair["prompt"] for pair in pairs]
    assert not {pair["prompt"][-1]["content"] for pair in pairs} & {
        pair["prompt"][-1]["content"]
        for pair in tiny.read_pairs(FOLDER / "preferences" / "train.jsonl")
    }
    before = sample(AutoModelForCausalLM.from_pretrained(FOLDER / "model"), tokenizer, prompts)
    after = sample(AutoPeftModelForCausalLM.from_pretrained(finished[0]), tokenizer, prompts)
    preferred = [
        sum(map(maker.is_preferred, answers)) / len(answers) for answers in (before, after)
    ]
    right = [
        sum(
            maker.is_factual(prompt[-1]["content"], answer)
            for prompt, answer in zip(prompts, answers)
        )
        / len(answers)
        for answers in (before, after)
    ]
    assert 0.35 < preferred[0] < 0.65 and preferred[1] >= 0.9, preferred
    assert right[1] >= right[0] - 0.05, right


def test_its_files_agree(finished):
    """The held-out figures are those of the saved adapter in float64; each file is what it says."""
    output, printed, _ = finished
    last = tiny.evaluations(output)[-1]
    exact = tiny.evaluate_adapter(FOLDER / "model", output, tiny.read_pairs(HELD_OUT))
    for name, value in exact.items():
        assert last[name] == pytest.approx(value, abs=1e-2 if "logps" in name else 1e-3), name
    assert (output / "rewards.png").read_bytes().startswith(b"\x89PNG")
    samples = (output / "samples.md").read_text(encoding="utf-8")
    assert samples.count("**policy**") == samples.count("**reference**") == 8
    questions = [pair["prompt"][-1]["content"] for pair in tiny.read_pairs(HELD_OUT)[:8]]
    assert all(question in samples for question in questions)
    assert (
        f"{last['eval_rewards/margins']:.4f}" in printed and f"{last['eval_loss']:.4f}" in printed
    )


def test_a_learning_rate_for_full_fine_tuning_hardly_moves_an_adapter_and_is_told_so(tmp_path):
    ended = quickstart(
        tmp_path / "out", learning_rate=5e-9, max_steps=24, sample_prompts=0, eval_steps=100
    )
    assert ended.returncode == 0, ended.stderr
    advice = [line for line in ended.stdout.splitlines() if line.startswith("! ")]
    assert len({*advice}) == 1 and "learning_rate 5e-09 is too small" in advice[0]
    assert len(advice) == 2, "once when it shows, once in the summary"


def test_a_learning_rate_that_destroys_the_model_stops_the_run(tmp_path):
    ended = quickstart(tmp_path / "out", learning_rate=10, max_steps=24, sample_prompts=0)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "learning_rate 10 destroys the model" in ended.stderr
    assert "stopped and saved at step" in ended.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert list((tmp_path / "out").glob("checkpoint-*")), "what led to it can be looked at"


def python_code(text):
    return re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]


def test_the_code_of_the_model_card_runs_as_it_stands(finished, capsys, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    card = (finished[0] / "README.md").read_text(encoding="utf-8")
    assert "None" not in card
    exec(compile(python_code(card), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_readme_s_code_chats_with_the_adapter(finished, capsys, monkeypatch):
    """All of it but the names of the folder and of the question."""
    monkeypatch.chdir(tiny.ROOT)
    readme = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    code = python_code(readme.split("## Using the result")[1])
    code = code.replace("qwen3-8b-dpo", str(finished[0]))
    exec(compile(code.replace("Why is the sky blue?", "Where does a goat live?"), "", "exec"), {})
    assert "goat" in capsys.readouterr().out


def test_the_finished_run_is_merged_by_the_readme_s_flag_and_can_chat(finished):
    ended = quickstart(finished[0], merge="true")
    assert ended.returncode == 0, ended.stderr
    assert "finished" in ended.stdout and "merged into" in ended.stdout
    merged = finished[0] / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    pairs = tiny.read_pairs(HELD_OUT)[:4]
    texts = sample(
        AutoModelForCausalLM.from_pretrained(merged), tokenizer, [pair["prompt"] for pair in pairs]
    )
    assert all(texts)


def test_the_files_are_small_and_safe():
    model = FOLDER / "model"
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12_000_000
    assert not [path for path in model.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen3"
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert weights <= 2_000_000


def test_make_remakes_the_pairs(tmp_path, maker):
    """The same files from the same seed; the weights, too, but they take minutes."""
    maker.write_preferences(maker.make_facts(), tmp_path, random.Random(maker.SEED))
    assert tiny.tree(tmp_path) == tiny.tree(FOLDER / "preferences")


def test_no_branch_of_the_program_knows_the_quickstart():
    source = tiny.PROGRAM.read_text(encoding="utf-8")
    assert not [
        line for line in source.splitlines() if "quickstart" in line and "--config" not in line
    ]
