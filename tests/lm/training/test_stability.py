from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.runs import checkpoint
from lm.runs.metrics_log import Best
from lm.training import pretraining, trainer
from lm.training.stability import CALM, FORGIVEN, MEMORY, RECOVERY, ROLL_BACKS, SKIPS, Ladder, Outcome, Verdict
from tests.conftest import StopAt


def calm_ladder(loss: float = 2.0, noise: float = 0.1) -> Ladder:
    """A ladder that has seen enough steps of a loss with this standard deviation."""
    ladder = Ladder()
    draw = torch.Generator().manual_seed(0)
    for value in (loss + noise * torch.randn(MEMORY * 2, generator=draw)).tolist():
        assert ladder.judge(value, 1.0, 8.0) is Verdict.APPLY
    return ladder


def test_the_running_mean_and_deviation_are_those_of_the_losses():
    ladder = calm_ladder(3.0, 0.2)
    assert ladder.mean == pytest.approx(3.0, abs=0.1)
    assert math.sqrt(ladder.variance) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_skipped_at_any_time(loss):
    assert Ladder().judge(loss, 1.0, 8.0) is Verdict.SKIP
    assert Ladder().judge(1.0, math.nan, 0.0) is Verdict.SKIP
    assert calm_ladder().judge(loss, 1.0, 0.0) is Verdict.SKIP


def test_a_spike_is_detected_by_its_distance_in_deviations():
    assert calm_ladder().judge(2.7, 1.0, 8.0) is Verdict.APPLY
    assert calm_ladder().judge(3.0, 1.0, 8.0) is Verdict.SKIP
    assert calm_ladder().judge(3.0, 1.0, 0.0) is Verdict.APPLY  # off
    assert Ladder().judge(1e9, 1.0, 8.0) is Verdict.APPLY  # nothing to compare with yet
    assert calm_ladder().judge(0.1, 1.0, 8.0) is Verdict.APPLY  # a loss that falls is no spike


def test_a_spike_does_not_move_the_mean():
    ladder = calm_ladder()
    before = ladder.mean, ladder.variance
    ladder.judge(50.0, 1.0, 8.0)
    assert (ladder.mean, ladder.variance) == before


def test_persistent_spikes_escalate():
    ladder = calm_ladder()
    verdicts = [ladder.judge(50.0, 1.0, 8.0) for _ in range(SKIPS + 1 + RECOVERY)]
    assert verdicts == (
        [Verdict.SKIP] * SKIPS + [Verdict.LOWER] + [Verdict.APPLY] * (RECOVERY - 1) + [Verdict.ROLL_BACK]
    )
    assert ladder.rate == 0.25
    assert not ladder.in_trouble


def test_a_run_that_recovers_keeps_its_weights():
    ladder = calm_ladder()
    for _ in range(SKIPS + 1):
        ladder.judge(50.0, 1.0, 8.0)
    assert ladder.in_trouble
    for _ in range(CALM):
        assert ladder.judge(2.0, 1.0, 8.0) is Verdict.APPLY
    assert not ladder.in_trouble
    assert ladder.rate == 0.5  # the lower rate stays
    assert ladder.judge(50.0, 1.0, 8.0) is Verdict.SKIP  # from the first level again


def test_a_loss_that_is_not_finite_is_rolled_back_and_finally_aborted():
    ladder, verdicts = Ladder(), []
    while Verdict.ABORT not in verdicts:
        verdicts.append(ladder.judge(math.nan, 1.0, 8.0))
    assert verdicts == ([Verdict.SKIP] * SKIPS + [Verdict.ROLL_BACK]) * ROLL_BACKS + [Verdict.SKIP] * SKIPS + [
        Verdict.ABORT
    ]


def test_after_many_good_steps_rollbacks_are_counted_from_zero():
    ladder = calm_ladder()
    ladder.roll_back()
    ladder.went_back_to = 7
    for _ in range(FORGIVEN):
        ladder.judge(2.0, 1.0, 8.0)
    assert (ladder.roll_backs, ladder.went_back_to) == (0, -1)


