"""Two CPU processes over gloo train what one process trains: DDP and FSDP2, by the files under configs/accelerate."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors import safe_open
from test_run import compare_evaluation, send
from torch.distributed.checkpoint import FileSystemReader

CONFIGS = tiny.ROOT / "configs" / "accelerate"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model, data): 32 pairs to train on, and 9 held out, which two processes cannot divide."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_pairs(folder / "pairs" / "train.jsonl", 32, seed=1)
    tiny.make_pairs(folder / "pairs" / "test.jsonl", 9, seed=2)
    return tiny.make_model(folder / "model"), folder / "pairs"


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory):
    """output_dir of one process: 8 steps of 4 pairs."""
    folder = tmp_path_factory.mktemp("one")
    process = tiny.start_program(
        tiny.settings(*inputs, folder / "out"), folder / "log", tiny.no_pictures
    )
    assert tiny.end_program(process) == 0, (folder / "log").read_text()
    return folder / "out"


def cpu_config(name, folder) -> Path:
    """A file of configs/accelerate for two processes on CPUs, all else as it is shipped."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    config |= {"use_cpu": True, "mixed_precision": "no", "num_processes": 2}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def launcher_variables(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment of each process."""
    args = launch_command_parser().parse_args(["--config_file", str(config), str(tiny.PROGRAM)])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    variables = (
        prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    )
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(("ACCELERATE_", "FSDP_"))
    }


def shard_on_cpu(program):
    """Let accelerate shard on CPUs, by torch or DeepSpeed: it asks for it on GPUs alone. Tells how much is sharded."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    first, train = AcceleratorState.__init__, program.PreferenceTrainer._save_checkpoint

    def init(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        first(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        kind = DistributedType.FSDP if fsdp_plugin else DistributedType.DEEPSPEED
        if (fsdp_plugin or deepspeed_plugin) and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = kind
            self.fsdp_plugin, self.deepspeed_plugins = fsdp_plugin, deepspeed_plugin
            if deepspeed_plugin:
                deepspeed_plugin.set_mixed_precision(self._mixed_precision)
                deepspeed_plugin.select(_from_accelerator_state=True)

    def is_half(weight):
        return type(weight).__name__ == "DTensor" or 2 * weight.ds_tensor.numel() == weight.ds_numel

    def save(self, *args):
        parts = [
            is_half(weight)
            for name, weight in self.model.named_parameters()
            if "base_layer" in name
        ]
        print(f"in decoder layers: {sum(parts)} of {len(parts)} sharded")
        return train(self, *args)

    AcceleratorState.__init__, program.PreferenceTrainer._save_checkpoint = init, save


@pytest.fixture
def run(inputs, tmp_path):
    """run(processes, *changes, status=0, changes_of={rank: change}, variables, settings) -> what each printed."""

    def start(processes, *changes, status=0, only=(), variables=None, model=inputs[0], **settings):
        settings = {
            "per_device_train_batch_size": 4 // processes,
            "per_device_eval_batch_size": 2,
        } | settings
        flags = tiny.settings(model, inputs[1], tmp_path / "out", **settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, logs, started = free.getsockname()[1], [], []
        for rank in range(processes):
            logs.append(tmp_path / f"log-{time.monotonic_ns()}-{rank}")
            its = (
                {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                if processes > 1
                else {}
            )
            mine = [change for of, change in only if of == rank]
            started.append(
                tiny.start_program(
                    flags, logs[-1], tiny.no_pictures, *changes, *mine, **its | (variables or {})
                )
            )
        ended = [tiny.end_program(process) for process in started]
        printed = [log.read_text() for log in logs]
        assert ended == [status] * processes, "\n".join(printed)
        return printed

    return start


def same_trajectory(folder: Path, expected: Path, tolerance: float = 1e-5) -> None:
    a, b = tiny.losses(folder), tiny.losses(expected)
    assert list(a) == list(b) and max(abs(a[step] - b[step]) for step in a) < tolerance, (a, b)
    for got, want in zip(tiny.evaluations(folder), tiny.evaluations(expected), strict=True):
        assert (
            got["step"] == want["step"]
            and got["eval_rewards/accuracies"] == want["eval_rewards/accuracies"]
        )
        for name, value in want.items():
            assert (
                abs(got[name] - value) < 1e-3
                if "logps" in name
                else abs(got[name] - value) < tolerance
            ), name


def tensor_names(checkpoint: Path) -> set[str]:
    """The names of all tensors in the model's files of a checkpoint, in whatever form."""
    names = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    for path in checkpoint.glob("pytorch_model*.bin"):
        names |= set(torch.load(path, weights_only=True))
    for path in checkpoint.glob("pytorch_model*/"):
        names |= set(FileSystemReader(path).read_metadata().state_dict_metadata)
    return names


