"""The training loop, of pretraining and of fine-tuning: what differs between them is one object, the ``TrainModule``.

Nothing in it remembers where it is but the step: batches, learning rates, masking and dropout are functions of the seed
and the step, so a run that was killed goes on from its newest checkpoint and ends with the same weights.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic

import torch

from data_prep.errors import UserError
from data_prep.files import only_writer_of
from lm import kernels
from lm.config.settings import Config, TrainingConfig
from lm.data.prefetch import Prefetch
from lm.model.device import is_out_of_memory, keep_freed_memory, peak_memory
from lm.runs import checkpoint
from lm.runs.checkpoint_writer import Saver, load_trained, trained_tensors
from lm.runs.directory import CHECKPOINTS, METRICS
from lm.runs.metrics_log import Best, Interval, MetricsLog
from lm.runs.resume import fingerprints, open_or_create, refuse_other_directories
from lm.training import trackers
from lm.training.distributed import Ranks, joined
from lm.training.optimizer import Optimizer, learning_rate_factor
from lm.training.reporter import NullReporter, Reporter
from lm.training.stability import ROLL_BACKS, Ladder, Verdict
from lm.training.train_module import Batch, TrainModule


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step ends and is saved; the second one kills."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignal:
        try:
            self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever runs this handles signals
            self.previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def carry_out(
    open_work: Callable[[Ranks], TrainModule[Any]],
    settings: TrainingConfig,
    path: Path,
    reporter: Reporter,
    *,
    accept_changes: bool = False,
) -> Config:
    """Do a work in the run directory ``path``, or go on with what was begun there; returns its settled settings.

    Arguments and errors as of ``train``; ``open_work`` opens the work for a rank, and writes nothing.
    """
    with joined(settings) as ranks, ExitStack() as held, told_memory():
        work = open_work(ranks)
        kernels.describe(ranks.device)  # refuses a KINDLING_KERNELS that cannot be had, before anything is written
        trackers.require(settings.trackers)

        def begin() -> checkpoint.Checkpoint | None:
            refuse_other_directories(path)
            path.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training {path}: wait for it, or choose another --run"
            held.enter_context(only_writer_of(path, busy))
            return open_or_create(work.config, path, work, ranks.device, reporter.note, accept_changes=accept_changes)

        if ranks.device.type == "cpu":
            keep_freed_memory()
        start = ranks.on_main(begin)
        Training(work, path, ranks, reporter if ranks.is_main else NullReporter()).run(start)
        return work.config


@contextmanager
def told_memory() -> Iterator[None]:
    """Tell an allocation that failed, on any device, in one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory for this model and batch: set micro_batch_rows lower, in fine-tuning "
            "micro_batch_tokens (the result stays the same), or choose a smaller model"
        ) from None


@dataclass
class State:
    """All that changes while a run trains, beside weights and optimizer; saved as JSON with every checkpoint."""

    step: int = 0
    interval: Interval = field(default_factory=Interval)
    ladder: Ladder = field(default_factory=Ladder)
    best: Best = field(default_factory=Best)

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> State:
        parts = saved.state["training"]
        return cls(saved.step, Interval(**parts["interval"]), Ladder(**parts["ladder"]), Best(**parts["best"]))

    def as_dict(self) -> dict[str, Any]:
        return {name: part for name, part in asdict(self).items() if name != "step"}


