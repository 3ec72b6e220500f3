"""Rows, metrics, advice, picture, samples, model card: what a person sees of a run."""

import json
import math
import re
import shutil
import subprocess
import sys
import types

import huggingface_hub
import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer, GenerationConfig, TrainerControl, TrainerState

import dpotrainer

LN2 = math.log(2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model, data): what tiny runs are made from."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_pairs(folder / "pairs" / "train.jsonl", 16, seed=1)
    tiny.make_pairs(folder / "pairs" / "test.jsonl", 9, seed=2)
    return tiny.make_model(folder / "model"), folder / "pairs"


@pytest.fixture
def make_job(inputs, tmp_path):
    """make_job(**settings): what read_settings makes of the settings of a tiny run."""

    def make(**changes):
        return dpotrainer.read_settings(tiny.settings(*inputs, tmp_path / "out", **changes))

    return make


# ------------------------------------------------------------------------------------- made-up logs
def train_row(step, loss, margin, accuracy, chosen):
    return {
        "step": step,
        "loss": loss,
        "rewards/margins": margin,
        "rewards/accuracies": accuracy,
        "rewards/chosen": chosen,
        "rewards/rejected": chosen - margin,
        "learning_rate": 5e-6,
    }


def eval_row(step, accuracy, margin, chosen, pairs=500, loss=0.55):
    row = {
        f"eval_{name}": value
        for name, value in train_row(step, loss, margin, accuracy, chosen).items()
    }
    low, high = dpotrainer.wilson_interval(accuracy, pairs)
    row |= {"eval_rewards/accuracies_low": low, "eval_rewards/accuracies_high": high}
    return {"step": step} | {
        name: row[name] for name in row if name not in ("eval_step", "eval_learning_rate")
    }


def curve(
    steps=950, every=10, accuracy=0.75, margin=1.2, chosen=-1.0, first=LN2, loss=0.53, noise=0.03
):
    """A run that learns quickly, then levels off; the first line is untrained."""
    rng = np.random.default_rng(0)
    rows = [train_row(1, first, 0.0, 0.0, 0.0)]
    for step in range(every, steps + 1, every):
        grown = 1 - math.exp(-4 * step / steps)
        shaken = rng.normal(0, noise, 3)
        now = first + (loss - first) * grown + shaken[0]
        share = 0.5 + (accuracy - 0.5) * min(1, 2 * grown) + shaken[1]
        rows.append(train_row(step, now, margin * grown * (1 + shaken[2]), share, chosen * grown))
        if step % (10 * every) == 0:
            rows.append(
                eval_row(step, 0.5 + (accuracy - 0.5) * grown, margin * grown, chosen * grown)
            )
    return rows


HEALTHY = {  # final figures of published kinds of runs: (curve, beta, tokens per answer, loss_type)
    "zephyr, beta 0.01": (curve(accuracy=0.76, margin=0.82, chosen=-1.23), 0.01, 280, "sigmoid"),
    "beta 0.01, further": (curve(accuracy=0.75, margin=1.1, chosen=-2.4), 0.01, 280, "sigmoid"),
    "gemma, beta 0.05": (curve(accuracy=0.77, margin=0.59, chosen=0.48), 0.05, 280, "sigmoid"),
    "beta 0.1": (curve(), 0.1, 280, "sigmoid"),
    "beta 0.5": (curve(margin=1.0, chosen=-0.6), 0.5, 280, "sigmoid"),
    "long answers": (curve(margin=4.0, chosen=-12.0, accuracy=0.8), 0.01, 1800, "sigmoid"),
    "sft term": (curve(first=1.9, loss=1.4, margin=2.0, chosen=6.0), 0.1, 300, ["sigmoid", "sft"]),
    "ipo": (curve(first=25.0, loss=12.0, margin=0.3, chosen=-0.3, noise=0.01), 0.1, 280, "ipo"),
    "short": (curve(steps=24, every=4, accuracy=0.8), 0.1, 60, "sigmoid"),
    "easy pairs": (
        curve(accuracy=1.0, margin=6.0, chosen=0.5, loss=0.02, noise=0),
        0.1,
        20,
        "sigmoid",
    ),
}


