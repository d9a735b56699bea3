"""Runs of several processes under torchrun: stopped, killed, resumed by another number of processes, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lm.config.settings import Config
from lm.runs import checkpoint

ROOT = Path(__file__).parents[3]


def torchrun(config: Config, run: Path, folder: Path, *options: str) -> subprocess.Popen:
    config.save(folder / "recipe.toml")
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--"]
    train = [str(ROOT / "train.py"), str(folder / "recipe.toml"), "--run", str(run), *options]
    return subprocess.Popen(
        [sys.executable, *command, *train],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def signal_rank(launcher: subprocess.Popen, rank: int, number: int) -> None:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if parent == str(launcher.pid) and f"\0RANK={rank}\0" in (entry / "environ").read_text():
                os.kill(int(entry.name), number)
                return
    pytest.fail(f"there is no rank {rank}")


def end_at(step: int, launcher: subprocess.Popen, run: Path, rank: int, number: int) -> str:
    """Send a rank a signal when a checkpoint of ``step`` or later exists; return stderr until all have ended."""
    until = time.monotonic() + 120
    while not any(int(path.name[5:]) >= step for path in run.glob("checkpoints/step_????????")):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    signal_rank(launcher, rank, number)
    return launcher.communicate(timeout=120)[1]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_run_of_replicas_stopped_then_of_shards_killed_ends_alone_as_if_undisturbed(small, quietly, tmp_path):
    config = small.replace(
        steps=80, log_every=1, validate_every=25, checkpoint_every=2, learning_rate=0.002, muon_learning_rate=0.005
    )
    run = tmp_path / "run"
    told = end_at(2, torchrun(config, run, tmp_path), run, 1, signal.SIGTERM)
    stopped = checkpoint.latest(run / "checkpoints", pytest.fail).step
    assert told.count(f"stopped at step {stopped}, which is saved") == 1
    assert "on 2 processes (DDP), each on CPU" in told
    assert "[rank" not in told  # torch's mark on what a rank says
    told = end_at(stopped + 4, torchrun(config, run, tmp_path, "--parallel", "fsdp"), run, 1, signal.SIGKILL)
    assert told.count(f"resuming at step {stopped}") == 1
    assert "on 2 processes (FSDP)" in told
    assert told.count("error: another process of this run has died: the same command resumes") == 1
    assert "(SIGKILL)" in told
    assert "[rank" not in told
    killed = checkpoint.latest(run / "checkpoints", pytest.fail).step
    assert stopped + 4 <= killed < 80
    config = config.replace(checkpoint_every=100)
    finished, undisturbed = quietly(config, run), quietly(config, tmp_path / "undisturbed")
    for line, expected in zip(finished.metrics(), undisturbed.metrics(), strict=True):
        assert line.keys() == expected.keys()
        for name in ("loss", "gradient_norm", "learning_rate", "tokens", "epoch"):
            assert line.get(name) == pytest.approx(expected.get(name), abs=1e-5)
        for readout, loss in expected.get("validation", {}).items():
            assert line["validation"][readout] == pytest.approx(loss, abs=1e-5)


def test_a_mistake_that_all_ranks_make_is_reported_once(small, tmp_path):
    launcher = torchrun(small, tmp_path / "run", tmp_path, "--batch-tokens", "96")
    told = launcher.communicate(timeout=120)[1]
    assert told.count("error: the batch's 3 rows do not divide among 2 ranks") == 1
    assert told.count("error: ") == 1
    launcher = torchrun(small, tmp_path / "run", tmp_path, "--batch-tokenz", "96")
    told = launcher.communicate(timeout=120)[1]
    assert told.count("error: unknown option --batch-tokenz") == 1
    assert told.count("error: ") == 1
    assert not (tmp_path / "run").exists()