# ----------------------------------------------------------------------------------------------------------------- DDP
def processes_of(folder: Path) -> list[int]:
    """Processes that have the folder's name in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def launch(config: Path, flags: list[str], log: Path) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        tiny.PROGRAM,
        *flags,
    ]
    with open(log, "w") as file:
        return subprocess.Popen(
            [str(word) for word in words], stdout=file, stderr=file, env=tiny.environment()
        )


def test_accelerate_launch_equals_one_process_and_survives_sigterm(inputs, one, tmp_path):
    """The launcher gets SIGTERM, all processes stop, and the same command then ends as one process does."""
    config, output = cpu_config("ddp", tmp_path), tmp_path / "out"
    flags = tiny.settings(
        *inputs, output, per_device_train_batch_size=2, per_device_eval_batch_size=2
    )
    first = launch(config, flags, tmp_path / "first")
    end = time.monotonic() + 120
    while (
        first.poll() is None and time.monotonic() < end and not (output / "metrics.jsonl").exists()
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) != 0
    tiny.wait_until(lambda: not processes_of(tmp_path), 20)
    assert not (output / "adapter_config.json").exists() and list(output.glob("checkpoint-*")), (
        tmp_path / "first"
    ).read_text()
    second = launch(config, flags, tmp_path / "second")
    assert second.wait(120) == 0, (tmp_path / "second").read_text()
    same_trajectory(output, one)
    compare_evaluation(inputs[0], output, inputs[1])
    printed = (tmp_path / "second").read_text()
    assert (
        printed.count("continuing from") == 1
        and "2 (per device) x 1 (accumulation) x 2 (processes)" in printed
    )


def test_only_the_main_process_prints(run, one, tmp_path):
    main, other = run(2, sample_prompts=2)
    libraries = (
        "Loading weights",
        "real_accelerator.py",
    )  # transformers, and DeepSpeed where it is installed
    assert not [
        line for line in other.splitlines() if line.strip() and not any(map(line.count, libraries))
    ], other
    rows = re.findall(r"^ +\d+ +\d\.\d{4} ", main, flags=re.MULTILINE)
    assert len(rows) == 8 + 2 + 2, "training, held out, summary"
    assert len(re.findall(r"^policy +/", main, flags=re.MULTILINE)) == 1
    same_trajectory(tmp_path / "out", one)
    assert (tmp_path / "out" / "samples.md").read_text().count("## ") == 2


def test_a_run_moves_between_two_processes_and_one(run, one, tmp_path, inputs):
    """Only the second process hears the first signal; both stop at the same step."""
    run(2, status=143, only=[(1, functools.partial(send, at=3, signals=[signal.SIGTERM]))])
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3"}
    run(1, functools.partial(send, at=6, signals=[signal.SIGINT]), status=130)
    assert "checkpoint-6" in run(2)[0]
    same_trajectory(tmp_path / "out", one)
    compare_evaluation(inputs[0], tmp_path / "out", inputs[1])


def test_two_processes_resume_in_the_second_epoch(run, tmp_path):
    """Each epoch has an order of its own, which a resumed run has to find again."""
    run(2, num_train_epochs=2)
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    run(
        2,
        status=143,
        num_train_epochs=2,
        only=[(0, functools.partial(send, at=11, signals=[signal.SIGTERM]))],
    )
    run(2, num_train_epochs=2)
    assert tiny.losses(tmp_path / "out") == tiny.losses(whole) and len(tiny.losses(whole)) == 16


def test_an_epoch_that_its_steps_do_not_divide(run, tmp_path):
    """33 pairs, and 9 held out, in steps of 12: what fills up the third is the same on one process and on two."""
    tiny.make_pairs(tmp_path / "pairs" / "train.jsonl", 33, seed=1)
    tiny.make_pairs(tmp_path / "pairs" / "test.jsonl", 9, seed=2)
    settings = {"dataset_name": tmp_path / "pairs", "global_batch_size": 12, "num_train_epochs": 2}
    run(1, **settings)
    alone = (tmp_path / "out").rename(tmp_path / "alone")
    run(2, **settings)
    same_trajectory(tmp_path / "out", alone)
    assert list(tiny.losses(alone)) == [1, 2, 3, 4, 5, 6]


def test_accumulation_over_two_processes(run, one, tmp_path):
    run(2, per_device_train_batch_size=1, per_device_eval_batch_size=3)
    same_trajectory(tmp_path / "out", one)


def tell_sizes(program):
    """Prints the pairs' needed tokens of each forward pass of the training."""
    training_step = program.PreferenceTrainer.training_step

    def told(self, model, inputs, *args):
        tokens = torch.tensor(inputs["layout"]["query_lengths"]).view(-1, 2).sum(1)
        print("a pass of", *tokens.tolist())
        return training_step(self, model, inputs, *args)

    program.PreferenceTrainer.training_step = told