class StepClock:
    """Measures steps, and leaves out what lies between them."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.began
        self.steps += 1

    def seconds_per_step(self) -> float:
        """The mean since it was last asked."""
        mean = self.seconds / self.steps
        self.steps, self.seconds = 0, 0.0
        return mean


class Training(Generic[Batch]):
    """A run under way: the loop and what it works on."""

    def __init__(self, work: TrainModule[Batch], path: Path, ranks: Ranks, reporter: Reporter) -> None:
        self.work, self.path, self.ranks, self.reporter = work, path, ranks, reporter
        self.folder, self.clock = path / CHECKPOINTS, StepClock()

    @property
    def config(self) -> Config:
        return self.work.config

    def run(self, start: checkpoint.Checkpoint | None) -> None:
        """Train from the checkpoint ``start`` (None: from nothing) to the last step."""
        steps, state = self.config.training.steps, State.of(start) if start else State()
        if state.step >= steps or self.work.should_stop(state.best):
            self.reporter.note(f"{self.path} is trained: {state.step:,} of {steps:,} steps are done")
            return
        self._prepare(state.step)
        self._restore(start)
        if self.state.step:
            self.reporter.note(f"going on at step {self.state.step:,}")
        followers = []
        if self.ranks.is_main:
            followers = trackers.open_trackers(self.config, self.path, self.state.step, self.reporter.note)
        self.reporter.begin(self.state.step, steps)
        keep = checkpoint.Retention(self.config.training.keep_checkpoints, self.config.training.keep_every)
        self.ended = False
        try:
            main = self.ranks.is_main
            with (
                MetricsLog(self.path / METRICS if main else None, self.state.step, followers) as self.log,
                StopSignal() as self.stop,
                Saver(self.folder if main else None, keep, self.state.step, self.log.sync) as self.saver,
            ):
                while not self.ended:
                    self._train_on()
        finally:
            self.reporter.end()

    def _prepare(self, done: int) -> None:
        """Have the work get ready, and keep what it settled: a continued run adds up the same sums."""
        asked = self.config
        told = self.work.prepare(done)
        if self.config != asked:
            self.config.save(self.path / "config.toml")
        for sentence in told:
            self.reporter.note(sentence)

    def _restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Weights, optimizer and state of a checkpoint; None: those of step 0, which follow from the seed."""
        self.model = self.work.model()
        if saved is not None:
            load_trained(self.model, saved.model())
        self.ranks.spread(self.model)
        self.optimizer = Optimizer(self.model, self.config.optimizer, self.ranks, self.work.lr_multipliers(self.model))
        self.state = State()
        if saved is not None:
            self.optimizer.load_state(saved.optimizer())
            self.state = State.of(saved)

    def _train_on(self) -> None:
        """Steps, until the last one or until the run was taken back and needs its batches again."""
        with Prefetch(self.work.batch, range(self.state.step, self.config.training.steps)) as upcoming:
            self.clock.start()
            for batch in upcoming:
                if not (self._step(batch) and self._after_step()):
                    return
                self.reporter.step(self.state.step)
                if self.ended:
                    return
                self.clock.start()

    def _step(self, batch: Batch) -> bool:
        """One optimizer step; False: the run was taken back instead."""
        config, state = self.config, self.state
        losses, shares = self.work.gradients(self.model, batch, state.step)
        gradient_norm = self.optimizer.clip()
        loss = sum(float(loss) for loss in losses.values())
        verdict = state.ladder.judge(loss, float(gradient_norm), config.optimizer.spike_threshold)
        if verdict in (Verdict.ROLL_BACK, Verdict.GIVE_UP):
            self._go_back(verdict)
            return False
        if verdict is Verdict.APPLY:
            self.optimizer.step(self._rate(state.step))
            state.interval.add(losses, shares, gradient_norm)
        else:
            state.interval.skipped += 1
            self._tell(verdict, f"loss {loss:.3f}, gradient norm {float(gradient_norm):.3g}")
        state.step += 1
        self.clock.stop()
        return True

    def _after_step(self) -> bool:
        """What is due after a step: a line of the log, a validation, a checkpoint, an end; False as in ``_step``."""
        self.saver.check()
        training, step = self.config.training, self.state.step
        last, best = step == training.steps, False
        if (step % training.log_every == 0 or last) and self.state.interval.steps:
            self._write(self._metrics_line())
            self.state.interval = Interval()
        if step % training.validate_every == 0 or last:
            best = self._validate()
            last = last or self.work.should_stop(self.state.best)
        # Asked once, so that what is told below is what was saved; a signal to one rank stops all.
        stopping = self.ranks.highest(self.stop.received or 0)
        due = (step % training.checkpoint_every == 0 or last) and not self.state.ladder.in_trouble
        wanted = due or best or last
        sound = bool(wanted or stopping) and self._is_finite()
        if wanted and not sound:
            self._go_back(self.state.ladder.broken())
            return False
        if sound:
            self._save(scheduled=due)
        if stopping and not last:
            self.saver.wait()
            self.reporter.step(step)
            saved = f"step {step:,}, which is saved" if sound else f"step {step:,}, with weights that are not finite"
            self.reporter.note(f"stopped at {saved}: the same command goes on from the newest checkpoint")
            raise SystemExit(128 + stopping)
        self.ended = last
        return True

    def _is_finite(self) -> bool:
        """Whether the weights are, those of all ranks."""
        own = (self.ranks.local(parameter) for parameter in self.model.parameters())
        return not self.ranks.highest(not all(torch.isfinite(tensor).all() for tensor in own))

    def _rate(self, step: int) -> float:
        """Learning rate of a step as a share of its peak."""
        schedule = learning_rate_factor(step, self.config.training.steps, self.config.optimizer)
        return schedule * self.state.ladder.rate

    def _metrics_line(self) -> dict[str, Any]:
        step = self.state.step
        return {
            "step": step,
            **self.work.progress(step),
            **self.state.interval.means(),
            "learning_rate": self._rate(step - 1) * self.config.optimizer.learning_rate,
            **self.work.throughput(self.clock.seconds_per_step()),
            "memory_bytes": peak_memory(self.ranks.device),
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.log.write(line)
        self.reporter.metrics(line)

    def _validate(self) -> bool:
        """Log a validation; is it the best so far?"""
        line, judged_by = self.work.validate(self.model)
        self._write({"step": self.state.step, **line})
        if judged_by is None:
            return False
        improved = self.state.best.add(self.state.step, judged_by)
        if remark := self.work.remark(self.state.best):
            self.reporter.note(remark)
        return improved

    def _save(self, *, scheduled: bool) -> None:
        """Have a checkpoint written."""
        self.saver.save(
            self.state.step,
            self.ranks.gathered(trained_tensors(self.model)),
            self.ranks.gathered(self.optimizer.state()),
            {"training": self.state.as_dict(), **fingerprints(self.config, self.work, self.ranks.device)},
            scheduled=scheduled,
            best_step=self.state.best.step,
        )

    def _go_back(self, verdict: Verdict) -> None:
        """Take the run back to a checkpoint from before the trouble, each time to an earlier one, or end it.

        Raises:
            UserError: it was taken back too often.
        """
        ladder, reached = self.state.ladder, self.state.step + 1
        self.saver.wait()
        before = ladder.went_back_to if ladder.went_back_to >= 0 else None
        target = self.ranks.on_main(lambda: checkpoint.to_go_back_to(self.folder, self.reporter.note, before))
        if verdict is Verdict.GIVE_UP:
            kept = f"the newest checkpoint is of step {target.step:,}" if target else "there is no checkpoint before it"
            raise UserError(
                f"the loss is no longer finite, or far too high, at step {reached:,}, also after going back "
                f"{ROLL_BACKS} times with lower rates: begin another run with a lower learning_rate or "
                f"muon_learning_rate; {kept}"
            )
        self._restore(target)
        self.state.ladder = ladder
        ladder.went_back_to = self.state.step
        if self.ranks.is_main:
            checkpoint.remove_after(self.folder, self.state.step)
        self.log.go_back(self.state.step)
        self._tell(verdict, f"the steps up to {reached:,} went wrong")

    def _tell(self, verdict: Verdict, why: str) -> None:
        """Log trouble, as an event of the step under way."""
        step, rate = self.state.step + 1, self.state.ladder.rate
        words = {
            Verdict.SKIP: f"step {step:,} is left out ({why})",
            Verdict.LOWER: f"step {step:,} is left out too ({why}); the learning rate goes on at {rate:g} of its plan",
            Verdict.ROLL_BACK: f"back to step {step - 1:,}, with {rate:g} of the planned learning rate: {why}",
        }
        self.log.write({"step": step, "event": verdict.value, "rate": rate, "reason": why})
        self.reporter.note(words[verdict])
