"""metrics, advice, picture, summary: each piece of advice with a log that calls for it and one that does not."""

import argparse
import contextlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerState

import dpotrainer

ROOT = Path(dpotrainer.__file__).parent


def settings(**changes):
    values = {"beta": 0.1, "learning_rate": 5e-6, "planned_steps": 950, "loss_type": ["sigmoid"]}
    values |= {"model_name_or_path": "org/model", "dataset_name": "org/data", "global_batch_size": 64}
    return argparse.Namespace(**values | changes)


def train_row(step, loss=0.55, margin=0.6, accuracy=0.72, chosen=-0.3):
    row = {"step": step, "loss": loss, "rewards/margins": margin, "rewards/accuracies": accuracy}
    return row | {"rewards/chosen": chosen, "rewards/rejected": chosen - margin, "learning_rate": 5e-6}


def eval_row(step, accuracy=0.73, pairs=500, loss=0.55, margin=0.8, chosen=-0.4):
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / pairs)
    row = {"step": step, "eval_loss": loss, "eval_rewards/margins": margin, "eval_rewards/accuracies": accuracy}
    row |= {"eval_rewards/accuracies_low": accuracy - half, "eval_rewards/accuracies_high": accuracy + half}
    return row | {"eval_rewards/chosen": chosen, "eval_rewards/rejected": chosen - margin}


def healthy_run(final_accuracy=0.75, final_margin=1.2, final_chosen=-1.0, steps=950):
    """A published curve: quick at first, then levelling off; rewards/chosen clearly negative at the end."""
    rows = [train_row(1, dpotrainer.LN2, 0.0, 0.0, 0.0)]
    for step in range(10, steps + 1, 10):
        grown = 1 - math.exp(-4 * step / steps)
        accuracy = 0.5 + (final_accuracy - 0.5) * grown
        rows.append(train_row(step, 0.693 - 0.17 * grown, final_margin * grown, accuracy, final_chosen * grown))
        if step % 100 == 0:
            rows.append(eval_row(step, accuracy, margin=final_margin * grown, chosen=final_chosen * grown))
    return rows


def advice(rows, **more):
    """{kind: text} of the advice that a log calls for."""
    given = {}
    with contextlib.suppress(dpotrainer.UserError):  # a runaway is stopped
        dpotrainer.advise(rows, settings(), given, **more)
    return given


@pytest.mark.parametrize("accuracy, margin, chosen", [(0.72, 1.0, -0.2), (0.77, 1.3, -1.9), (0.74, 1.1, 0.3)])
def test_healthy_published_curves_get_no_advice(accuracy, margin, chosen):
    rows = healthy_run(accuracy, margin, chosen)
    assert not [given for i in range(len(rows)) if (given := advice(rows[: i + 1]))]


def flat(n=40):
    return [train_row(step, 0.6931 + 1e-4 * (step % 3), 1e-4, 0.5, 1e-4) for step in range(10, 10 * n, 10)]


def noisy(n=60):
    return [train_row(step, 0.70, 0.02, 0.50, -0.05) for step in range(10, 10 * n, 10)]


def displaced():
    return [train_row(step, 0.3, step / 200, 0.85, -step / 100) for step in range(10, 400, 10)]


def overfitted():
    rows = [train_row(step, 0.05, 4.0, 0.99) for step in range(10, 100, 10)]
    return [
        *rows,
        eval_row(100, 0.76),
        *[train_row(step, 0.02, 6.0, 1.0) for step in range(110, 300, 10)],
        eval_row(300, 0.66),
    ]


def diverged(nats):
    return [train_row(step, 0.2, 5.0, 0.9, -nats * 0.1 * step / 100) for step in range(10, 110, 10)]


CASES = {
    "flat": (flat(), {}),
    "labels": (noisy(), {}),
    "displacement": (displaced(), {}),
    "overfitting": (overfitted(), {}),
    "divergence": (diverged(300), {}),
    "runaway": (diverged(5000), {}),
    "longer": (healthy_run(), {"length_ratio": 2.0}),
}