def follow(rows, job, tokens, max_steps=None):
    """({kind: text}, whether it was stopped) of a log that grows line by line, as in a run."""
    given, stopped = {}, False
    for count in range(1, len(rows) + 1):
        history = rows[:count]
        state = TrainerState(
            log_history=history,
            global_step=history[-1]["step"],
            max_steps=max_steps or rows[-1]["step"],
        )
        trend = dpotrainer.read_trend(state, job, tokens)
        if trend is not None:
            given |= dpotrainer.find_advice(trend, job.training_args)
            stopped |= dpotrainer.is_runaway(trend)
    return given, stopped


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name, make_job):
    rows, beta, tokens, loss_type = HEALTHY[name]
    job = make_job(beta=beta, loss_type=loss_type, global_batch_size=64)
    assert follow(rows, job, tokens) == ({}, False)


def unmoved(steps, every):
    steps = [1, *range(every, steps + 1, every)]
    return [train_row(step, LN2 + 1e-4 * (step % 3), 1e-3, 0.5, 1e-3) for step in steps]


def shuffled(steps=600):
    return [train_row(step, 0.70, 0.02, 0.50, -0.5) for step in [1, *range(10, steps, 10)]]


def held_out_at_chance():
    """Pairs learned by heart, and nothing that helps with others."""
    rows = [train_row(1, LN2, 0, 0, 0)]
    for step in range(10, 300, 10):
        rows.append(train_row(step, 0.3, 2.0, 0.9, -0.5))
    return [*rows, eval_row(300, 0.5, 0.0, -0.5)]


def displaced():
    return [train_row(step, 0.3, step / 200, 0.85, -step / 20) for step in [1, *range(10, 400, 10)]]


def overfitted(last=0.66):
    rows = [train_row(step, 0.05, 4.0, 0.99, -1.0) for step in [1, *range(10, 100, 10)]]
    rows.append(eval_row(100, 0.76, 2.0, -1.0))
    rows += [train_row(step, 0.02, 6.0, 1.0, -1.5) for step in range(110, 300, 10)]
    return [*rows, eval_row(300, last, 2.0, -1.5)]


