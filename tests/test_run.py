"""A run from start to end, what it leaves, and every way in which it can be broken off, damaged or started twice."""

import functools
import gc
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

import dpotrainer

TOKEN = "hf_thisIsASecretOfTheTests"
KEPT = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "metrics.jsonl",
    "settings.yaml",
)  # equal after any fault


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model, data): a tiny Qwen3 and a folder of 48 pairs to train on and 9 held out."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_pairs(folder / "pairs" / "train.jsonl", 48, seed=1)
    tiny.make_pairs(folder / "pairs" / "test.jsonl", 9, seed=2)
    return tiny.make_model(folder / "model"), folder / "pairs"


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(output_dir, what was printed) of a run that nothing disturbed: 12 steps, a checkpoint at each fourth."""
    folder = tmp_path_factory.mktemp("finished")
    flags = tiny.settings(*inputs, folder / "out", sample_prompts=2)
    process = tiny.start_program(flags, folder / "log", HF_TOKEN=TOKEN)
    assert tiny.end_program(process) == 0, (folder / "log").read_text()
    return folder / "out", (folder / "log").read_text()


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """output_dir of a run that SIGTERM ended at step 6: checkpoint-4 and checkpoint-6. Copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = tiny.settings(*inputs, folder / "out")
    process = tiny.start_program(
        flags,
        folder / "log",
        tiny.no_pictures,
        functools.partial(send, at=6, signals=[signal.SIGTERM]),
    )
    assert tiny.end_program(process) == 143, (folder / "log").read_text()
    return folder / "out"


@pytest.fixture
def run(inputs, tmp_path):
    """run(*changes, status=0, settings) -> what was printed; in a process of its own, into tmp_path/out."""

    def start(*changes, status=0, data=inputs[1], **settings):
        log = tmp_path / f"log-{len(list(tmp_path.glob('log-*')))}"
        flags = tiny.settings(inputs[0], data, tmp_path / "out", **settings)
        ended = tiny.end_program(tiny.start_program(flags, log, tiny.no_pictures, *changes))
        assert ended == status, log.read_text()
        return log.read_text()

    return start


def same_result(folder: Path, expected: Path) -> None:
    """Adapter and metrics are those of the undisturbed run, to the bit."""
    assert tiny.losses(folder) == tiny.losses(expected)
    for name in KEPT[:3]:
        assert tiny.hash_file(folder / name) == tiny.hash_file(expected / name), name


def test_tensorboard_has_what_metrics_jsonl_has(run, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(report_to=["tensorboard"], max_steps=4)
    events = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir()))).Reload()
    for name in (
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "rewards/chosen",
        "rewards/rejected",
    ):
        expected = {
            row["step"]: row[name] for row in tiny.read_metrics(tmp_path / "out") if name in row
        }
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx(expected, rel=1e-5) and len(found) == 4
        assert len(events.Scalars(f"eval/{name}")) == 1


def break_off(program, step):
    def interrupted(*args):
        raise KeyboardInterrupt

    setattr(program, step, interrupted)


@pytest.mark.parametrize("step", ["load_start", "build_trainer", "train_policy"])
def test_ctrl_c_before_training_is_no_traceback_and_binds_nobody(step, run, tmp_path):
    printed = run(functools.partial(break_off, step=step), status=130)
    assert "interrupted; the same command goes on" in printed and "Traceback" not in printed
    run(max_steps=2, beta=0.2)
    assert list(tiny.losses(tmp_path / "out")) == [1, 2]


def test_a_refused_start_leaves_an_empty_folder_as_it_was(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "pairs.jsonl").write_text('{"text": "no pair"}\n')
    assert "pairs.jsonl" in run(status=2, data=tmp_path / "pairs.jsonl")
    assert not list((tmp_path / "out").iterdir())


def test_a_start_that_was_killed_while_it_wrote_its_settings_is_no_stranger(
    run, finished, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.yaml.tmp").write_text("beta: 0.")
    run()
    same_result(tmp_path / "out", finished[0])


# ------------------------------------------------------------------------------------- changes of the program, by name
def at_step(program, step, do):
    """Call do(trainer) once, at the beginning of a training step."""
    training_step, done = program.PreferenceTrainer.training_step, []

    def changed(self, *args, **kwargs):
        if self.state.global_step + 1 == step and not done:
            done.append(do(self))
        return training_step(self, *args, **kwargs)

    program.PreferenceTrainer.training_step = changed


def send(program, at, signals):
    at_step(program, at, lambda trainer: [os.kill(os.getpid(), number) for number in signals])


def send_in_evaluation(program, at, number):
    evaluate = program.PreferenceTrainer.evaluate

    def changed(self, *args, **kwargs):
        if self.state.global_step == at:
            os.kill(os.getpid(), number)
        return evaluate(self, *args, **kwargs)

    program.PreferenceTrainer.evaluate = changed


def wait_for(program, at, path):
    """Stand still at a step, after leaving a mark, until a file appears."""

    def wait(trainer):
        Path(f"{path}.reached").touch()
        tiny.wait_until(path.exists)

    at_step(program, at, wait)


def poison(program, at, value):
    """A weight that is not finite."""

    def spoil(trainer):
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
        weight.data[0, 0] = value

    at_step(program, at, spoil)


def limit_files(program, at, size):
    """No file grows beyond size, or beyond that of the file named."""

    def limit(trainer):
        most = size.stat().st_size if isinstance(size, Path) else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    at_step(program, at, limit)


def die_at_rename(program, name):
    """kill -9 in the moment before a file gets its name."""
    replace = os.replace

    def changed(source, target, **options):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target, **options)

    os.replace = changed


def die_in_torch_save(program, name, step):
    """kill -9 with half of a file of a checkpoint written."""
    save = torch.save

    def changed(value, file, *args, **options):
        save(value, file, *args, **options)
        if str(file).endswith(f"checkpoint-{step}/{name}"):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = changed