@pytest.mark.parametrize("kind", CASES)
def test_advice_is_given_where_its_log_calls_for_it(kind):
    rows, more = CASES[kind]
    given = advice(rows, **more)
    assert kind in given
    assert "{" not in given[kind] and "nan" not in given[kind], "every figure of the sentence is filled in"
    assert re.search(r"\d", given[kind]), "the sentence names the figures that led to it"


NEAR_MISSES = {
    "flat": [train_row(step, 0.66, 0.07, 0.6) for step in range(10, 400, 10)],
    "labels": [train_row(step, 0.64, 0.1, 0.62) for step in range(10, 600, 10)],
    "displacement": [train_row(step, 0.4, 1.5, 0.8, -1.8) for step in range(10, 600, 10)],
    "overfitting": [*overfitted()[:-1], eval_row(300, 0.75)],
    "divergence": diverged(150),
    "runaway": diverged(300),
    "longer": healthy_run(),
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_advice_is_not_given_where_the_log_is_only_near(kind):
    assert kind not in advice(NEAR_MISSES[kind], length_ratio=1.2)


def test_every_kind_of_advice_has_its_two_cases():
    assert set(CASES) == set(dpotrainer.ADVICE) == set(NEAR_MISSES)


def test_flat_is_not_said_before_enough_steps_or_for_other_losses():
    assert "flat" not in advice(flat(8))
    assert advice([]) == {}


def test_advice_is_given_once_also_over_a_resume(tmp_path, capsys):
    state, path = TrainerState(log_history=flat()), tmp_path / "trainer_state.json"
    for said in (1, 0):
        report = dpotrainer.Report(None, settings(output_dir=tmp_path))
        report.on_train_begin(None, state, None)
        dpotrainer.advise(state.log_history, report.s, report.advice)
        dpotrainer.advise(state.log_history, report.s, report.advice)
        assert capsys.readouterr().out.count("is too small") == said and set(report.advice) == {"flat"}
        state.save_to_json(path)  # as a checkpoint does
        state = TrainerState.load_from_json(path)


def test_a_runaway_is_stopped_with_its_figures():
    with pytest.raises(dpotrainer.UserError, match=r"40050 nats .* learning_rate 5e-06 destroys") as error:
        dpotrainer.advise(diverged(50000), settings(), {})
    assert error.value.status == 1


def test_the_interval_is_wilsons():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, len(dpotrainer.PAIR_METRICS)))
    column = {name: scores[:, i] for i, name in enumerate(dpotrainer.PAIR_METRICS)}
    column["rewards/accuracies"][:] = rng.random(40) < 0.7  # a view: of each pair, 0 or 1
    metrics = dpotrainer.pair_metrics(argparse.Namespace(predictions=scores))
    wins = int(column["rewards/accuracies"].sum())
    assert metrics["rewards/accuracies"] == wins / 40
    for bound in (metrics["rewards/accuracies_low"], metrics["rewards/accuracies_high"]):
        # Wilson's bounds are the p that solve (wins / n - p)^2 = z^2 p (1 - p) / n
        assert (wins / 40 - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / 40, rel=1e-9)
    assert metrics["rewards/margins"] == pytest.approx(column["rewards/margins"].mean(), rel=1e-12)


def test_picture_is_written_whole_and_for_any_history(tmp_path):
    path = tmp_path / "rewards.png"
    for rows in (healthy_run()[:1], [r for r in healthy_run() if "loss" in r], healthy_run()):
        dpotrainer.draw_rewards(rows, settings(), path)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["rewards.png"]


def test_readme_explains_each_metric_that_the_program_prints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Reading the metrics")[1].split("\n## ")[0]
    for name in [*dpotrainer.COLUMNS, "rewards/accuracies_low"]:
        assert f"`{name}`" in section, f"README, 'Reading the metrics', says nothing of {name}"
