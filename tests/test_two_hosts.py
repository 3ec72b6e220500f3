"""Two hosts by configs/accelerate/two_nodes.yaml: network namespaces of one machine, joined by their own cable."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from test_distributed import cpu_config, same_trajectory
from test_run import compare_evaluation

pytestmark = pytest.mark.slow
TIMEOUT = 20  # seconds that a process waits for another one
IMPATIENT = f"""\
import datetime, sys
import torch.distributed.distributed_c10d as c10d
c10d.default_pg_timeout = datetime.timedelta(seconds={TIMEOUT})  # transformers hands ddp_timeout on for GPUs alone
sys.path.insert(0, {str(tiny.ROOT)!r})
import dpotrainer
sys.exit(dpotrainer.main())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces, {name: address}; nothing but the cable between them leads out of them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two network namespaces need root and the command ip")
    names = {f"dpo{os.getpid()}{end}": f"10.77.0.{number}" for number, end in enumerate("ab", 1)}
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            first, second = names
            ip(
                "link",
                "add",
                "cable",
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                second,
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name, address in names.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_pairs(folder / "pairs" / "train.jsonl", 48, seed=1)
    tiny.make_pairs(folder / "pairs" / "test.jsonl", 9, seed=2)
    return tiny.make_model(folder / "model"), folder / "pairs"


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    process = tiny.start_program(
        tiny.settings(*inputs, folder / "out"), folder / "log", tiny.no_pictures
    )
    assert tiny.end_program(process) == 0, (folder / "log").read_text()
    return folder / "out"


@pytest.fixture
def start(hosts, inputs, tmp_path):
    """start() -> the launcher of each host, its output in log-RANK; whatever still runs at the end is killed."""
    config, program, started = cpu_config("two_nodes", tmp_path), tmp_path / "impatient.py", []
    program.write_text(IMPATIENT)

    def launch():
        flags = tiny.settings(
            *inputs, tmp_path / "out", per_device_train_batch_size=2, per_device_eval_batch_size=2
        )
        for rank, name in enumerate(hosts):
            words = [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                config,
                "--machine_rank",
                rank,
                "--main_process_ip",
                next(iter(hosts.values())),
                program,
                *flags,
            ]
            with open(tmp_path / f"log-{rank}", "a") as log:
                started.append(
                    subprocess.Popen(
                        [str(word) for word in words],
                        stdout=log,
                        stderr=log,
                        env=tiny.environment(GLOO_SOCKET_IFNAME="cable"),
                    )
                )
        return started[-2:]

    yield launch
    for name in hosts:
        kill_all(name)
        ip("-n", name, "link", "set", "cable", "up")


def kill_all(host: str) -> None:
    """Launcher and workers of one host at once: the processes in its namespace, which all are ours."""
    pids = subprocess.run(
        ["ip", "netns", "pids", host], capture_output=True, text=True, check=True
    ).stdout.split()
    for pid in map(int, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def told(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("log-*")))


def test_two_hosts_train_what_one_process_trains(start, inputs, one, tmp_path):
    for process in start():
        assert process.wait(180) == 0, told(tmp_path)
    same_trajectory(tmp_path / "out", one)
    compare_evaluation(inputs[0], tmp_path / "out", inputs[1])
    assert (tmp_path / "log-0").read_text().count("2 (processes)") == 1
    assert "policy" not in (tmp_path / "log-1").read_text(), "prints on both"


@pytest.mark.parametrize("lost", [0, 1], ids=["the first", "the second"])
@pytest.mark.parametrize("cut", [False, True], ids=["killed", "cut off"])
def test_a_lost_host_ends_the_other_and_both_resume(lost, cut, start, hosts, inputs, one, tmp_path):
    """Killed, so that its connections close; or cut off in the same moment, so that nothing is heard of it again."""
    both, metrics = start(), tmp_path / "out" / "metrics.jsonl"
    tiny.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, 180)
    if cut:
        ip("-n", list(hosts)[lost], "link", "set", "cable", "down")
    kill_all(list(hosts)[lost])
    assert both[1 - lost].wait(TIMEOUT + 60) != 0, told(tmp_path)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    ip("-n", list(hosts)[lost], "link", "set", "cable", "up")
    for process in start():
        assert process.wait(180) == 0, told(tmp_path)
    assert "continuing from" in told(tmp_path)
    same_trajectory(tmp_path / "out", one)
    compare_evaluation(inputs[0], tmp_path / "out", inputs[1])
