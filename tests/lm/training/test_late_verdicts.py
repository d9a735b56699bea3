"""Steps on which the device decides, and whose verdict is read later: nothing waits, and the run is the same."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # before a test changes functions of torch, which it keeps a list of

from lm.runs import checkpoint
from lm.runs.directory import Run
from lm.training import pretraining, trainer
from lm.training.distributed import Ranks
from lm.training.optimizer import Optimizer
from lm.training.pretraining import Pretraining
from lm.training.stability import MEMORY, SKIPS, Outcome
from lm.training.trainer import State, Trainer
from tests.conftest import StopAt

MACHINE = {"tokens_per_second", "memory_bytes", "share_of_peak"}  # these describe the machine, not the run
SPIKES = {3: math.nan, 7: math.inf, 19: math.nan, **dict.fromkeys(range(11, 12 + SKIPS), math.nan)}


@pytest.fixture
def decide_late(monkeypatch):
    monkeypatch.setattr(trainer, "decides_on_device", lambda ranks, objective: True)


@pytest.fixture
def spoil(monkeypatch):
    """Multiply the losses of chosen steps, each once: ``spoil({step: factor})``."""
    honest = pretraining.step_gradients

    def install(factors: dict[int, float]) -> None:
        left = dict(factors)

        def spoiled(objective, model, batch, config, step, ranks):
            losses, shares = honest(objective, model, batch, config, step, ranks)
            factor = left.pop(step, 1.0)
            return {name: loss * factor for name, loss in losses.items()}, shares

        monkeypatch.setattr(pretraining, "step_gradients", spoiled)

    return install


def logged(run: Run) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in MACHINE} for line in run.metrics()]


def assert_same(ours: Run, theirs: Run) -> None:
    assert logged(ours) == logged(theirs)
    folders = [run.path / "checkpoints" for run in (ours, theirs)]
    assert checkpoint.steps(folders[0]) == checkpoint.steps(folders[1])
    for step in checkpoint.steps(folders[0]):
        mine, other = (checkpoint.of_step(folder, step) for folder in folders)
        assert mine.state == other.state  # with the checksums of weights and optimizer


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_whose_verdicts_come_late_is_that_whose_verdicts_come_at_once(
    optimizer, small, quietly, tmp_path, spoil, monkeypatch
):
    config = small.replace(optimizer=optimizer, log_every=6, checkpoint_every=9, keep_checkpoints=9, steps=26)
    spoil(SPIKES)
    at_once = quietly(config, tmp_path / "at once")
    assert [line["event"] for line in at_once.metrics() if "event" in line].count("roll_back") == 1
    spoil(SPIKES)
    monkeypatch.setattr(trainer, "decides_on_device", lambda ranks, objective: True)
    assert_same(quietly(config, tmp_path / "late"), at_once)


def test_a_run_whose_verdicts_come_late_resumes_from_where_it_was_cut_off(small, quietly, tmp_path, spoil, decide_late):
    config = small.replace(log_every=6, checkpoint_every=4, keep_checkpoints=9)
    spoil({6: math.nan, 13: math.nan})
    whole = quietly(config, tmp_path / "whole")
    spoil({6: math.nan, 13: math.nan})
    for stop in (7, 14):  # the steps that are skipped, whose verdicts are not read yet
        with pytest.raises(InterruptedError):
            pretraining.train(config, tmp_path / "cut off", StopAt(stop))
        spoil({6: math.nan, 13: math.nan})
    assert_same(quietly(config, tmp_path / "cut off"), whole)


def test_a_verdict_is_read_after_the_passes_of_the_next_step_or_when_something_is_due(
    small, quietly, tmp_path, monkeypatch, decide_late
):
    events, honest, read, step = [], pretraining.step_gradients, Outcome.read, Optimizer.step

    def passes(objective, model, batch, config, number, ranks):
        events.append(f"passes {number}")
        return honest(objective, model, batch, config, number, ranks)

    def updating(optimizer, rate, *others):
        if others:  # the dry step has none
            events.append("update")
        step(optimizer, rate, *others)

    monkeypatch.setattr(pretraining, "step_gradients", passes)
    monkeypatch.setattr(Outcome, "read", lambda self: events.append(f"read {self.step}") or read(self))
    monkeypatch.setattr(Optimizer, "step", updating)
    quietly(small.replace(steps=5, log_every=3), tmp_path / "run")
    assert events == [
        "passes 0", "update",
        "passes 1", "read 0", "update",
        "passes 2", "read 1", "update", "read 2",
        "passes 3", "update",
        "passes 4", "read 3", "update", "read 4",
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"optimizer": "adamw"}, {"muon_beta2": 0.95}, {"micro_batch_rows": 2}])
def test_nothing_between_a_batch_and_the_update_asks_the_device_for_a_number(
    changes, small, tmp_path, monkeypatch, decide_late
):
    """On the meta device there are none: ``float(tensor)``, ``.cpu()``, ``nonzero()`` and the like raise an error.

    Only a copy to the CPU that does not wait is let through.
    """
    meta, to = torch.device("meta"), torch.Tensor.to

    def copied(tensor, *where, **how):
        waits = not how.get("non_blocking")
        return tensor if where == ("cpu",) and not waits else to(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the meta device
    module = Pretraining.open(small.replace(**changes), tmp_path, Ranks())
    batch = module.batch(0)
    module.ranks = Ranks(meta)
    training = Trainer(module, tmp_path, module.ranks, SimpleNamespace())
    training.model = module.model().to(meta)
    training.optimizer, training.state = Optimizer(training.model, module.config.optimizer), State()
    training.average = None
    training.state.ladder.seen, training.state.ladder.mean = MEMORY, 3.0
    assert training._step(batch)
    assert training.state.step == 1
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        training.unread.read()