# ------------------------------------------------------------------------------------------------ what a run leaves
def test_a_run_leaves_what_the_design_says(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    expected = "tokenizer.json tokenizer_config.json README.md rewards.png samples.md checkpoint-8 checkpoint-12"
    assert names >= {*KEPT, *expected.split()}
    assert not [
        name for name in names if "tmp" in name or "incomplete" in name or name == "checkpoint-4"
    ]
    assert (folder / "rewards.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.md").read_text().count("## ") == 2


def test_the_first_step_is_ln_2(finished):
    first = tiny.read_metrics(finished[0])[0]
    assert first["step"] == 1 and abs(first["loss"] - math.log(2)) < 1e-6
    assert all(
        first[f"rewards/{name}"] == 0 for name in ("margins", "chosen", "rejected", "accuracies")
    )


def test_every_step_is_logged_once_and_evaluated_as_asked(finished):
    folder, _ = finished
    assert list(tiny.losses(folder)) == list(range(1, 13))
    assert [row["step"] for row in tiny.evaluations(folder)] == [4, 8, 12]
    for row in tiny.read_metrics(folder):
        assert all(math.isfinite(value) for value in row.values())
        assert not [name for name in row if "runtime" in name or "per_second" in name], (
            "differs from run to run"
        )


def test_the_log_shows_the_metrics(finished):
    folder, log = finished
    rows = [
        line.split()
        for line in log.splitlines()
        if re.match(r" +\d+ +\d\.\d{4} (?!.*held out)", line)
    ]
    losses = {step: round(loss, 4) for step, loss in tiny.losses(folder).items()}
    assert {int(row[0]): float(row[1]) for row in rows} == losses
    assert "Traceback" not in log


def test_no_token_is_written(finished):
    folder, log = finished
    assert TOKEN not in log
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_adapter_moved_and_the_base_did_not(inputs, run, tmp_path, finished):
    weights = load_file(finished[0] / "adapter_model.safetensors")
    moved = [
        name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 1e-4
    ]
    assert len(moved) == len(weights) / 2 == 14  # 7 linear layers in each of 2 blocks
    base = tiny.tree(inputs[0])
    printed = run(watch_base, max_steps=3)
    assert "base unchanged: True" in printed and tiny.tree(inputs[0]) == base


def watch_base(program):
    """Print whether the frozen weights in memory are the same bits after training as before."""
    train = program.PreferenceTrainer.train

    def frozen(model):
        return {
            name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad
        }

    def changed(self, *args, **kwargs):
        before = frozen(self.model)
        result = train(self, *args, **kwargs)
        after = frozen(self.model)
        same = before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
        print(f"base unchanged: {bool(before) and same}")
        return result

    program.PreferenceTrainer.train = changed


def compare_evaluation(model, output, data):
    """The last evaluation in metrics.jsonl against the saved adapter, evaluated by the paper's formulas in float64."""
    pairs = tiny.read_pairs(data / "test.jsonl")
    expected, got = tiny.evaluate_adapter(model, output, pairs), tiny.evaluations(output)[-1]
    assert 0 < expected["eval_rewards/accuracies"] < 1, "says nothing"
    assert got["eval_rewards/accuracies"] == expected.pop("eval_rewards/accuracies")
    for name, value in expected.items():
        assert abs(got[name] - value) < 1e-4, (name, got[name], value)


def test_the_evaluation_is_that_of_the_saved_adapter(inputs, finished):
    compare_evaluation(inputs[0], finished[0], inputs[1])


@pytest.mark.parametrize("size", [2, 5])
def test_the_evaluation_is_exact_for_any_batch(size, inputs, run, tmp_path):
    run(per_device_eval_batch_size=size, max_steps=3, learning_rate=0.01)
    compare_evaluation(inputs[0], tmp_path / "out", inputs[1])


def test_the_adapter_loads_as_its_readers_load_it(inputs, finished):
    model = AutoPeftModelForCausalLM.from_pretrained(finished[0], dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    with torch.no_grad():
        logps = tiny.answer_logps(model, tokenizer, tiny.read_pairs(inputs[1] / "test.jsonl")).mean(
            0
        )
    last = tiny.evaluations(finished[0])[-1]
    assert (
        abs(logps[0] - last["eval_logps/chosen"]) < 1e-4
        and abs(logps[1] - last["eval_logps/rejected"]) < 1e-4
    )


def test_settings_yaml_repeats_the_run(finished, tmp_path):
    process = tiny.start_program(
        ["--config", finished[0] / "settings.yaml", "--output_dir", tmp_path / "out"],
        tmp_path / "log",
        tiny.no_pictures,
    )
    assert tiny.end_program(process) == 0
    same_result(tmp_path / "out", finished[0])
    assert re.match(r"# made with torch 2.*trl 1", (tmp_path / "out" / "settings.yaml").read_text())


# ------------------------------------------------------------------------------------- the same folder once more
def test_a_finished_run_says_so_and_does_nothing(inputs, finished, capsys):
    before = tiny.tree(finished[0])
    assert dpotrainer.run(tiny.settings(*inputs, finished[0], sample_prompts=2)) == 0
    assert "nothing to train" in capsys.readouterr().out and tiny.tree(finished[0]) == before


def test_other_settings_are_refused_with_the_differences(inputs, finished, capsys):
    before = tiny.tree(finished[0])
    assert (
        dpotrainer.run(
            tiny.settings(*inputs, finished[0], beta=0.2, lora_r=8, per_device_train_batch_size=2)
        )
        == 2
    )
    message = capsys.readouterr().err
    for line in (
        "another run",
        "beta: 0.1 there, 0.2 here",
        "lora_r: 4 there, 8 here",
    ):
        assert line in message
    assert "per_device_train_batch_size" not in message, "changes no result"
    assert (
        "choose another" in message
        and "--overwrite true" in message
        and tiny.tree(finished[0]) == before
    )


def without_lock(folder):
    return {name: digest for name, digest in tiny.tree(folder).items() if name != ".lock"}


def test_what_says_that_a_run_is_there_and_finished_is_moved_last(tmp_path, monkeypatch):
    """So an interrupted move leaves the run that it was."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("settings.yaml", "README.md", "metrics.jsonl", "adapter_config.json", "a.txt"):
        (folder / name).touch()
    moved = []
    monkeypatch.setattr(dpotrainer.shutil, "move", lambda path, aside: moved.append(path.name))
    dpotrainer.move_aside(folder)
    assert len(moved) == 5 and moved[3:] == ["README.md", "settings.yaml"]


def test_overwrite_moves_the_old_run_aside(run, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    run(max_steps=2, beta=0.2, overwrite=True)
    (first,) = tmp_path.glob("out-old-*")
    assert without_lock(first) == without_lock(stopped) and list(tiny.losses(tmp_path / "out")) == [
        1,
        2,
    ]
    time.sleep(1)  # the names tell the second
    run(max_steps=1, overwrite=True)
    (second,) = {*tmp_path.glob("out-old-*")} - {first}
    assert list(tiny.losses(second)) == [1, 2] and without_lock(first) == without_lock(stopped)


def test_files_of_somebody_else_are_left_alone(inputs, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite", "true"]):
        assert dpotrainer.run([*tiny.settings(*inputs, folder), *more]) == 2
        message = capsys.readouterr().err
        assert "no run of this program, such as thesis.tex: choose another" in message
        assert "--overwrite" not in message
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_a_run_that_cannot_be_moved_is_told(inputs, finished, monkeypatch, capsys):
    def refuse(source, target):
        raise OSError("no room there")

    monkeypatch.setattr(dpotrainer.shutil, "move", refuse)
    before = tiny.tree(finished[0])
    assert dpotrainer.run(tiny.settings(*inputs, finished[0], overwrite=True)) == 2
    assert "cannot be moved to" in capsys.readouterr().err
    assert tiny.tree(finished[0]) == before
    (aside,) = finished[0].parent.glob("out-old-*")
    aside.rmdir()


def test_settings_that_the_model_refuses_leave_nothing_behind(run, tmp_path):
    printed = run(status=2, lora_target_modules="no_such_layer")
    assert (
        "no_such_layer" in printed
        and "Traceback" not in printed
        and not (tmp_path / "out").exists()
    )


def test_a_run_whose_settings_were_lost_is_left_alone(run, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    os.truncate(tmp_path / "out" / "settings.yaml", 0)
    before = tiny.tree(tmp_path / "out")
    printed = run(status=2)
    assert (
        "--overwrite true" in printed
        and "Traceback" not in printed
        and tiny.tree(tmp_path / "out") == before
    )


def test_two_runs_at_once_in_one_folder_are_refused(inputs, finished, tmp_path, capsys):
    flags, release = tiny.settings(*inputs, tmp_path / "out"), tmp_path / "release"
    first = tiny.start_program(
        flags, tmp_path / "log", tiny.no_pictures, functools.partial(wait_for, at=3, path=release)
    )
    tiny.wait_until(Path(f"{release}.reached").exists, process=first)
    for more in ([], ["--overwrite", "true"], ["--beta", "0.2"]):
        assert dpotrainer.run([*flags, *more]) == 2
        assert "another run" in capsys.readouterr().err
    release.touch()
    assert tiny.end_program(first) == 0 and not list(tmp_path.glob("out-old*"))
    same_result(tmp_path / "out", finished[0])


# --------------------------------------------------------------------------------------------------- interruptions
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("at", [6, 12])
@pytest.mark.parametrize(
    "signals, status", [([TERM], 143), ([INT], 130), ([TERM, INT, TERM], 143)], ids=str
)
def test_a_signal_saves_and_the_same_command_continues(
    signals, status, at, run, finished, tmp_path
):
    """In the middle or at the last step; with echoes: schedulers signal all processes, and launchers pass it on."""
    printed = run(functools.partial(send, at=at, signals=signals), status=status)
    assert "same command" in printed and "Traceback" not in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert f"checkpoint-{at}" in names and not names & {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert f"checkpoint-{at}" in run()
    same_result(tmp_path / "out", finished[0])


def tell_saves(program):
    save = program.PreferenceTrainer._save_checkpoint
    program.PreferenceTrainer._save_checkpoint = lambda self, *args: (
        print("SAVES", flush=True) or save(self, *args)
    )


@pytest.mark.parametrize("at", [4, 12])
def test_a_signal_in_an_evaluation_is_heard_at_its_step(at, run, finished, tmp_path):
    printed = run(
        functools.partial(send_in_evaluation, at=at, number=signal.SIGTERM), tell_saves, status=143
    )
    assert printed.count("SAVES") == at // 4, "the last one is not made twice"
    assert (
        f"saved at step {at}" in printed and not (tmp_path / "out" / "adapter_config.json").exists()
    )
    assert not (tmp_path / "out" / f"checkpoint-{at + 1}").exists()
    run()
    same_result(tmp_path / "out", finished[0])


def send_when_trained(program, number):
    train = program.train_policy

    def trained(*args):
        report = train(*args)
        os.kill(os.getpid(), number)
        return report

    program.train_policy = trained


@pytest.mark.parametrize("number, status", [(TERM, -TERM), (INT, 130)], ids=str)
def test_a_signal_when_training_is_over_stops_and_the_same_command_finishes(
    number, status, run, finished, tmp_path
):
    printed = run(functools.partial(send_when_trained, number=number), status=status)
    assert "Traceback" not in printed and not (tmp_path / "out" / "adapter_config.json").exists()
    assert "checkpoint-12" in run()
    same_result(tmp_path / "out", finished[0])


def interrupt_while_workers_read(program):
    """Ctrl-C reaches all processes of a terminal: those that prepare the pairs, and their parent."""
    parent = os.getpid()
    prepare = program.PairPreparer.__call__

    def interrupted(self, *args):
        if os.getpid() != parent:
            time.sleep(1)  # until the parent waits for them
            os.kill(parent, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2)
        return prepare(self, *args)

    program.PairPreparer.__call__ = interrupted


def test_an_interruption_while_workers_tokenize_ends_without_a_traceback(run, tmp_path):
    # a max_length of its own: what was prepared before would be taken from the cache
    printed = run(interrupt_while_workers_read, status=130, dataset_num_proc=2, max_length=93)
    assert "interrupted; the same command goes on" in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_resuming_is_exact_with_dropout_accumulation_and_epochs(run, tmp_path):
    """Interrupted twice, before and in the second epoch; the interruption's checkpoint has a log line of its own."""
    settings = {
        "lora_dropout": 0.3,
        "disable_dropout": False,
        "logging_steps": 5,
        "eval_steps": 7,
        "save_steps": 100,
    }
    settings |= {"num_train_epochs": 2, "global_batch_size": 8, "per_device_train_batch_size": 2}
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    run(functools.partial(send, at=4, signals=[signal.SIGTERM]), status=143, **settings)
    run(functools.partial(send, at=9, signals=[signal.SIGINT]), status=130, **settings)
    run(**settings)
    assert list(tiny.losses(whole)) == [1, 5, 10, 12]
    assert list(tiny.losses(tmp_path / "out")) == [1, 4, 5, 9, 10, 12]
    assert tiny.evaluations(tmp_path / "out") == tiny.evaluations(whole)
    for name in KEPT[:2]:
        assert tiny.hash_file(tmp_path / "out" / name) == tiny.hash_file(whole / name), name
    # steps 2 to 5 in one line, and in two
    ours, theirs = tiny.losses(tmp_path / "out"), tiny.losses(whole)
    assert abs((3 * ours[4] + ours[5]) / 4 - theirs[5]) < 1e-6


@pytest.mark.parametrize("end", [{"max_steps": 6}, {"num_train_epochs": 0.5}], ids=str)
def test_a_run_that_ends_within_an_epoch_trains_no_step_more_when_it_continues(end, run, tmp_path):
    settings = {"lr_scheduler_type": "constant", **end}
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    run(functools.partial(send, at=6, signals=[signal.SIGTERM]), status=143, **settings)
    run(**settings)
    same_result(tmp_path / "out", whole)
    assert "6 steps of" in (whole / "README.md").read_text() and not list(
        (tmp_path / "out").glob("checkpoint-7")
    )


def test_a_log_by_epochs_has_the_rewards_and_survives_an_interruption(run, tmp_path):
    settings = {f"{kind}_strategy": "epoch" for kind in ("logging", "eval", "save")} | {
        "num_train_epochs": 2
    }
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    rows = [row for row in tiny.read_metrics(whole) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 12, 24] and all(
        "rewards/margins" in row for row in rows
    )
    run(functools.partial(send, at=3, signals=[signal.SIGTERM]), status=143, **settings)
    run(**settings)
    assert list(tiny.losses(tmp_path / "out")) == [1, 3, 12, 24]
    assert tiny.evaluations(tmp_path / "out") == tiny.evaluations(whole)


def test_a_delayed_evaluation_by_epochs_counts_epochs(run, tmp_path):
    run(num_train_epochs=3, eval_strategy="epoch", eval_delay=2)
    assert [row["step"] for row in tiny.evaluations(tmp_path / "out")] == [24, 36]


def test_a_seed_of_the_order_may_be_0_and_a_resume_is_no_start(run, tmp_path):
    settings = {"max_steps": 6, "data_seed": 0, "eval_on_start": True}
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    run(functools.partial(send, at=2, signals=[signal.SIGTERM]), status=143, **settings)
    run(**settings)
    same_result(tmp_path / "out", whole)
    assert [row["step"] for row in tiny.evaluations(whole)] == [0, 4, 6]
    (tmp_path / "out").rename(tmp_path / "again")
    run(max_steps=6)
    assert tiny.losses(tmp_path / "out") != tiny.losses(whole), "seed 42's order"


def test_a_dry_run_refuses_the_folder_of_another_run(inputs, finished, capsys):
    before = tiny.tree(finished[0])
    assert dpotrainer.run(tiny.settings(*inputs, finished[0], beta=0.2, dry_run=True)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert dpotrainer.run(tiny.settings(*inputs, finished[0], dry_run=True)) == 0
    assert tiny.tree(finished[0]) == before


def test_the_settings_of_a_run_are_no_other_settings(finished, capsys):
    assert dpotrainer.run(["--config", str(finished[0] / "settings.yaml")]) == 0
    assert "nothing to train" in capsys.readouterr().out


def send_twice(program, at, number, seconds):
    def twice(trainer):
        os.kill(os.getpid(), number)
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    at_step(program, at, twice)


@pytest.mark.parametrize("at", [3, 12, 24])
@pytest.mark.parametrize("save_strategy", ["epoch", "steps"])
def test_an_interruption_by_epochs_adds_and_loses_no_evaluation(at, save_strategy, run, tmp_path):
    """In the middle of an epoch, at its end, and at the end of all."""
    settings = {"eval_strategy": "epoch", "save_strategy": save_strategy, "num_train_epochs": 2}
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    run(functools.partial(send, at=at, signals=[signal.SIGTERM]), status=143, **settings)
    assert len(tiny.evaluations(tmp_path / "out")) == at // 12
    assert (tmp_path / "out" / f"checkpoint-{at}").exists()
    run(**settings)
    same_result(tmp_path / "out", whole)
    assert [row["step"] for row in tiny.evaluations(whole)] == [12, 24]


def test_a_second_signal_stops_at_once(run, finished, tmp_path):
    run(functools.partial(send_twice, at=6, number=signal.SIGTERM, seconds=1.2), status=143)
    assert (
        not (tmp_path / "out" / "checkpoint-6").exists()
        and not (tmp_path / "out" / "adapter_config.json").exists()
    )
    run()
    same_result(tmp_path / "out", finished[0])


def test_a_process_of_its_own_ends_with_the_status_of_the_signal(inputs, tmp_path):
    """As a scheduler sees it: a fresh interpreter, SIGTERM from outside at whatever step."""
    flags = tiny.settings(*inputs, tmp_path / "out", eval_steps=100)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, tiny.PROGRAM, *map(str, flags)],
            stdout=log,
            stderr=log,
            env=tiny.environment(),
        )
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, (tmp_path / "log").read_text()
    assert not (tmp_path / "out" / "adapter_config.json").exists() and list(
        (tmp_path / "out").glob("checkpoint-*")
    )


def test_another_save_steps_is_heard_when_a_run_continues(run, stopped, finished, tmp_path):
    """The checkpoint holds the one of the run that wrote it, 4."""
    shutil.copytree(stopped, tmp_path / "out")
    run(save_steps=5, save_total_limit=9)
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-6", "checkpoint-10", "checkpoint-12"}
    assert tiny.losses(tmp_path / "out") == tiny.losses(finished[0])


def test_another_batch_per_device_may_continue(run, stopped, finished, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    run(per_device_train_batch_size=2, save_steps=5, sample_prompts=1)
    expected = tiny.losses(finished[0])
    assert all(
        abs(loss - expected[step]) < 1e-5 for step, loss in tiny.losses(tmp_path / "out").items()
    )


def test_data_that_changed_is_refused(inputs, run, tmp_path):
    data = shutil.copytree(inputs[1], tmp_path / "pairs")
    run(functools.partial(send, at=2, signals=[signal.SIGTERM]), status=143, data=data)
    before = {
        name: text
        for name, text in tiny.tree(tmp_path / "out").items()
        if name.startswith("checkpoint")
    }
    good = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(good.replace("Good question", "Bad question", 1))
    assert "pairs" in run(status=2, data=data)
    (data / "train.jsonl").write_text("".join(reversed(good.splitlines(keepends=True))))
    assert "pairs" in run(status=2, data=data)
    assert {
        name: text
        for name, text in tiny.tree(tmp_path / "out").items()
        if name.startswith("checkpoint")
    } == before
    (data / "train.jsonl").write_text(good)
    run(data=data, max_steps=-1)
    assert list(tiny.losses(tmp_path / "out")) == list(range(1, 13))


def test_overwrite_continues_an_unfinished_run(run, stopped, finished, tmp_path):
    """A requeued job repeats its command, flags and all."""
    shutil.copytree(stopped, tmp_path / "out")
    assert "checkpoint-6" in run(overwrite=True)
    same_result(tmp_path / "out", finished[0])
    assert not list(tmp_path.glob("out-old-*"))


class FakeHub:
    """A hub that answers, and takes everything."""

    def whoami(self):
        return {"name": "me"}


def test_a_run_of_a_gpu_is_the_same_run_on_a_machine_without_one(inputs, tmp_path, monkeypatch):
    """What libraries derive from the machine, and how the run is computed or uploaded, may differ."""
    flags = tiny.settings(*inputs, tmp_path / "out")
    dpotrainer.main([*flags, "--max_steps", "1"])
    settings = tmp_path / "out" / "settings.yaml"
    there = yaml.safe_load(settings.read_text())
    there |= {"use_cpu": False, "dataloader_pin_memory": True, "tf32": True}
    settings.write_text(yaml.safe_dump(there))

    def differences(*more):
        job = dpotrainer.read_settings([*flags, "--max_steps", "1", *more])
        start = dpotrainer.load_start(job)
        return dpotrainer.find_differences(job, dpotrainer.load_preferences(job, start.tokenizer))

    assert differences() == []
    assert differences("--torch_compile", "true") == []
    monkeypatch.setattr(dpotrainer.huggingface_hub, "HfApi", FakeHub)
    upload = ["--push_to_hub", "true", "--hub_private_repo", "true", "--hub_strategy", "end"]
    assert differences(*upload) == []
    assert differences("--beta", "0.2") == ["beta: 0.1 there, 0.2 here"]
    assert differences("--eval_steps", "3") == []

    compared = {"early_stopping_patience": 2, "load_best_model_at_end": True}
    compared |= {"metric_for_best_model": "loss", "greater_is_better": False}
    settings.write_text(yaml.safe_dump(there | compared))
    told = differences("--early_stopping_patience", "2", "--save_steps", "6", "--eval_steps", "3")
    assert told == ["eval_steps: 4 there, 3 here"]

    there["made_from"] = {"pairs": "another", "sharding": "fsdp"}  # as before held_out was kept
    settings.write_text(yaml.safe_dump(there))
    (tmp_path / "out" / "README.md").unlink()
    assert set(differences()) == {
        "the training pairs differ",
        "sharded by fsdp there, none here",
    }
    there["made_from"] = {"held_out": "others"}
    settings.write_text(yaml.safe_dump(there))
    assert differences() == ["the held-out pairs differ"]


def see_a_runaway_at_the_end(program):
    program.is_runaway = lambda trend: trend.lines >= 3


def test_a_run_that_destroys_the_model_at_its_last_step_does_not_count_as_finished(run, tmp_path):
    for _ in range(2):
        printed = run(see_a_runaway_at_the_end, status=1, max_steps=4)
        assert "stopped and saved at step 4 of 4" in printed and "Traceback" not in printed
        assert (tmp_path / "out" / "checkpoint-4").exists()
        assert not (tmp_path / "out" / "README.md").exists()
        assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_an_uploaded_card_names_its_repository(inputs, tmp_path, monkeypatch):
    dpotrainer.main(tiny.settings(*inputs, tmp_path / "out", max_steps=1))
    uploaded = {}

    class Hub(FakeHub):
        def create_repo(self, name, **options):
            uploaded.update(options, name=name)
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def create_branch(self, name, *, branch, exist_ok):
            uploaded["branch"] = (name, branch, exist_ok)

        def upload_folder(self, **options):
            assert uploaded["branch"] == ("me/mine", options["revision"], True)
            uploaded.update(options)

    monkeypatch.setattr(dpotrainer.huggingface_hub, "HfApi", Hub)
    more = {"push_to_hub": True, "hub_model_id": "mine", "hub_private_repo": True}
    more["hub_revision"] = "first"
    dpotrainer.main(tiny.settings(*inputs, tmp_path / "out", max_steps=1, **more))
    assert (uploaded["name"], uploaded["private"]) == ("mine", True)
    left_out = uploaded["ignore_patterns"]
    names = ["checkpoint-4/a", "merged/a", ".lock", ".rehearsal-x/run/a", "README.md"]
    assert list(huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=left_out)) == [
        "README.md"
    ]
    assert "\nname = 'me/mine'\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_that_refuses_costs_nothing_of_the_run(inputs, tmp_path, monkeypatch, capsys):
    class Hub(FakeHub):
        def create_repo(self, name, **options):
            raise ConnectionError("the line is dead")

    monkeypatch.setattr(dpotrainer.huggingface_hub, "HfApi", Hub)
    flags = tiny.settings(*inputs, tmp_path / "out", max_steps=1, push_to_hub=True)
    assert dpotrainer.run(flags) == 1
    message = capsys.readouterr().err
    assert "push_to_hub=true, out: the line is dead; the run is finished" in message
    assert (tmp_path / "out" / "README.md").exists()


def test_a_link_stays_a_link(run, tmp_path):
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "runs")
    run(max_steps=2)
    run(max_steps=1, overwrite=True)
    assert (tmp_path / "out").is_symlink() and list(tiny.losses(tmp_path / "disk" / "runs")) == [1]
    (aside,) = (tmp_path / "disk").glob("runs-old-*")
    assert list(tiny.losses(aside)) == [1, 2]


