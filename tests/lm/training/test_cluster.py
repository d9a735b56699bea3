"""Two nodes, each a torchrun of its own on this machine, and checkpoints in slices."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from lm.config.settings import Config
from lm.runs import checkpoint
from lm.runs.directory import Run, open_run
from lm.training.trainer import StopSignal

ROOT = Path(__file__).parents[3]
SLICES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def started(options: list[str], run: Path, config: Config, *more: str) -> subprocess.Popen:
    """A torchrun in a session of its own, with what it prints in a file next to the run."""
    recipe = run.with_suffix(".toml")
    config.save(recipe)
    train = ["--", str(ROOT / "train.py"), str(recipe), "--run", str(run), "--parallel", "fsdp", *more]
    with run.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *train],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **page_environment()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def page_environment() -> dict[str, str]:
    """The variables that docs/cluster.md exports on each node."""
    return dict(re.findall(r"^    export (\w+)=(\S+)$", (ROOT / "docs" / "cluster.md").read_text("utf-8"), re.M))


def page_options() -> list[str]:
    """The options that docs/cluster.md gives torchrun on each of two nodes."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    command = re.search(r"^    (torchrun .*?) -- ", page.replace("\\\n", " "), re.M | re.S)
    return shlex.split(command[1])[1:]


def of_this_machine(options: list[str], port: int) -> list[str]:
    changed = {
        "--rdzv-endpoint": f"localhost:{port}",
        "--nproc-per-node": "1",
        "--rdzv-conf": "keep_alive_interval=1",
        "--local-addr": "localhost",
    }
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given["--nnodes"] == "2"
    assert given["--rdzv-backend"] == "c10d"
    return [word for option in (given | changed).items() for word in option]


def family(number: int) -> list[int]:
    """A process and all that it has started, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [number]
    for each in found:
        found += children.get(each, [])
    return found


def kill(process: subprocess.Popen) -> None:
    for number in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


@contextmanager
def ended(*processes: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)


def until(there, run: Path, *processes: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, run.with_suffix(".log").read_text()
        for process in processes:
            assert process.poll() in (None, 0), run.with_suffix(".log").read_text()
        time.sleep(0.02)


def steps(run: Path) -> list[int]:
    return checkpoint.steps(run / "checkpoints")


@pytest.fixture(scope="module")
def config(small: Config) -> Config:
    return small.replace(
        steps=60, checkpoint_every=4, validate_every=30, log_every=4, learning_rate=0.002, micro_batch_rows=2,
        keep_checkpoints=2, keep_every=12, sharded_checkpoints="always",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Run:
    """A run of two processes of one torchrun, which nothing disturbs, with checkpoints in slices."""
    path = tmp_path_factory.mktemp("alone") / "run"
    with ended(process := started(["--standalone", "--nproc-per-node=2"], path, config)):
        until(lambda: process.poll() is not None, path, process)
    return open_run(path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_a_node_that_is_killed_rejoins_and_the_run_ends_with_the_same_bits(config, alone, tmp_path):
    run = tmp_path / "run"
    with socket.socket() as held:
        held.bind(("localhost", 0))
        port = held.getsockname()[1]
    options = of_this_machine(page_options(), port)
    first = started(options, run, config)
    with ended(first):
        until(lambda: socket.socket().connect_ex(("localhost", port)) == 0, run, first)
        second = started(options, run, config)
        with ended(second):
            until(lambda: steps(run)[:1] >= [4], run, first, second)
            kill(second)
        assert steps(run)[0] < 60
        again = started(options, run, config)
        with ended(again):
            until(lambda: first.poll() is not None and again.poll() is not None, run, first, again)
    said = run.with_suffix(".log").read_text()
    assert re.search(r"resuming at step \d", said), said
    for kind in ("model", "optimizer"):
        mine, whole = (getattr(each.newest(), kind)() for each in (open_run(run), alone))
        assert mine.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(mine[name], tensor), name


def test_one_process_resumes_from_slices_and_reads_them(config, alone, quietly, tmp_path):
    assert set(SLICES) < {path.name for path in alone.newest().path.iterdir()}
    assert alone.newest().state["slices"] == 2
    assert checkpoint.steps(alone.path / "checkpoints")[:2] == [60, 56]
    path = tmp_path / "run"
    shutil.copytree(alone.path, path)
    shutil.rmtree(path / "checkpoints" / "step_00000060")
    resumed = quietly(config.replace(parallel="fsdp"), path)
    assert "slices" not in resumed.newest().state
    for kind in ("model", "optimizer"):
        mine, whole = (getattr(run.newest(), kind)() for run in (resumed, alone))
        assert mine.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6)
    model = alone.load_model(torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, alone.newest().model()[name])


def test_another_run_starts_from_weights_in_slices(config, alone, quietly, tmp_path):
    run = quietly(config.replace(init_from=str(alone.path), steps=1, learning_rate=0.0), tmp_path / "run")
    expected = alone.newest().model()
    assert torch.equal(run.newest().model()["embedding.weight"], expected["embedding.weight"])
    assert checkpoint.steps(alone.path / "checkpoints")[0] == 60


def test_under_torchrun_a_second_signal_does_not_kill_what_is_being_saved():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(once=False) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


SBATCH = {
    "job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": "1", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d", "signal": r"TERM@\d+", "requeue": None, "open-mode": "append", "output": r"[\w-]+%j\.log",
}  # fmt: skip


def test_the_slurm_script_has_options_that_sbatch_knows():
    given = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (ROOT / "docs" / "train.slurm").read_text("utf-8"), re.M)
    assert len(given) == (ROOT / "docs" / "train.slurm").read_text("utf-8").count("#SBATCH") == len(SBATCH)
    for name, value in given:
        assert re.fullmatch(SBATCH[name] or "", value), name


@pytest.mark.skipif(not shutil.which("bash"), reason="a script for bash")
def test_the_slurm_script_starts_a_torchrun_on_each_node_with_options_that_it_knows(tmp_path):
    from torch.distributed.run import parse_args

    script = ROOT / "docs" / "train.slurm"
    subprocess.run(["bash", "-n", script], check=True)
    stand_ins = {
        "scontrol": 'test "$*" = "show hostnames n[7-8]" && printf "n7\\nn8\\n"',
        "srun": 'test "$1" = --kill-on-bad-exit=0 && shift && exec "$@"',
        "torchrun": 'printf "%s\\0" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "41",
        "SLURM_GPUS_ON_NODE": "8",
    }
    called = ["configs/small.toml", "--data", "my data", "--run", "runs/a"]
    found = subprocess.run(
        ["bash", script, *called],
        env={**slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    )
    variable, *words = found.stdout.split("\0")[:-1]
    assert variable == "1"
    options = parse_args(words)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "8", "c10d")
    assert (options.rdzv_endpoint, options.rdzv_id, options.max_restarts) == ("n7:20041", "41", 20)
    assert [options.training_script, *options.training_script_args] == ["train.py", *called]
    page = parse_args([*page_options(), "--", "train.py"])
    for name in ("nnodes", "nproc_per_node", "rdzv_backend", "max_restarts"):
        assert getattr(options, name) == getattr(page, name)
    assert page_environment() == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