def test_processes_get_alike_much_to_do(run, one, tmp_path):
    """Of each four pairs, one process has the largest and the smallest, the other those between."""
    printed = run(2, tell_sizes)
    first, second = (
        [sorted(map(int, tokens.split())) for tokens in re.findall("a pass of (.*)", text)]
        for text in printed
    )
    assert len(first) == len(second) == 8
    for a, b in zip(first, second):
        smallest, *between, largest = sorted(a + b)
        assert sorted([a, b]) == sorted([[smallest, largest], between])
    same_trajectory(tmp_path / "out", one)


def test_two_processes_compute_the_reference_before_training(run, one, tmp_path):
    run(2, precompute_ref_log_probs=True)
    same_trajectory(tmp_path / "out", one, 1e-5)


def be_late(program):
    time.sleep(2)


def test_two_processes_overwrite_a_finished_run(run, one, tmp_path):
    """Also when the main process is late, and the other one finds the finished run still there."""
    shutil.copytree(one, tmp_path / "out")
    run(2, overwrite=True, max_steps=2, only=[(0, be_late)])
    (old,) = tmp_path.glob("out-old-*")
    before = {name: digest for name, digest in tiny.tree(one).items() if name != ".lock"}
    assert list(tiny.losses(tmp_path / "out")) == [1, 2] and tiny.tree(old) == before


def die(program, at):
    send(program, at, [signal.SIGKILL])


def test_a_process_that_dies_takes_the_other_along(run, inputs, one, tmp_path):
    with pytest.raises(AssertionError, match="-9"):
        run(2, only=[(1, functools.partial(die, at=6))])  # fails on the statuses, not on a time-out
    assert (
        not (tmp_path / "out" / "adapter_config.json").exists()
        and (tmp_path / "out" / "checkpoint-4").exists()
    )
    run(2)
    same_trajectory(tmp_path / "out", one)


def test_what_is_refused_is_refused_once(run, tmp_path):
    main, other = run(2, status=2, beta=-1)
    assert "beta=-1" in main and not other and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- sharded
@pytest.fixture
def sharded(run, tmp_path):
    """As run, with two processes that share one model as fsdp2.yaml says."""
    variables = launcher_variables(cpu_config("fsdp2", tmp_path))
    assert variables["ACCELERATE_USE_FSDP"] == "true" and variables["FSDP_VERSION"] == "2"
    return functools.partial(run, 2, shard_on_cpu, variables=variables)


def test_fsdp2_equals_one_process_and_saves_only_the_adapter(sharded, one, inputs, tmp_path):
    """Interrupted and resumed, with activations recomputed."""
    sharded(
        status=143,
        gradient_checkpointing=True,
        only=[(0, functools.partial(send, at=6, signals=[signal.SIGTERM]))],
    )
    printed = sharded(gradient_checkpointing=True)
    sizes = [re.search(r"(\d+) of (\d+) sharded", text).groups() for text in printed]
    assert all(part == whole != "0" for part, whole in sizes) and "continuing from" in printed[0]
    same_trajectory(tmp_path / "out", one)
    compare_evaluation(inputs[0], tmp_path / "out", inputs[1])
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        names = tensor_names(checkpoint)
        assert names and all("lora_" in name for name in names), [
            name for name in names if "lora_" not in name
        ]