def test_eval_and_logging_steps_may_change_when_a_run_continues(run, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    run(eval_steps=3, logging_steps=2)
    assert [row["step"] for row in tiny.evaluations(tmp_path / "out")] == [4, 9, 12]
    assert list(tiny.losses(tmp_path / "out")) == [1, 2, 3, 4, 5, 6, 8, 10, 12]


def test_without_checkpoints_the_adapter_is_saved_all_the_same(run, finished, tmp_path):
    run(save_strategy="no")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    same_result(tmp_path / "out", finished[0])


def refuse_to_generate(program, error):
    def refuse(*args):
        raise error

    program.show_samples = refuse


def test_what_fails_after_training_does_not_cost_the_adapter(run, finished, tmp_path):
    printed = run(functools.partial(refuse_to_generate, error=RuntimeError("a bug")), status=1)
    assert "Traceback" in printed and "a bug" in printed
    same_result(tmp_path / "out", finished[0])
    before = tiny.hash_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "is trained already" in run()
    assert tiny.hash_file(tmp_path / "out" / "adapter_model.safetensors") == before
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("metric", ["loss", "rewards/margins"])
def test_the_best_adapter_is_kept(metric, run, inputs, tmp_path):
    """The saved adapter is the checkpoint's with the best held-out figure, and so are its figures."""
    settings = {
        "learning_rate": 0.05,
        "save_steps": 2,
        "eval_steps": 2,
        "max_steps": 8,
        "save_total_limit": 9,
    }
    run(load_best_model_at_end=True, metric_for_best_model=metric, **settings)
    evaluations = tiny.evaluations(tmp_path / "out")
    choose = min if metric == "loss" else max
    best = choose(evaluations, key=lambda row: row[f"eval_{metric}"])
    kept_step = best["step"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"the adapter is that of step {kept_step}, the best by held-out {metric}" in card
    shown = [int(line.split()[0]) for line in card.splitlines() if "  held out, " in line]
    assert shown == sorted({2, kept_step, 8})
    expected = load_file(tmp_path / "out" / f"checkpoint-{kept_step}" / "adapter_model.safetensors")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_early_stopping_stops_counts_on_after_a_resume_and_keeps_the_best(run, tmp_path):
    settings = {
        "learning_rate": 0.2,
        "save_steps": 1,
        "eval_steps": 1,
        "save_total_limit": 99,
        "lr_scheduler_type": "constant",
    }
    settings |= {"early_stopping_patience": 2, "metric_for_best_model": "loss"}
    run(load_best_model_at_end=True, **settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    steps = [row["step"] for row in tiny.evaluations(whole)]
    best = min(tiny.evaluations(whole), key=lambda row: row["eval_loss"])["step"]
    assert steps[-1] == best + 2 < 12
    told = f"the adapter is that of step {best}, the best by held-out loss"
    assert told in (whole / "README.md").read_text()
    settings["load_best_model_at_end"] = True
    term = functools.partial(send, at=best + 1, signals=[signal.SIGTERM])
    run(term, status=143, output_dir=tmp_path / "elsewhere", **settings)
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    run(**settings)
    same_result(tmp_path / "out", whole)
    (tmp_path / "out").rename(tmp_path / "second")

    # after the stop and before the adapter is saved; then after that
    run(die_before_saving, status=-9, output_dir=tmp_path / "elsewhere", **settings)
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    printed = run(die_before_samples, status=-9, **settings)
    assert f"taking up the adapter in {tmp_path / 'out' / f'checkpoint-{best}'}\n" in printed
    run(**settings)
    same_result(tmp_path / "out", whole)
    assert told in (tmp_path / "out" / "README.md").read_text()


def die_before_saving(program):
    program.save_adapter = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def die_before_samples(program):
    program.show_samples = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def refuse_to_save(program):
    def refuse(*args, **kwargs):
        raise AssertionError("a model that was not trained here is not saved")

    program.PreferenceTrainer.save_model = refuse


def test_a_trained_run_is_taken_up_by_copying_its_adapter(run, finished, tmp_path):
    run(die_before_saving, status=-9)
    die = functools.partial(die_at_rename, name="adapter_config.json")
    run(refuse_to_save, die, status=-9)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert "checkpoint-12" in run(refuse_to_save)
    same_result(tmp_path / "out", finished[0])
    assert not list((tmp_path / "out").glob("*.tmp"))


LEAPS = {"learning_rate": 0.2, "lr_scheduler_type": "constant", "metric_for_best_model": "loss"}


@pytest.mark.parametrize("save_strategy", ["no", "best"])
def test_a_trained_run_is_taken_up_at_its_last_step_whatever_the_checkpoints(
    save_strategy, run, tmp_path
):
    settings = LEAPS | {"save_strategy": save_strategy, "eval_steps": 2, "max_steps": 7}
    settings |= {"logging_steps": 5, "eval_delay": 2 if save_strategy == "best" else 99}
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    assert not (whole / "checkpoint-7").exists()
    run(die_before_samples, status=-9, **settings)
    run(refuse_to_save, **settings)
    same_result(tmp_path / "out", whole)
    assert "7 steps of" in (tmp_path / "out" / "README.md").read_text()


def test_a_signal_in_a_step_that_is_not_the_best_is_saved_all_the_same(run, tmp_path):
    """And the best one is found where the folder has been moved to, although none is saved since."""
    settings = LEAPS | {"save_strategy": "best", "eval_steps": 1, "logging_steps": 5}
    settings |= {"max_steps": 8, "load_best_model_at_end": True}
    run(**settings)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    assert list(tiny.losses(whole)) == list(range(1, 9)), "a line at each evaluation"
    best = min(tiny.evaluations(whole), key=lambda row: row["eval_loss"])["step"]
    at = best + 1
    assert at < 8
    term = functools.partial(send, at=at, signals=[signal.SIGTERM])
    printed = run(term, status=143, output_dir=tmp_path / "elsewhere", **settings)
    assert f"saved at step {at};" in printed
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    assert f"checkpoint-{at}" in run(**settings)
    same_result(tmp_path / "out", whole)


def test_a_best_checkpoint_that_is_gone_is_told_and_a_later_one_is_kept(run, tmp_path):
    settings = LEAPS | {"save_strategy": "best", "eval_steps": 1, "logging_steps": 5}
    settings |= {"max_steps": 8, "load_best_model_at_end": True}
    run(**settings)
    losses = {row["step"]: row["eval_loss"] for row in tiny.evaluations(tmp_path / "out")}
    (tmp_path / "out").rename(tmp_path / "whole")
    best = min(losses, key=losses.get)
    term = functools.partial(send, at=best + 1, signals=[signal.SIGTERM])
    run(term, status=143, **settings)
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{best}")
    printed = run(**settings)
    assert printed.count(f"! checkpoint-{best}, the best so far, is gone; a later one is kept") == 1
    later = {step: loss for step, loss in losses.items() if step > best + 1}
    kept = min(later, key=later.get)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"the adapter is that of step {kept}, the best by held-out loss" in card


def test_a_signal_in_the_last_evaluation_is_saved_without_checkpoints_too(run, finished, tmp_path):
    term = functools.partial(send_in_evaluation, at=12, number=signal.SIGTERM)
    printed = run(term, tell_saves, status=143, save_strategy="no")
    assert "saved at step 12;" in printed and printed.count("SAVES") == 1
    assert (tmp_path / "out" / "checkpoint-12" / "manifest.json").exists()
    assert "is trained already" in run(save_strategy="no")
    same_result(tmp_path / "out", finished[0])


def send_after_training(program, number):
    finalize = program.PreferenceTrainer._finalize_training

    def changed(self, *args):
        os.kill(os.getpid(), number)
        return finalize(self, *args)

    program.PreferenceTrainer._finalize_training = changed


def test_a_signal_too_late_for_a_checkpoint_waits_for_the_adapter(run, finished, tmp_path):
    term = functools.partial(send_after_training, number=signal.SIGTERM)
    run(term, save_strategy="no")
    same_result(tmp_path / "out", finished[0])
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("greater", [True, False])
def test_a_runaway_in_a_step_that_evaluates_is_saved(greater, run, tmp_path):
    """Whether that step is the best, or not."""
    settings = LEAPS | {"greater_is_better": greater, "save_strategy": "best", "eval_steps": 2}
    printed = run(see_a_runaway_at_the_end, status=1, **settings)
    assert "stopped and saved at step 4 of 12" in printed
    assert (tmp_path / "out" / "checkpoint-4" / "manifest.json").exists()


def run_with_workers(inputs, output, change, persistent):
    """The program in an interpreter and a group of processes of its own, changed by name."""
    flags = tiny.settings(*inputs, output, dataloader_num_workers=1)
    flags += ["--dataloader_persistent_workers", str(persistent)]
    code = (
        f"import sys; sys.path[:0] = {[str(tiny.ROOT), str(tiny.ROOT / 'tests')]}\n"
        "import dpotrainer, test_run\n"
        f"test_run.{change}(dpotrainer)\n"
        f"sys.exit(dpotrainer.run({list(map(str, flags))}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=tiny.environment(),
        timeout=90,
        start_new_session=True,
    )


def send_to_all():
    """From outside: torch lets a worker end without a word if its parent sends it SIGTERM."""
    code = f"import os; os.killpg({os.getpgrp()}, {int(signal.SIGTERM)})"
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)
    time.sleep(0.2)


def send_to_all_in_training(program):
    at_step(program, 3, lambda trainer: send_to_all())


def send_to_all_in_evaluation(program):
    prediction_step, sent = program.PreferenceTrainer.prediction_step, []

    def changed(self, *args, **kwargs):
        if not sent:
            sent.append(send_to_all())
        return prediction_step(self, *args, **kwargs)

    program.PreferenceTrainer.prediction_step = changed


def fail_in_training(program):
    def fail(trainer):
        raise ZeroDivisionError("a bug")

    at_step(program, 3, fail)


@pytest.mark.parametrize(
    "change, step, persistent", [("training", 3, False), ("evaluation", 4, True)]
)
def test_a_signal_to_all_processes_leaves_the_workers_to_finish_the_step(
    change, step, persistent, inputs, tmp_path
):
    """As a scheduler sends it; and the program ends although its workers ignore it."""
    ended = run_with_workers(inputs, tmp_path / "out", f"send_to_all_in_{change}", persistent)
    assert ended.returncode == 143 and f"saved at step {step};" in ended.stderr
    assert "Traceback" not in ended.stderr and "is killed by signal" not in ended.stderr


def test_workers_keep_no_program_that_failed(inputs, tmp_path):
    """The last frames, and so the workers, live until the end of the interpreter."""
    ended = run_with_workers(inputs, tmp_path / "out", "fail_in_training", persistent=True)
    assert ended.returncode == 1 and "ZeroDivisionError: a bug" in ended.stderr
    assert "is killed by signal" not in ended.stderr


def tell_trainers(program):
    """Print how many trainers are alive when merging reads its base."""
    load = program.load_causal_lm

    def told(*args, **options):
        if options.get("quantize") is False:
            alive = [thing for thing in gc.get_objects() if type(thing) is trainer_class]
            print(f"TRAINERS {len(alive)}", flush=True)
        return load(*args, **options)

    trainer_class = program.PreferenceTrainer
    program.load_causal_lm = told


def test_merging_has_the_memory_of_training(run):
    assert run(tell_trainers, merge=True, max_steps=2).count("TRAINERS 0") == 2


# ----------------------------------------------------------------------------------------------------------- faults
def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def zero(path):
    """The right length, but nothing in it, as after a loss of power."""
    size = path.stat().st_size
    path.write_bytes(bytes(size))


DAMAGE = [
    ("adapter_model.safetensors", cut),
    ("optimizer.pt", functools.partial(os.truncate, length=0)),
    ("optimizer.pt", zero),
    ("trainer_state.json", cut),
    ("rng_state.pth", os.remove),
    ("adapter_model.safetensors", zero),
]


@pytest.mark.parametrize("name, damage", DAMAGE, ids=lambda x: getattr(x, "__name__", str(x)[:24]))
def test_a_damaged_checkpoint_is_set_aside(name, damage, run, stopped, finished, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    damage(tmp_path / "out" / "checkpoint-6" / name)
    left = tiny.tree(tmp_path / "out" / "checkpoint-6")
    printed = run()
    assert (
        "incomplete-checkpoint-6" in printed
        and "checkpoint-4" in printed
        and "Traceback" not in printed
    )
    (aside,) = (tmp_path / "out").glob("incomplete-checkpoint-6-*")
    assert tiny.tree(aside) == left
    same_result(tmp_path / "out", finished[0])


def test_without_a_whole_checkpoint_the_run_starts_over(run, stopped, finished, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    for step in (4, 6):
        (tmp_path / "out" / f"checkpoint-{step}" / "scheduler.pt").unlink()
    run()
    same_result(tmp_path / "out", finished[0])
    assert len(list((tmp_path / "out").glob("incomplete-checkpoint-[46]-*"))) == 2


@pytest.mark.parametrize(
    "change",
    [
        functools.partial(die_in_torch_save, name="optimizer.pt", step=8),
        functools.partial(die_at_rename, name="manifest.json"),
        functools.partial(die_at_rename, name="adapter_model.safetensors"),
        functools.partial(die_at_rename, name="adapter_config.json"),
    ],
    ids=["optimizer", "manifest", "adapter", "last file"],
)
def test_a_kill_in_the_middle_of_saving_costs_nothing(change, run, finished, tmp_path):
    run(change, status=-signal.SIGKILL)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    run()
    same_result(tmp_path / "out", finished[0])
    assert not list((tmp_path / "out").glob("*.tmp"))


def kill_at_random(inputs, finished, folder, kills, seed):
    flags, rng, done = tiny.settings(*inputs, folder / "out"), random.Random(seed), 0
    for _ in range(20 * kills):
        process = tiny.start_program(flags, folder / "log", tiny.no_pictures)
        process.join(rng.uniform(0.2, 2.2))
        if process.is_alive():
            process.kill()
            done += 1
        status = tiny.end_program(process)
        assert status in (0, -signal.SIGKILL), (folder / "log").read_text()
        logged = (
            [row["step"] for row in tiny.read_metrics(folder / "out")[:-1]]
            if (folder / "out/metrics.jsonl").exists()
            else []
        )
        assert logged == sorted(logged)
        if done == kills:
            break
        if status == 0:  # all over too soon: once more from the start
            same_result(folder / "out", finished)
            shutil.rmtree(folder / "out")
    assert done == kills
    assert tiny.end_program(tiny.start_program(flags, folder / "log", tiny.no_pictures)) == 0, (
        folder / "log"
    ).read_text()
    same_result(folder / "out", finished)


def test_three_kills_at_random_moments(inputs, finished, tmp_path):
    kill_at_random(inputs, finished[0], tmp_path, 3, seed=time.time_ns())


@pytest.mark.slow
def test_twenty_kills_at_random_moments(inputs, finished, tmp_path):
    kill_at_random(inputs, finished[0], tmp_path, 20, seed=time.time_ns())


def test_a_full_disk_is_told_and_older_checkpoints_stay(run, finished, tmp_path):
    """A limit on the size of files, set before the second checkpoint, whose optimizer state no longer fits."""
    printed = run(functools.partial(limit_files, at=8, size=40_000), status=1)
    assert "could not be written" in printed and "room" in printed and "Traceback" not in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "checkpoint-4" in names and "adapter_config.json" not in names
    assert "checkpoint-4" in run()
    same_result(tmp_path / "out", finished[0])


def test_a_disk_too_full_for_the_log_is_told(run, finished, tmp_path):
    printed = run(
        functools.partial(limit_files, at=11, size=tmp_path / "out" / "metrics.jsonl"), status=1
    )
    assert (
        "room" in printed
        and "Traceback" not in printed
        and not (tmp_path / "out" / "adapter_config.json").exists()
    )
    run()
    same_result(tmp_path / "out", finished[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, run, tmp_path):
    printed = run(functools.partial(poison, at=6, value=value), status=1)
    assert "not finite at step 6" in printed and "Traceback" not in printed
    assert list(tiny.losses(tmp_path / "out")) == [1, 2, 3, 4, 5]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "checkpoint-4" in names and not names & {"adapter_config.json", "checkpoint-6"}
