"""A run that was interrupted ends like one that was not: every metric, every weight, every file, bit for bit."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lm.config.recipes import load_config
from lm.runs import checkpoint
from lm.runs.directory import Run
from lm.runs.metrics_log import MetricsLog
from lm.training.optimizer import Optimizer
from lm.training.pretraining import train
from lm.training.stability import Ladder, Verdict
from tests.conftest import StopAt, terminate

ROOT = Path(__file__).parents[3]
DIFFER = {"tokens_per_second", "memory_bytes", "share_of_peak"}  # they describe the machine, not the run


@pytest.fixture(scope="module")
def long(small):
    """A run with everything that could hold state: dropout, random masks, sums between lines of the log."""
    return small.replace(
        dropout=0.1, steps=60, log_every=7, validate_every=25, checkpoint_every=4, micro_batch_rows=4, seed=3
    )


@pytest.fixture(scope="module")
def undisturbed(long, quietly, tmp_path_factory) -> Run:
    return quietly(long, tmp_path_factory.mktemp("undisturbed") / "run")


def saved_steps(run: Path) -> list[int]:
    return checkpoint.steps(run / "checkpoints")


def metrics_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the fields that may differ."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in DIFFER} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics_of(a) == metrics_of(b)
    assert saved_steps(a) == saved_steps(b)
    for step in saved_steps(a):
        first, second = (checkpoint.of_step(run / "checkpoints", step) for run in (a, b))
        assert first.state == second.state  # with the checksums of all weights and of the optimizer's state
        for name, tensor in first.model().items():
            assert torch.equal(tensor, second.model()[name]), name
    assert (a / "config.toml").read_bytes() == (b / "config.toml").read_bytes()
    assert (a / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()


def test_a_run_killed_at_ten_moments_some_while_it_saves_ends_as_if_undisturbed(long, quietly, process, tmp_path):
    """Five kills come some steps and milliseconds after the start, two while it starts, three while it saves."""
    config, draw = long.replace(steps=150, keep_checkpoints=3, keep_every=40), random.Random(5)
    whole = quietly(config, tmp_path / "undisturbed").path
    run = tmp_path / "run"
    moments = ["steps"] * 5 + ["start"] * 2 + ["saving"] * 3
    draw.shuffle(moments)
    for moment in moments:
        reached = max(saved_steps(run), default=0)
        process.start(config, run, die_at_operation=draw.randint(2, 6) if moment == "saving" else 0)
        if moment == "steps":
            further = reached + draw.randint(1, 8)
            process.wait_for(lambda: max(saved_steps(run), default=0) >= further)  # noqa: B023
            time.sleep(draw.uniform(0, 0.03))
        elif moment == "start":
            time.sleep(draw.uniform(0, 0.2))
        assert process.end(0 if moment == "saving" else signal.SIGKILL) == -signal.SIGKILL, process.stderr_text()
        if moment == "saving":
            assert any(run.glob("checkpoints/*.tmp"))
    process.start(config, run)
    assert process.end() == 0, process.stderr_text()
    assert_same_run(run, whole)


def test_train_py_killed_and_called_again_ends_as_if_undisturbed(long, undisturbed, tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "recipe.toml"
    long.save(recipe)
    command = [sys.executable, "train.py", recipe, "--run", run]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not any(run.glob("checkpoints/step_????????")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.kill()
    first.communicate()
    assert saved_steps(run)[0] < 60
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(run, undisturbed.path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_and_resumes(long, undisturbed, process, recorder, tmp_path, number, status):
    run = tmp_path / "run"
    process.start(long, run)
    process.wait_for(lambda: any(saved_steps(run)))
    assert process.end(number) == status
    assert "Traceback" not in process.stderr_text()
    stopped = saved_steps(run)[0]
    assert (
        process.stderr_text()
        .splitlines()[-1]
        .startswith(f"stopped at step {stopped}, which is saved: the same command")
    )
    assert stopped < 60
    train(long, run, recorder)
    assert recorder.began == (stopped, 60)
    assert_same_run(run, undisturbed.path)


class StopAtMetrics(StopAt):
    """A recorder that calls ``stop`` when it receives the metrics of a step."""

    def step(self, step: int) -> None: ...
    def metrics(self, line: dict) -> None:
        if line["step"] == self.at:
            self.stop()


@pytest.mark.parametrize("step", [7, 25, 56])
def test_a_run_stopped_between_its_checkpoints_ends_as_if_undisturbed(long, undisturbed, quietly, tmp_path, step):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(long, run, StopAtMetrics(step, terminate))
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before  # the process has its own handlers back
    assert saved_steps(run)[0] == step
    quietly(long, run)
    assert_same_run(run, undisturbed.path)


@pytest.mark.parametrize("stops", [[29], [30, 33], [34, 35, 33], [36, 30]])
def test_a_run_stopped_before_and_during_loss_spikes_rolls_back_as_if_undisturbed(
    long, quietly, tmp_path, monkeypatch, stops
):
    """Losses spike after 33 good steps until the rate was halved twice, so the run rolls back to 32, then to 28."""
    judge = Ladder.judge

    def troubled(ladder: Ladder, loss: float, *rest: float) -> Verdict:
        return judge(ladder, math.nan if ladder.seen >= 33 and ladder.rate > 0.3 else loss, *rest)

    monkeypatch.setattr(Ladder, "judge", troubled)
    config = long.replace(steps=45, validate_every=45)
    undisturbed = quietly(config, tmp_path / "undisturbed").path
    events = [line for line in metrics_of(undisturbed) if "event" in line]
    assert [line["step"] for line in events if line["event"] == "roll_back"] == [29]
    run = tmp_path / "run"
    for step in stops:
        with pytest.raises(SystemExit):
            train(config, run, StopAt(step - 1, terminate))
        assert saved_steps(run)[0] == step
    quietly(config, run)
    assert_same_run(run, undisturbed)


def test_a_run_stopped_with_weights_that_are_not_finite_saves_nothing_and_says_so(
    small, recorder, tmp_path, monkeypatch
):
    step = Optimizer.step

    def breaking(optimizer: Optimizer, *arguments: float) -> None:
        step(optimizer, *arguments)
        if recorder.began and optimizer.state()["norm.weight.step"] == 5:
            next(iter(optimizer.parameters.values())).data.fill_(math.nan)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Optimizer, "step", breaking)
    with pytest.raises(SystemExit):
        train(small.replace(checkpoint_every=2), tmp_path / "run", recorder)
    assert saved_steps(tmp_path / "run") == [4, 2]
    assert recorder.notes[-1].startswith("stopped at step 5, with weights that are not finite: the same command")


def test_the_checkpoint_of_the_best_validation_is_kept_and_found(undisturbed):
    losses = {
        line["step"]: sum(loss["nats_per_token"] for loss in line["validation"].values())
        for line in undisturbed.metrics()
        if "validation" in line
    }
    assert list(losses) == [25, 50, 60]
    best, best_before = min(losses, key=losses.get), min([25, 50], key=losses.get)
    assert saved_steps(undisturbed.path) == sorted({60, 56, best, best_before}, reverse=True)
    assert undisturbed.checkpoint("best").step == best


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut_off, flip_a_bit])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(long, undisturbed, recorder, tmp_path, harm, name):
    run = shutil.copytree(undisturbed.path, tmp_path / "run")
    harm(run / "checkpoints" / "step_00000060" / name)
    train(long, run, recorder)
    assert any("step_00000060" in note for note in recorder.notes)
    assert "resuming at step 56" in recorder.notes
    assert recorder.began == (56, 60)
    assert_same_run(run, undisturbed.path)


def test_lines_of_the_log_after_the_checkpoint_are_rewritten(long, undisturbed, quietly, tmp_path):
    run = shutil.copytree(undisturbed.path, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_00000060")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')  # cut off
    quietly(long, run)
    assert_same_run(run, undisturbed.path)


def test_a_finished_run_returns_at_once_unchanged(long, undisturbed, recorder, tmp_path):
    run = shutil.copytree(undisturbed.path, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train(long, run, recorder)
    assert recorder.lines == []
    assert recorder.notes == [f"{run} is trained: 60 of 60 steps are done"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.fixture
def begun(long, tmp_path) -> Path:
    """A run that was stopped after 25 steps of 60."""
    with pytest.raises(SystemExit):
        train(long, tmp_path / "run", StopAtMetrics(25, terminate))
    return tmp_path / "run"


def assert_one_sentence(stderr: str, words: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert words in errors[0]
    assert stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in stderr


def test_a_file_that_may_not_grow_ends_the_run_in_one_sentence_and_nothing_is_lost(
    long, undisturbed, begun, process, tmp_path
):
    limit = max(path.stat().st_size for path in begun.glob("checkpoints/*/*")) - 1
    process.start(long, begun, largest_file=limit)
    assert process.end() == 1
    assert_one_sentence(
        process.stderr_text(), "the checkpoint of step 28 could not be written (File too large); finished ones"
    )
    assert saved_steps(begun) == [25, 24, 20]
    assert [path.name for path in begun.glob("checkpoints/*.*")] == []
    process.start(long, begun)
    assert process.end() == 0, process.stderr_text()
    assert_same_run(begun, undisturbed.path)


@contextmanager
def mounted(folder: Path, *arguments: object) -> Iterator[None]:
    """Mount something on ``folder``; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", *map(str, arguments), folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_the_run_in_one_sentence_and_nothing_is_lost(long, undisturbed, process, tmp_path):
    size = sum(path.stat().st_size for path in undisturbed.path.glob("checkpoints/step_00000060/*"))
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "none"):
        process.start(long, disk / "run")
        assert process.end() == 1
        assert_one_sentence(process.stderr_text(), "the checkpoint of step 12 could not be written (")
        assert "o space left on device" in process.stderr_text()
        assert saved_steps(disk / "run") == [8, 4]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        process.start(long, disk / "run")
        assert process.end() == 0, process.stderr_text()
        assert_same_run(disk / "run", undisturbed.path)