def test_a_sharded_run_goes_on_unsharded_or_is_refused(sharded, run, one, tmp_path):
    sharded(status=143, only=[(1, functools.partial(send, at=6, signals=[signal.SIGTERM]))])
    try:
        run(1)
    except AssertionError as error:
        assert "Traceback" not in str(error) and "dpotrainer: " in str(error)
    else:
        same_trajectory(tmp_path / "out", one)


def test_an_sft_start_is_sharded_too(sharded, run, inputs, tmp_path):
    """The reference is the frozen copy of the adapter, sharded like the policy."""
    from test_policy import make_adapter

    sft = make_adapter(inputs[0], tmp_path / "sft", seed=5)
    run(1, model=sft, max_steps=3)
    alone = (tmp_path / "out").rename(tmp_path / "alone")
    sharded(model=sft, max_steps=3)
    same_trajectory(tmp_path / "out", alone)


# -------------------------------------------------------------------------------------------------------------- ZeRO-3
@pytest.fixture
def zero3(run, tmp_path):
    """As run, with two processes that share one model as zero3.yaml says."""
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    variables = launcher_variables(cpu_config("zero3", tmp_path))
    assert (
        variables["ACCELERATE_USE_DEEPSPEED"] == "true"
        and variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    )
    return functools.partial(run, 2, shard_on_cpu, variables=variables)


def test_zero3_trains_an_sft_start(zero3, run, inputs, tmp_path):
    from test_policy import make_adapter

    sft = make_adapter(inputs[0], tmp_path / "sft", seed=5)
    run(1, model=sft, max_steps=3)
    alone = (tmp_path / "out").rename(tmp_path / "alone")
    zero3(model=sft, max_steps=3)
    same_trajectory(tmp_path / "out", alone)


def test_a_zero3_run_is_not_continued_otherwise(zero3, run, inputs, tmp_path):
    """Without DeepSpeed the optimizer's state would be left behind, silently; one process cannot read two's."""
    zero3(status=143, only=[(1, functools.partial(send, at=3, signals=[signal.SIGTERM]))])
    before = tiny.tree(tmp_path / "out" / "checkpoint-3")
    (printed,) = run(1, status=2)
    assert "a run with other settings" in printed and re.search(
        "there  # sharding.*DEEPSPEED true", printed
    )
    assert tiny.tree(tmp_path / "out" / "checkpoint-3") == before


def test_zero3_equals_one_process_and_saves_only_the_adapter(zero3, one, inputs, tmp_path):
    """Interrupted and resumed, with activations recomputed; what is saved is whole."""
    zero3(
        status=143,
        gradient_checkpointing=True,
        only=[(1, functools.partial(send, at=6, signals=[signal.SIGTERM]))],
    )
    printed = zero3(gradient_checkpointing=True)
    sizes = [re.search(r"(\d+) of (\d+) sharded", text).groups() for text in printed]
    assert all(part == whole != "0" for part, whole in sizes) and "continuing from" in printed[0]
    same_trajectory(tmp_path / "out", one)
    compare_evaluation(inputs[0], tmp_path / "out", inputs[1])
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        names = tensor_names(checkpoint)
        assert names and all("lora_" in name for name in names), [
            name for name in names if "lora_" not in name
        ]


# ----------------------------------------------------------------------------------------------------- the files alone
def test_zero3_is_what_accelerate_understands():
    config = load_config_from_file(str(CONFIGS / "zero3.yaml"))
    assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == 3
    assert (
        config.deepspeed_config["zero3_init_flag"]
        and config.deepspeed_config["zero3_save_16bit_model"]
    )


def test_two_nodes_says_where_the_first_is():
    config = load_config_from_file(str(CONFIGS / "two_nodes.yaml"))
    assert config.num_machines == 2 and config.num_processes % 2 == 0 and config.main_process_port
