"""The training loop of pretraining and fine-tuning, which differ in one object, the ``TrainModule``.

The loop's position is the step, nothing else: batches, learning rates, masking and dropout are functions of the seed
and the step, so a run that was killed resumes from its newest checkpoint and ends with the same weights.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.files import LOCK, only_writer_of
from lm import kernels
from lm.config.settings import Config, TrainingConfig
from lm.data.prefetch import prefetch
from lm.model.device import available_memory, is_out_of_memory, keep_freed_memory, peak_memory
from lm.objectives.objective import Objective, restore
from lm.runs import checkpoint
from lm.runs.checkpoint_writer import CheckpointWriter, load_trained, trained_tensors
from lm.runs.directory import CHECKPOINTS, METRICS
from lm.runs.metrics_log import Best, Interval, MetricsLog
from lm.runs.resume import fingerprints, open_or_create, refuse_other_directories
from lm.runs.slice_writer import SliceWriter
from lm.training import trackers
from lm.training.distributed import CPU, Ranks, joined
from lm.training.optimizer import Optimizer, learning_rate_factor, momentum_at, weight_decay_factor
from lm.training.reporter import NullReporter, Reporter
from lm.training.stability import ROLL_BACKS, Ladder, Outcome, Verdict
from lm.training.train_module import Batch, TrainModule
from lm.training.weight_average import WeightAverage, is_averaged


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step is finished and saved; the second one kills.

    ``once``: it kills only a process that nothing else looks after. torchrun passes on a signal that its processes may
    have had already (from SLURM), and kills them itself if they take too long.
    """

    def __init__(self, *, once: bool = True) -> None:
        self.received: int | None = None
        self.once = once

    def __enter__(self) -> StopSignal:
        try:
            self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which then handles signals
            self.previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if not self.once:
            return
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def fit(
    open_module: Callable[[Ranks], TrainModule[Any]],
    settings: TrainingConfig,
    path: Path,
    reporter: Reporter,
    *,
    accept_changes: bool = False,
) -> Config:
    """Train a module in the run directory ``path``, or resume the run that is there; return its final settings.

    Arguments and errors as of ``pretraining.train``; ``open_module`` opens the module for a rank and writes nothing.
    """
    with joined(settings) as ranks, ExitStack() as held, explain_out_of_memory():
        trackers.require(settings.trackers)
        ranks.on_main(partial(refuse_other_directories, path))
        module = open_module(ranks)
        kernels.describe(ranks.device)  # refuses an unavailable KINDLING_KERNELS before anything is written

        def begin() -> checkpoint.Checkpoint | None:
            path.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training {path}: wait for it, or choose another --run"
            held.enter_context(only_writer_of(path / LOCK, busy))
            return open_or_create(
                module.config, path, module, ranks.device, reporter.note, accept_changes=accept_changes
            )

        if ranks.device.type == "cpu":
            keep_freed_memory()
        start = ranks.on_main(begin)
        Trainer(module, path, ranks, reporter if ranks.is_main else NullReporter()).run(start)
        return module.config


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error, on any device, into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory for this model and batch: set micro_batch_rows lower, in fine-tuning "
            "micro_batch_tokens (the result stays the same), or choose a smaller model"
        ) from None


def decides_on_device(ranks: Ranks, objective: Objective | None) -> bool:
    """Whether a GPU itself decides to skip a step, so that it need not wait for the CPU to read its loss.

    Several processes have to agree first, and what an objective's memory does after a step is not undone by a skip.
    """
    return ranks.device.type == "cuda" and ranks.world == 1 and (objective is None or objective.memory is None)


@dataclass
class State:
    """What changes while a run trains, besides tensors; saved with every checkpoint."""

    step: int = 0
    interval: Interval = field(default_factory=Interval)
    ladder: Ladder = field(default_factory=Ladder)
    best: Best = field(default_factory=Best)
    averaged: int = 0  # steps in the mean of the weights

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint | None) -> State:
        """The state of a checkpoint; None: that of step 0."""
        if saved is None:
            return cls(best=Best(breaks_ties=True))
        parts = saved.state["training"]
        state = cls(saved.step, Interval(**parts["interval"]), Ladder(**parts["ladder"]), Best(**parts["best"]))
        state.averaged = parts.get("averaged", 0)  # earlier versions kept no mean
        return state