@pytest.mark.parametrize(("place", "words"), [("checkpoints", "the checkpoint of step 28"), (".", "tokenizer.json")])
def test_a_directory_that_cannot_be_written_ends_the_run_in_one_sentence_and_nothing_is_lost(
    long, undisturbed, begun, process, place, words
):
    with mounted(begun / place, "--bind", begun / place):
        subprocess.run(["mount", "-o", "remount,ro,bind", begun / place], check=True)
        process.start(long, begun)
        assert process.end() == 1
        assert_one_sentence(process.stderr_text(), words)
        assert "ead-only file system" in process.stderr_text()
        assert saved_steps(begun) == [25, 24, 20]
    process.start(long, begun)
    assert process.end() == 0, process.stderr_text()
    assert_same_run(begun, undisturbed.path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_save_that_fails_ends_the_run_and_nothing_is_lost(
    long, undisturbed, begun, recorder, quietly, monkeypatch, number
):
    def broken(tensors: dict, path: Path, metadata: None) -> None:
        if "step_00000032" in str(path):
            raise OSError(number, os.strerror(number))
        safetensors.torch.save_file(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", broken)
        with pytest.raises(OSError, match="the checkpoint of step 32 could not be written") as failed:
            train(long, begun, recorder)
    assert failed.value.errno == number
    assert recorder.ended == 1
    assert saved_steps(begun) == [28, 25, 24]  # the validation of 25 is the best so far
    assert load_config(begun / "config.toml") == undisturbed.config
    quietly(long, begun)
    assert_same_run(begun, undisturbed.path)


def test_a_log_that_cannot_be_written_ends_the_run_and_its_truncated_line_is_rewritten(
    long, undisturbed, begun, recorder, quietly, monkeypatch
):
    write = MetricsLog.write

    def full(log: MetricsLog, line: dict) -> None:
        if line["step"] == 42:
            log._file.write(json.dumps(line)[:30])
            log._file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(log, line)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", full)
        with pytest.raises(OSError, match="No space left"):
            train(long, begun, recorder)
    assert saved_steps(begun)[0] == 40
    quietly(long, begun)
    assert_same_run(begun, undisturbed.path)