@given(st.lists(st.sampled_from([2.0, 2.05, 50.0, math.nan]), max_size=200), st.integers(0, 199))
def test_a_ladder_restored_from_json_continues_unchanged(losses, cut):
    through, saved = calm_ladder(), calm_ladder()
    for number, loss in enumerate(losses):
        if number == cut:
            saved = Ladder(**json.loads(json.dumps(asdict(saved))))
        assert through.judge(loss, 1.0, 8.0) is saved.judge(loss, 1.0, 8.0)
    assert through == saved


@given(st.lists(st.sampled_from([2.0, 2.05, 2.7, 50.0, math.nan, math.inf]), max_size=200), st.sampled_from([0.0, 8.0]))
def test_the_device_skips_the_steps_that_are_not_applied_and_no_other(losses, threshold):
    ladder = calm_ladder()
    for step, loss in enumerate(losses):
        parts = {"a": torch.tensor(loss - 1), "b": torch.tensor(1.0)}
        outcome = Outcome(step, parts, {"a": 0.5, "b": 0.5}, torch.tensor(1.0))
        skip = bool(outcome.skip(ladder.limit(threshold)))
        found, norm = outcome.read()
        assert found == pytest.approx({"a": loss - 1, "b": 1.0}, nan_ok=True)
        verdict = ladder.judge(sum(found.values()), norm, threshold)
        assert skip == (verdict is not Verdict.APPLY)


def test_the_device_skips_a_step_with_a_gradient_that_is_not_finite():
    for norm in (math.nan, math.inf):
        assert bool(Outcome(0, {"a": torch.tensor(1.0)}, {"a": 1.0}, torch.tensor(norm)).skip(math.inf))


def test_the_best_validation_is_kept_and_worse_ones_counted():
    best = Best()
    assert [best.add(step, loss) for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0), (50, 1.9))] == [
        True, True, False, False, True
    ]  # fmt: skip
    assert (best.step, best.loss, best.worse) == (50, 1.9, 0)
    assert not best.add(60, math.nan)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ({"breaks_ties": True}, [(10, 0), (10, 1), (30, 0), (30, 1), (50, 0)]),
        ({"step": 0, "loss": None, "worse": 0}, [(10, 0), (10, 1), (10, 2), (10, 3), (50, 0)]),  # of an earlier version
    ],
)
def test_equal_scores_are_told_apart_by_their_loss_in_runs_that_began_with_it(state, kept):
    best, found = Best(**state), []
    for step, accuracy, loss in ((10, 0.8, 0.5), (20, 0.8, 0.5), (30, 0.8, 0.4), (40, 0.7, 0.1), (50, 0.9, 0.9)):
        best.add(step, -accuracy, loss)
        found.append((best.step, best.worse))
        best = Best(**json.loads(json.dumps(asdict(best))))
    assert found == kept


@pytest.fixture
def spoil(monkeypatch):
    """Multiply the losses of chosen steps, by NaN for example: ``spoil({step: factor})``."""
    honest = pretraining.step_gradients

    def install(factors: dict[int, float], *, only_once: bool = True) -> None:
        left = dict(factors)

        def spoiled(objective, model, batch, config, step, ranks):
            losses, shares = honest(objective, model, batch, config, step, ranks)
            factor = left.pop(step, 1.0) if only_once else left.get(step, 1.0)
            return {name: loss * factor for name, loss in losses.items()}, shares

        monkeypatch.setattr(pretraining, "step_gradients", spoiled)

    return install


def events_of(run) -> list[tuple[int, str]]:
    return [(line["step"], line["event"]) for line in run.metrics() if "event" in line]


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(small, recorder, tmp_path, spoil):
    spoil({3: math.nan, 7: math.inf})
    run = pretraining.train(small.replace(log_every=5), tmp_path / "run", recorder)
    assert events_of(run) == [(4, "skip"), (8, "skip")]
    assert [line.get("skipped") for line in run.metrics() if "loss" in line] == [1, 1, None, None]
    assert all(math.isfinite(line["loss"]) for line in run.metrics() if "loss" in line)
    assert any("step 4 is skipped (loss nan" in note for note in recorder.notes)
    assert run.newest().step == 20


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(small, quietly, tmp_path, spoil):
    """The run equals one whose schedule never had that step: the same batches but one."""
    spoil({19: math.nan})
    run = quietly(small.replace(checkpoint_every=19), tmp_path / "run")
    folder = run.path / "checkpoints"
    before, after = (checkpoint.read(folder / f"step_{step:08d}") for step in (19, 20))
    for name, tensor in {**before.model(), **before.optimizer()}.items():
        assert torch.equal(tensor, {**after.model(), **after.optimizer()}[name]), name