class Trainer(Generic[Batch]):
    """One run while it trains.

    Attributes:
        model, optimizer, average, state: what a checkpoint saves, along with the objective's state; set by
            ``_restore``. ``average`` is None without ``average_last``.
        log, stop, writer: open while the run trains; set by ``run``.
        gathered: what the writer takes of tensors, whole or in slices (``Ranks.gathered``, ``Ranks.slices``).
        unread: the last step's outcome if the device has decided on it and the verdict is not known here yet.
        seconds: how long each step took since the last line of the log, without the time between the steps.
    """

    model: nn.Module
    optimizer: Optimizer
    average: WeightAverage | None
    state: State
    log: MetricsLog
    stop: StopSignal
    writer: CheckpointWriter
    gathered: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def __init__(self, module: TrainModule[Batch], path: Path, ranks: Ranks, reporter: Reporter) -> None:
        self.module, self.path, self.ranks, self.reporter = module, path, ranks, reporter
        self.folder, self.ended = path / CHECKPOINTS, False
        self.unread: Outcome | None = None
        self.seconds: list[float] = []

    @property
    def config(self) -> Config:
        return self.module.config

    def run(self, start: checkpoint.Checkpoint | None) -> None:
        """Train from the checkpoint ``start`` (None: from step 0) to the last step."""
        steps, state = self.config.training.steps, State.of(start)
        if state.step >= steps or self.module.should_stop(state.best):
            self.reporter.note(f"{self.path} is trained: {state.step:,} of {steps:,} steps are done")
            return
        asked, lines = self.config, self.module.prepare(state.step)
        if self.config != asked:  # what the module decided: a resumed run must add up the same sums
            self.config.save(self.path / "config.toml")
        for line in lines:
            self.reporter.note(line)
        self._restore(start)
        if self.state.step:
            self.reporter.note(f"resuming at step {self.state.step:,}")
        followers, main = [], self.ranks.is_main
        if main:
            followers = trackers.open_trackers(self.config, self.path, self.state.step, self.reporter.note)
        self.reporter.begin(self.state.step, steps)
        try:
            with (
                MetricsLog(self.path / METRICS if main else None, self.state.step, followers) as self.log,
                StopSignal(once=self.ranks.world == 1) as self.stop,
                self._checkpoint_writer() as self.writer,
            ):
                while not self.ended:
                    self._train_on()
        finally:
            self.reporter.end()

    def _checkpoint_writer(self) -> CheckpointWriter:
        """Where FSDP is used, one that writes slices if ``sharded_checkpoints`` says so; the same kind on all ranks."""
        training, ranks = self.config.training, self.ranks
        keep = checkpoint.Retention(training.keep_checkpoints, training.keep_every)
        sliced = training.sharded_checkpoints == "always"
        if training.sharded_checkpoints == "auto":  # weights and two moments, once gathered and once copied
            whole = 6 * sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
            sliced = ranks.on_main(lambda: whole > available_memory(CPU) / 2)
        if sliced and ranks.world > 1 and training.parallel == "fsdp":
            self.gathered = ranks.slices
            return SliceWriter(self.folder, keep, self.state.step, self.log.sync, ranks)
        self.gathered = ranks.gathered
        return CheckpointWriter(self.folder if ranks.is_main else None, keep, self.state.step, self.log.sync)

    def _restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Take weights, optimizer and state from a checkpoint; None: those of step 0, which follow from the seed."""
        objective = self.module.objective
        self.model = self.module.model()
        if saved is not None:
            load_trained(self.model, saved.model())
        if objective is not None:
            restore(objective, self.model, saved.objective() if saved else {})
        self.ranks.spread(self.model, objective)
        multipliers = self.module.lr_multipliers(self.model)
        self.optimizer = Optimizer(self.model, self.config.optimizer, self.ranks, multipliers)
        if saved is not None:
            self.optimizer.load_state(saved.optimizer())
        self.state = State.of(saved)
        self.average = WeightAverage(self.model, self.ranks) if self.config.training.average_last else None
        if self.average is None:
            self.state.averaged = 0
        elif saved is not None and self.state.averaged:
            self.average.load_state(saved.average().model())

    def _train_on(self) -> None:
        """Steps, until the last one or until a rollback restarts the batches."""
        with prefetch(self.module.batch, range(self.state.step, self.config.training.steps)) as upcoming:
            began = time.perf_counter()
            for batch in upcoming:
                if not self._step(batch):
                    return
                self.seconds.append(time.perf_counter() - began)
                if not self._after_step():
                    return
                self.reporter.step(self.state.step)
                if self.ended:
                    return
                began = time.perf_counter()

    def _step(self, batch: Batch) -> bool:
        """One optimizer step; False: the run was rolled back instead.

        Where the device decides, the verdict on a step is read when the passes of the next one are queued, or when
        something is due after it: of the same numbers, and before the next update, so the run is the same.
        """
        state, objective = self.state, self.module.objective
        outcome = Outcome(state.step, *self.module.gradients(self.model, batch, state.step), self.optimizer.clip())
        if not self._settled():
            return False
        if decides_on_device(self.ranks, objective):
            self._update(outcome.skip(state.ladder.limit(self.config.optimizer.spike_threshold)))
            self.unread = outcome
        else:
            verdict = self._judge(outcome)
            if verdict in (Verdict.ROLL_BACK, Verdict.ABORT):
                return False
            if verdict is Verdict.APPLY:
                self._update()
        state.step += 1
        if self.average is not None:
            due = is_averaged(state.step, self.config.training.steps, self.config.training.average_last)
            state.averaged = state.averaged + 1 if due else 0
            if due:
                self.average.add(state.averaged)
        return not self._is_due() or self._settled()

    def _update(self, skip: Tensor | None = None) -> None:
        """Change the weights; ``skip`` as of ``Optimizer.step``."""
        config, step = self.config, self.state.step
        position = (step, config.training.steps, config.optimizer)
        self.optimizer.step(self._rate(step), weight_decay_factor(*position), momentum_at(*position), skip)
        if self.module.objective is not None:
            self.module.objective.after_step(self.model, step)

    def _settled(self) -> bool:
        """Read the verdict on the last step, if it is unread; False: the run was rolled back."""
        outcome, self.unread = self.unread, None
        return outcome is None or self._judge(outcome) not in (Verdict.ROLL_BACK, Verdict.ABORT)

    def _judge(self, outcome: Outcome) -> Verdict:
        """Judge a step, count or report it, and roll back if that is the verdict."""
        state = self.state
        losses, gradient_norm = outcome.read()
        loss = sum(losses.values())
        verdict = state.ladder.judge(loss, gradient_norm, self.config.optimizer.spike_threshold)
        if verdict in (Verdict.ROLL_BACK, Verdict.ABORT):
            self._roll_back(verdict, outcome.step + 1)
        elif verdict is Verdict.APPLY:
            state.interval.add(losses, outcome.shares, gradient_norm)
        else:
            state.interval.skipped += 1
            self._report(verdict, outcome.step + 1, f"loss {loss:.3f}, gradient norm {gradient_norm:.3g}")
        return verdict

    def _is_due(self) -> bool:
        """Whether a line of the log, a validation, a checkpoint or the end comes after the last step."""
        training, step = self.config.training, self.state.step
        every = (training.log_every, training.validate_every, training.checkpoint_every)
        return step == training.steps or any(step % number == 0 for number in every)

    def _after_step(self) -> bool:
        """What is due after a step: a line of the log, a validation, a checkpoint, an end; False as of ``_step``."""
        self.writer.check()
        training, step = self.config.training, self.state.step
        last, best = step == training.steps, False
        if (step % training.log_every == 0 or last) and self.state.interval.steps:
            self._write(self._metrics_line())
            self.state.interval = Interval()
        if step % training.validate_every == 0 or last:
            best = self._validate()
            last = last or self.module.should_stop(self.state.best)
        # Read once, so that the report below matches what was saved; a signal to one rank stops all.
        stopping = self.ranks.highest(self.stop.received or 0)
        if stopping and not self._settled():
            return False
        due = (step % training.checkpoint_every == 0 or last) and not self.state.ladder.in_trouble
        wanted = due or best or last
        sound = bool(wanted or stopping) and self._is_finite()
        if wanted and not sound:
            self._roll_back(self.state.ladder.roll_back(), step + 1)
            return False
        if sound:
            self._save(scheduled=due)
        if stopping and not last:
            self.writer.wait()
            self.reporter.step(step)
            saved = f"step {step:,}, which is saved" if sound else f"step {step:,}, with weights that are not finite"
            self.reporter.note(f"stopped at {saved}: the same command resumes from the newest checkpoint")
            raise SystemExit(128 + stopping)
        self.ended = last
        return True

    def _is_finite(self) -> bool:
        """Whether all weights are finite, on all ranks."""
        own = all(torch.isfinite(self.ranks.local(parameter)).all() for parameter in self.model.parameters())
        return not self.ranks.highest(not own)

    def _rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        schedule = learning_rate_factor(step, self.config.training.steps, self.config.optimizer)
        return schedule * self.state.ladder.rate

    def _metrics_line(self) -> dict[str, Any]:
        step, seconds, self.seconds = self.state.step, self.seconds, []
        return {
            "step": step,
            **self.module.progress(step),
            **self.state.interval.means(),
            "learning_rate": self._rate(step - 1) * self.config.optimizer.learning_rate,
            **self.module.throughput(sum(seconds) / len(seconds)),
            "memory_bytes": peak_memory(self.ranks.device),
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.log.write(line)
        self.reporter.metrics(line)

    def _validate(self) -> bool:
        """Log a validation; return True if it is the best so far."""
        line, score, tie = self._validated()
        averaged = False
        if self.average is not None and self.state.averaged > 1:
            with self.average.swapped():
                found, *others = self._validated()
            line["average"] = {name: found[name] for name in ("validation", "metrics") if name in found}
            if averaged := score is not None and (others[0], others[1] or 0.0) < (score, tie or 0.0):
                score, tie = others
        self._write({"step": self.state.step, **line})
        improved = score is not None and self.state.best.add(self.state.step, score, tie, averaged=averaged)
        if remark := self.module.remark(self.state.step, line, self.state.best):
            self.reporter.note(remark)
        return improved

    def _validated(self) -> tuple[dict[str, Any], float | None, float | None]:
        """What ``TrainModule.validate`` gives, and the loss that decides between equal scores."""
        line, score = self.module.validate(self.model)
        self.ranks.reshard()
        return line, score, line.get("metrics", {}).get("loss")

    def _save(self, *, scheduled: bool) -> None:
        memory = self.module.objective.memory if self.module.objective else None
        others = {checkpoint.OBJECTIVE: self.gathered(memory.state_dict())} if memory else {}
        if self.average is not None and self.state.averaged:
            others[checkpoint.AVERAGE] = self.gathered(self.average.means)
        state = {name: part for name, part in asdict(self.state).items() if name != "step"}
        self.writer.save(
            self.state.step,
            self.gathered(trained_tensors(self.model)),
            self.gathered(self.optimizer.state()),
            {"training": state, **fingerprints(self.config, self.module, self.ranks.device)},
            scheduled=scheduled,
            best_step=self.state.best.step,
            others=others,
        )

    def _roll_back(self, verdict: Verdict, reached: int) -> None:
        """Return to a checkpoint from before the trouble, to an earlier one each time; UserError if too often."""
        ladder = self.state.ladder
        self.writer.wait()
        before = ladder.went_back_to if ladder.went_back_to >= 0 else None
        target = self.ranks.on_main(lambda: checkpoint.to_go_back_to(self.folder, self.reporter.note, before))
        if verdict is Verdict.ABORT:
            kept = f"the newest checkpoint is of step {target.step:,}" if target else "there is no earlier checkpoint"
            raise UserError(
                f"the loss is not finite, or far too high, at step {reached:,}, even after {ROLL_BACKS} rollbacks "
                f"with lower learning rates: start another run with a lower learning_rate or muon_learning_rate; {kept}"
            )
        self._restore(target)
        self.state.ladder = ladder
        ladder.went_back_to = self.state.step
        if self.ranks.is_main:
            checkpoint.remove_after(self.folder, self.state.step)
        self.log.go_back(self.state.step)
        self._report(verdict, self.state.step + 1, f"the steps up to {reached:,} went wrong")

    def _report(self, verdict: Verdict, step: int, why: str) -> None:
        """Log trouble as an event of a step, from 1."""
        rate = self.state.ladder.rate
        words = {
            Verdict.SKIP: f"step {step:,} is skipped ({why})",
            Verdict.LOWER: f"step {step:,} is skipped too ({why}); training continues at {rate:g} of the planned "
            "learning rate",
            Verdict.ROLL_BACK: f"back to step {step - 1:,}, with {rate:g} of the planned learning rate: {why}",
        }
        self.log.write({"step": step, "event": verdict.value, "rate": rate, "reason": why})
        self.reporter.note(words[verdict])