SICK = {
    "a tenth of the rate": ("flat", unmoved(400, 10), "learning_rate 0.002 is too small"),
    "a few steps": ("flat", unmoved(9, 2), "8 steps are too few"),
    "one step": ("flat", unmoved(1, 10)[:1], "1 steps are too few"),
    "sides shuffled": ("labels", shuffled(), "swapped"),
    "held out at chance": ("labels", held_out_at_chance(), "swapped"),
    "chosen pushed down": ("displacement", displaced(), "nats per token"),
    "overfitted": ("overfitting", overfitted(), "fell from 0.760 at step 100 to 0.660"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_told_so(name, make_job):
    kind, rows, words = SICK[name]
    job = make_job(global_batch_size=64)
    given, stopped = follow(rows, job, tokens=100)
    assert words in given[kind] and "nan" not in given[kind]
    assert re.search(r"\d", given[kind]), "the sentence has the figures that led to it"
    assert not stopped


NEAR = {
    "flat": [train_row(step, 0.68, 0.05, 0.6, -0.1) for step in [1, *range(10, 400, 10)]],
    "labels": [train_row(step, 0.64, 0.1, 0.62, -0.3) for step in [1, *range(10, 600, 10)]],
    "displacement": [train_row(step, 0.4, 1.5, 0.8, -8.0) for step in [1, *range(10, 600, 10)]],
    "overfitting": overfitted(last=0.74),
}


@pytest.mark.parametrize("kind", NEAR)
def test_a_run_that_is_only_near_is_not(kind, make_job):
    assert kind not in follow(NEAR[kind], make_job(global_batch_size=64), tokens=100)[0]


def test_chance_is_not_concluded_from_few_pairs(make_job):
    """20 pairs at 0.45 may be bad luck; 3,200 are not."""
    rows = [train_row(step, 0.69, 0.02, 0.45, -0.5) for step in range(1, 6)]
    assert "labels" not in follow(rows, make_job(global_batch_size=4), 100)[0]
    rows = [train_row(step, 0.69, 0.02, 0.45, -0.5) for step in range(1, 600, 10)]
    assert "labels" in follow(rows, make_job(global_batch_size=64), 100)[0]


def test_only_a_loss_that_stays_far_above_the_untrained_one_stops_a_run(make_job):
    job = make_job()
    spike = [train_row(step, 0.5, 1.0, 0.8, -0.5) for step in range(1, 20)]
    spike[10]["loss"] = 50.0
    assert not follow(spike, job, 100)[1], "one bad batch"
    far_but_learning = [train_row(step, 0.1, 50.0, 0.99, -500.0) for step in range(1, 20)]
    assert not follow(far_but_learning, job, 100)[1], "its loss is good"
    lost = [
        train_row(1, LN2, 0, 0, 0),
        *[train_row(step, 9.0, -20, 0.4, -50) for step in range(2, 6)],
    ]
    assert follow(lost, job, 100)[1]


# --------------------------------------------------------------------------------------- the report
@pytest.fixture
def make_report(make_job):
    """make_report(history, **settings): a Report as train_policy makes it, without a trainer."""

    def make(history=(), **changes):
        job = make_job(**changes)
        columns = {name: [10, 20] for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens")}
        trainer = types.SimpleNamespace(
            train_dataset=dpotrainer.Dataset.from_dict(columns),
            state=TrainerState(log_history=list(history)),
        )
        dpotrainer.Path(job.training_args.output_dir).mkdir(exist_ok=True)
        return dpotrainer.Report(trainer, job)

    return make


def log(report, rows, max_steps):
    """The state after the report has seen the rows one by one."""
    state = TrainerState(max_steps=max_steps, is_world_process_zero=True)
    state.global_step = rows[0]["step"] - 1
    control = TrainerControl()
    report.on_train_begin(None, state, control)
    for row in rows:
        state.global_step = row["step"]
        state.log_history.append(row)
        report.on_log(None, state, control, logs=row)
    return state, control


def test_rows_fit_a_terminal_and_stand_below_their_head(make_report, capsys, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(dpotrainer.time, "monotonic", lambda: next(seconds) / 7)
    rows = [
        train_row(99989, LN2, 0.0, 0.0, 0.0),
        train_row(99990, 0.5, 12.3456, 0.75, -45.6789),
        train_row(99991, 12345.678, -1234.5, 0.5, -98765.4),
        eval_row(99991, 0.753, 1.2, -1.0),
    ]
    log(make_report(), rows, max_steps=200_000)
    head, *lines = [
        line for line in capsys.readouterr().out.splitlines() if line and line[0] != "!"
    ]
    assert len(head) == 79 and all(len(line) <= 79 for line in lines), lines
    ends = [match.end() for match in re.finditer(r"\S+", head)]
    for line in lines[:3]:
        assert [match.end() for match in re.finditer(r"\S+", line)] == ends, line
    held_out = [match.end() for match in re.finditer(r"\S+", lines[3])]
    assert held_out[:6] == ends[:6] and lines[3].endswith("held out, 0.713 to 0.789")


def test_times_are_those_of_the_clock(make_report, capsys, monkeypatch):
    """Steps of a minute: a row has what passed and what is left, and the end is told once."""
    now = [1000.0]
    monkeypatch.setattr(dpotrainer.time, "monotonic", lambda: now[0])
    report = make_report(global_batch_size=8, per_device_train_batch_size=4)
    state = TrainerState(max_steps=100, is_world_process_zero=True, logging_steps=10)
    report.on_train_begin(None, state, TrainerControl())
    for step in range(1, 31):
        state.global_step = step
        now[0] += 60
        if step % 10 == 0:
            state.log_history.append(train_row(step, 0.6, 0.3, 0.7, -0.1))
            report.on_log(None, state, TrainerControl(), logs=state.log_history[-1])
        if step == 10:
            now[0] += 100  # an evaluation: not in the speed, but in the times
            report.on_evaluate(None, state, None)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "0.6000" in line]
    assert rows[0].split()[-3:] == [f"{8 / 60:.2f}", "0:10:00", "1:30:00"]
    assert rows[1].split()[-3:] == [f"{8 / 60:.2f}", "0:21:40", "1:26:40"]
    assert len(re.findall(r"ends on \w+ \d+ \w+, \d+:\d+", printed)) == 1


def test_a_long_evaluation_shows_that_it_lives(make_report, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(dpotrainer.time, "monotonic", lambda: now[0])
    report = make_report()
    state = TrainerState(max_steps=100)
    report.on_train_begin(None, state, None)
    for _ in range(2):
        for _ in range(25):
            now[0] += 4
            report.on_prediction_step(None, state, None, eval_dataloader=range(25))
        report.on_evaluate(None, state, None)
    signs = re.findall(r"evaluation: (\d+) of 25 passes", capsys.readouterr().out)
    assert signs == ["9", "17", "25"] * 2


def test_advice_is_given_once_also_over_a_resume_and_stays_in_the_log(
    make_report, tmp_path, capsys
):
    report = make_report(global_batch_size=8)
    state, _ = log(report, unmoved(40, 2), max_steps=40)
    advice = dpotrainer.read_advice(state.log_history)
    assert capsys.readouterr().out.count("is too small") == 1 and set(advice) == {"flat"}
    state.save_to_json(tmp_path / "trainer_state.json")  # as a checkpoint does
    state = TrainerState.load_from_json(tmp_path / "trainer_state.json")
    resumed = make_report(state.log_history)
    resumed.on_train_begin(None, state, None)
    resumed.advise(state, TrainerControl())
    assert "is too small" not in capsys.readouterr().out
    assert dpotrainer.read_advice(state.log_history) == advice
    written = tiny.read_metrics(resumed.folder)
    assert [row["advice"] for row in written if "advice" in row] == [advice]


def test_a_runaway_asks_for_a_checkpoint_and_an_end(make_report):
    rows = [
        train_row(1, LN2, 0, 0, 0),
        *[train_row(step, 9.0, -20, 0.4, -50) for step in (2, 3, 4)],
    ]
    report = make_report()
    _, control = log(report, rows, max_steps=100)
    assert control.should_save and control.should_training_stop
    assert "loss 9 is far worse than 0.693" in report.stopped and "0.002 destroys" in report.stopped


def test_answer_tokens_are_those_after_the_cut():
    pairs = dpotrainer.Dataset.from_dict(
        {"prompt_tokens": [10, 30], "chosen_tokens": [50, 50], "rejected_tokens": [5, 6]}
    )
    assert dpotrainer.count_answer_tokens(pairs, 40) == (30 + 10 + 5 + 6) / 4
    assert dpotrainer.count_answer_tokens(pairs, None) == (50 + 50 + 5 + 6) / 4


def test_metrics_have_no_timings_and_begin_with_the_step(tmp_path):
    rows = [
        {"loss": 0.6, "epoch": 0.5, "step": 3},
        {"eval_loss": 0.6, "eval_runtime": 2.0, "eval_steps_per_second": 3.0, "step": 3},
        {"train_runtime": 9.0, "step": 3},
    ]
    dpotrainer.write_metrics(rows, tmp_path / "metrics.jsonl")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [
        ["step", "epoch", "loss"],
        ["step", "eval_loss"],
    ]


def test_a_picture_is_drawn_of_any_history(tmp_path):
    path = tmp_path / "rewards.png"
    whole = curve()
    for rows in (whole[:1], [row for row in whole if "loss" in row], whole, whole[-1:]):
        dpotrainer.draw_rewards(rows, "a run", path)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# ------------------------------------------------------------------------------------------ answers
END = 2  # of tiny.make_tokenizer
CONFIG = GenerationConfig(eos_token_id=[END], max_new_tokens=64)


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return AutoTokenizer.from_pretrained(inputs[0])


def answer(tokenizer, text, ends=True):
    return tokenizer(text).input_ids + [END] * ends


ENGLISH = [
    f"The house is {a} and the river is {b}."
    for a in ("red", "old")
    for b in "two warm cold new".split()
]


def advise_on(tokenizer, policy, reference, chosen=None):
    return dpotrainer.find_answer_advice(policy, reference, chosen or reference, CONFIG, tokenizer)


def test_answers_that_are_as_good_as_the_reference_s_get_no_advice(tokenizer):
    reference = [answer(tokenizer, text) for text in ENGLISH]
    policy = [answer(tokenizer, f"Good question! {text}") for text in ENGLISH]
    assert advise_on(tokenizer, policy, reference) == {}
    # what the reference does as well is not the policy's fault
    cut = [answer(tokenizer, text, ends=False) for text in ENGLISH]
    also_cut = [answer(tokenizer, f"Good question! {text}", ends=False) for text in ENGLISH]
    assert advise_on(tokenizer, also_cut, cut) == {}
    # one of eight may be chance
    assert advise_on(tokenizer, [*policy[:7], also_cut[7]], reference) == {}


def test_answers_that_are_worse_than_the_reference_s_are_counted(tokenizer):
    reference = [answer(tokenizer, text) for text in ENGLISH]
    endless = [answer(tokenizer, f"Good {text}", ends=False) for text in ENGLISH[:5]]
    found = advise_on(tokenizer, endless + [[*ids, END] for ids in reference[5:]], reference)
    assert (
        set(found) == {"endless"}
        and "5 of 8 answers do not end in time, 0 of the" in found["endless"]
    )
    loops = [answer(tokenizer, text + " the red house" * 40) for text in ENGLISH]
    found = advise_on(tokenizer, loops, reference)
    assert set(found) == {"looping", "long"}
    assert found["looping"].startswith("! 8 of 8 answers repeat themselves, 0 of the reference's")
    assert found["long"].startswith("! 8 of 8 answers are more than twice as long")
    assert "learning_rate" in found["looping"] and "sft" in found["looping"]
    chinese = [answer(tokenizer, "猫狗水山") for _ in ENGLISH]
    assert set(advise_on(tokenizer, chinese, reference)) == {"language"}
    assert advise_on(tokenizer, chinese, reference, chosen=chinese) == {}, "what the pairs ask for"
    found = advise_on(
        tokenizer, reference[:6] + chinese[:2], reference, [*reference[:6], *chinese[:2]]
    )
    assert (
        set(found) == {"unchanged"} and "6 of 8 answers are the reference's" in found["unchanged"]
    )


def test_loops_are_found_in_any_language_and_lists_are_none(tokenizer):
    assert dpotrainer.is_loop(answer(tokenizer, "猫狗水山" * 20))
    assert dpotrainer.is_loop(answer(tokenizer, f"{' '.join(tiny.WORDS)} {'so good ' * 60}"))
    assert not dpotrainer.is_loop(answer(tokenizer, "猫狗水山红绿"))
    table = "\n".join(f"| {a} | {b} |" for a, b in zip(tiny.WORDS, tiny.WORDS[7:]))
    assert not dpotrainer.is_loop(answer(tokenizer, table))
    assert not dpotrainer.is_loop(answer(tokenizer, "no no no no"))


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, 世界 and more", "LATIN"),
        ("今日はいい天気", "CJK"),
        ("Привет", "CYRILLIC"),
        ("12 + 3 = 15", ""),
    ],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert dpotrainer.find_script(text) == script


def test_a_line_of_a_sample_fits_a_terminal():
    assert dpotrainer.shorten("policy     a\nb") == "policy     a b"
    for text in ("word " * 50, "猫" * 60):
        line = dpotrainer.shorten(text)
        assert line.endswith(" ...") and len(line) + sum(letter == "猫" for letter in line) <= 79


# --------------------------------------------------------------------------------------- whole runs
def run(inputs, output, **changes):
    options = {"max_steps": 2, "sample_prompts": 4, "eval_steps": 2, "save_steps": 2}
    dpotrainer.main(tiny.settings(*inputs, output, **options | changes))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """output_dir of a run whose learning rate changes next to nothing; its model samples."""
    folder = tmp_path_factory.mktemp("run")
    model = shutil.copytree(inputs[0], folder / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1}))
    run((model, inputs[1]), folder / "out", learning_rate=1e-12)
    return folder / "out"


def test_an_unchanged_policy_answers_as_the_reference_and_is_told_so(finished):
    samples = (finished / "samples.md").read_text(encoding="utf-8")
    assert samples.count("**reference**") == samples.count("**policy**") == 4
    for section in samples.split("\n## ")[1:]:
        first, second = re.findall(r"tokens\n\n``````text\n(.*?)\n``````", section, flags=re.DOTALL)
        assert first == second
    assert "<|im_" not in samples
    for name in ("samples.md", "README.md"):
        text = (finished / name).read_text(encoding="utf-8")
        assert "! 4 of 4 answers are the reference's" in text
    assert "2 steps are too few" in (finished / "README.md").read_text(encoding="utf-8")


def test_samples_are_the_reference_s_and_the_policy_s(inputs, tmp_path):
    """Greedy answers, made again by plain transformers and peft from what the run saved."""
    run(inputs, tmp_path / "out", learning_rate=5e-2, max_steps=4)
    tokenizer = AutoTokenizer.from_pretrained(inputs[0])
    samples = (tmp_path / "out" / "samples.md").read_text(encoding="utf-8")
    sections = samples.split("\n## ")[1:]
    reference, policy = tiny.load_policy(inputs[0]), tiny.load_policy(inputs[0], tmp_path / "out")
    for pair, section in zip(tiny.read_pairs(inputs[1] / "test.jsonl"), sections, strict=False):
        batch = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert pair["prompt"][-1]["content"] in section
        for name, model in (("reference", reference), ("policy", policy)):
            ids = model.generate(**batch, max_new_tokens=64, do_sample=False)[
                0, batch["input_ids"].shape[1] :
            ]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            shown = re.search(
                rf"\*\*{name}\*\*, \d+ tokens\n\n``````text\n(.*?)\n``````", section, re.DOTALL
            )[1]
            assert shown == text, name


def test_generation_settings_that_transformers_refuses_are_told_in_a_line(inputs, tmp_path, capsys):
    model = tiny.make_model(tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.0, "eos_token_id": 2, "pad_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(settings))
    run((model, inputs[1]), tmp_path / "out")
    assert "! no samples, the model could not generate: " in capsys.readouterr().out
    assert (
        not (tmp_path / "out" / "samples.md").exists() and (tmp_path / "out" / "README.md").exists()
    )


def test_log_probs_that_are_nan_cost_the_samples_alone(inputs, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(dpotrainer, "generate_answers", fail)
    run(inputs, tmp_path / "out")
    assert "! no samples, the model could not generate: probability" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("quantised", [False, True])
def test_merging_is_only_offered_where_it_is_not_refused(
    quantised, inputs, tmp_path, capsys, monkeypatch
):
    save_report = dpotrainer.save_report

    def save(trainer, job, start, report):
        if quantised:
            start.config.quantization_config = {"quant_method": "awq"}
        save_report(trainer, job, start, report)

    monkeypatch.setattr(dpotrainer, "save_report", save)
    run(inputs, tmp_path / "out", sample_prompts=0)
    assert ("`--merge true`" in capsys.readouterr().out) is not quantised


def test_the_summary_has_the_first_the_kept_and_the_last_evaluation(make_report):
    report = make_report()
    rows = [eval_row(step, 0.7, 1.0, -0.5) for step in (0, 100, 200, 300)]
    line = "the adapter is that of step 100, the best by held-out loss"
    kept = {"step": 300, "kept_step": 100, "advice": {"kept": line}}
    trainer = types.SimpleNamespace(state=TrainerState(log_history=[*rows, kept], global_step=300))
    lines = dpotrainer.summarise(trainer, report.job, report)
    assert [line.split()[0] for line in lines if "held out" in line][:3] == ["0", "100", "300"]
    assert lines[-1] == line


def test_the_samples_advice_is_in_the_log(finished):
    advice = dpotrainer.read_advice(tiny.read_metrics(finished))
    assert set(advice) == {"flat", "unchanged"}


def test_the_card_has_metadata_that_the_hub_reads_and_no_none(finished, inputs, make_job):
    for path in (finished / "README.md",):
        text = path.read_text(encoding="utf-8")
        assert "None" not in text and "SchedulerType" not in text and str(inputs[0]) not in text
        card = huggingface_hub.ModelCard(text)
        assert card.data.library_name == "peft" and card.data.base_model is None
        assert "of `model` (local)" in text and "on `pairs` (local)" in text
        assert "beta 0.1," in text and "rewards.png" in text and "held out" in text


def test_advice_is_in_the_log_once():
    """Also where the end of a run is gone through again."""
    state = TrainerState(global_step=3)
    dpotrainer.add_advice(state, {"long": "! a"})
    dpotrainer.add_advice(state, {"long": "! a", "endless": "! b"})
    assert [row["advice"] for row in state.log_history] == [{"long": "! a"}, {"endless": "! b"}]


def test_the_card_names_what_is_on_the_hub(make_job, tokenizer, tmp_path):
    job = make_job(learning_rate=5e-6)
    job.script_args.dataset_name = "trl-lib/ultrafeedback_binarized"
    job.model_args.model_name_or_path = "me/sft"
    source = dpotrainer.Source("me/sft", None, "Qwen/Qwen3-8B", None, adapter=object())
    start = types.SimpleNamespace(source=source, tokenizer=tokenizer)
    text = dpotrainer.make_card(job, start, 950, ["a summary"])
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model == "Qwen/Qwen3-8B"
    assert card.data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert "begun as the adapter [me/sft](https://huggingface.co/me/sft)" in text
    assert "https://huggingface.co/datasets/trl-lib/ultrafeedback_binarized" in text
    assert "950 steps of 4 pairs, rows of up to 96 tokens," in text
    job.training_args.max_length = None
    text = dpotrainer.make_card(job, start, 950, ["a summary"])
    assert "950 steps of 4 pairs, rows of any length," in text
    assert "learning rate 5e-06 (linear)" in text or "learning rate 5e-06 (cosine)" in text


@pytest.mark.slow
def test_a_mistake_is_the_last_word_of_the_launcher(inputs, tmp_path):
    """Once, and below what torch's launcher says itself."""
    flags = tiny.settings(*inputs, tmp_path / "out", beta=-1, per_device_train_batch_size=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*launcher, "--master_port", "0", str(tiny.PROGRAM), *flags],
        capture_output=True,
        text=True,
        env=tiny.environment(),
        timeout=200,
    )
    assert ended.returncode == 1 and ended.stderr.count("beta=-1.0: must be above 0") == 1
    *_, message, ruler = ended.stderr.strip().splitlines()
    assert "dpotrainer: flag --beta, beta=-1.0: must be above 0" in message and set(ruler) == {"="}


def test_sharded_models_are_not_sampled(make_job, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer = types.SimpleNamespace(eval_dataset=[1])
    dpotrainer.show_samples(trainer, make_job(sample_prompts=4))
    assert "no samples: the model is sharded" in capsys.readouterr().out