def test_a_run_is_rolled_back_and_continues_with_a_lower_rate(small, recorder, tmp_path, spoil):
    spoil(dict.fromkeys(range(10, 11 + SKIPS), math.nan))
    run = pretraining.train(small.replace(log_every=1, checkpoint_every=4), tmp_path / "run", recorder)
    assert events_of(run) == [(9, "roll_back")]  # the discarded skips are repeated, successfully this time
    steps = [line["step"] for line in run.metrics() if "loss" in line]
    assert steps == list(range(1, 21))
    rates = {line["step"]: line["learning_rate"] for line in run.metrics() if "loss" in line}
    undisturbed = trainer.learning_rate_factor(14, 20, small.optimizer) * small.optimizer.learning_rate
    assert rates[15] == pytest.approx(undisturbed / 2)
    assert any("back to step 8, with 0.5 of the planned learning rate" in note for note in recorder.notes)
    assert run.newest().state["training"]["ladder"]["roll_backs"] == 1


def test_an_unstable_run_that_was_stopped_ends_as_if_it_had_not_been(small, quietly, tmp_path, spoil):
    """Spikes belong to steps, so a resumed run meets those again that it has not saved."""
    config = small.replace(log_every=1, checkpoint_every=4, steps=30)
    factors = dict.fromkeys((*range(10, 11 + SKIPS), 25), math.nan)
    spoil(factors)
    quietly(config, tmp_path / "through")
    for number, stop in enumerate((9, 12, 14, 26)):
        spoil(factors)
        path = tmp_path / f"stopped-{number}"

        with pytest.raises(InterruptedError):
            pretraining.train(config, path, StopAt(stop))
        newest = checkpoint.latest(path / "checkpoints", pytest.fail)
        spoil({step: value for step, value in factors.items() if step >= newest.step})
        quietly(config, path)
        read = [checkpoint.latest(folder / "checkpoints", pytest.fail) for folder in (path, tmp_path / "through")]
        for name, tensor in read[1].model().items():
            assert torch.equal(tensor, read[0].model()[name]), (stop, name)


def test_a_run_that_cannot_recover_ends_with_one_sentence_and_keeps_a_good_checkpoint(small, recorder, tmp_path, spoil):
    spoil(dict.fromkeys(range(10, 20), math.nan), only_once=False)
    with pytest.raises(UserError, match=r"even after 3 rollbacks .* the newest checkpoint is of step \d"):
        pretraining.train(small.replace(checkpoint_every=4), tmp_path / "run", recorder)
    went = [note.split(",")[0] for note in recorder.notes if note.startswith("back to")]
    assert went == ["back to step 8", "back to step 4", "back to step 4"]  # each time an earlier one, if there is one
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert newest.step == 8  # written again after the rollback
    assert all(torch.isfinite(tensor).all() for tensor in newest.model().values())


def test_a_run_killed_after_a_rollback_does_not_resume_from_what_it_discarded(small, recorder, tmp_path, spoil):
    spoil(dict.fromkeys(range(10, 20), math.nan), only_once=False)

    def pull(step: int) -> None:
        if step == 6 and any(note.startswith("back to step 4") for note in recorder.notes):
            raise InterruptedError

    recorder.step = pull
    with pytest.raises(InterruptedError):
        pretraining.train(small.replace(checkpoint_every=4), tmp_path / "run", recorder)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail).step == 4


def test_overfitting_is_reported_once_and_the_best_is_in_the_state(small, recorder, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.1, 2.2, 2.3, 2.4])

    def validated(*_, **__):
        return {"next_token": {"nats_per_token": next(losses), "bits_per_byte": 1.0, "predicted": 1}}

    monkeypatch.setattr(pretraining, "validate_readouts", validated)
    run = pretraining.train(small.replace(steps=12, validate_every=2), tmp_path / "run", recorder)
    told = [note for note in recorder.notes if "validation loss has been rising since step 4" in note]
    assert len(told) == 1
    best = Best(**run.newest().state["training"]["best"])
    assert (best.step, best.loss, best.worse) == (4, 2.0, 4)
