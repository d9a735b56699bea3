"""The training loop.

Nothing in it remembers where it is but the step: batches, learning rates, masking and dropout are functions of the seed
and the step, so a run that was killed goes on from its newest checkpoint and ends with the same weights.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from data_prep.errors import UserError
from data_prep.files import only_writer_of, write_atomically
from lm import checkpoint, kernels, randomness
from lm.batches import TrainingBatches
from lm.config import Config, all_settings
from lm.corpora import Corpora, open_corpora
from lm.model import Transformer, describe
from lm.objectives import READOUTS, Batch
from lm.optim import Optimizer, learning_rate_factor
from lm.prefetch import Prefetch
from lm.run_directory import Run, choose_device, open_run
from lm.validation import autocast, validate_readouts

# Settings that a run may be continued with changed: they alter neither the model nor the order of its data.
FREE_SETTINGS = {
    *("steps", "log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints"),
    *("device", "precision", "threads", "micro_batch_rows", "prompts", "fills", "data"),
    "verify_data",
}
# Settings that can never change: the weights, or the meaning of a step, depend on them.
FIXED_SETTINGS = {s.name for s in all_settings() if s.section == "model"} | {
    *("context_length", "batch_tokens", "packing", "seed", "optimizer")
}


class Reporter(Protocol):
    """Who is told how it goes (``lm.report.Progress`` on a terminal)."""

    def note(self, text: str) -> None: ...
    def begin(self, done: int, total: int) -> None: ...
    def step(self, step: int) -> None: ...
    def metrics(self, line: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


@dataclass
class Interval:
    """Sums since the last line of metrics.jsonl; saved with a checkpoint, so that a continued run logs the same."""

    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0

    def add(self, losses: dict[str, torch.Tensor], weights: dict[str, float], gradient_norm: torch.Tensor) -> None:
        self.steps += 1
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(loss)
            self.weights[name] = self.weights.get(name, 0.0) + weights[name]
        self.gradient_norm += float(gradient_norm)

    def means(self) -> dict[str, float]:
        """The mean loss, the mean of each objective, and the mean norm of the gradient."""
        line = {"loss": sum(self.losses.values()) / self.steps}
        if len(self.losses) > 1:
            line |= {f"loss_{name}": loss / self.weights[name] for name, loss in self.losses.items()}
        return line | {"gradient_norm": self.gradient_norm / self.steps}


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


def train(config: Config, path: Path, reporter: Reporter, *, accept_changes: bool = False) -> Run:
    """Train ``config`` in the run directory ``path``, or go on with the run that is there.

    Args:
        accept_changes: continue an existing run although settings that shape its training have changed.

    Raises:
        UserError: the data, the settings and the run directory do not fit together, or the loss is no longer finite.
        SystemExit: stopped by SIGINT or SIGTERM (status 130 or 143), with a checkpoint written.
        OSError: a file could not be written (the disk is full, say); finished checkpoints are untouched.
    """
    corpora = open_corpora(config.data.data)
    if config.data.verify_data:
        corpora.verify()
    config = _with_vocabulary(config, corpora)
    batches = TrainingBatches(corpora, config)
    device = choose_device(config.training.device)
    kernels.describe(device)  # refuses a KINDLING_KERNELS that cannot be had, before anything is written
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    _refuse_other_directories(path)
    path.mkdir(parents=True, exist_ok=True)
    with (
        only_writer_of(path, f"another process is training {path}: wait for it, or choose another --run"),
        told_memory(),
    ):
        start = _open_or_create(config, path, corpora, reporter, accept_changes=accept_changes)
        _train_steps(config, path, corpora, batches, device, start, reporter)
    return Run(path, config)


def _train_steps(
    config: Config,
    path: Path,
    corpora: Corpora,
    batches: TrainingBatches,
    device: torch.device,
    start: checkpoint.Checkpoint | None,
    reporter: Reporter,
) -> None:
    """The loop, from the checkpoint ``start`` to the last step."""
    model = Transformer(config.model).initialise(config.training.seed).to(device)
    optimizer = Optimizer(model, config.optimizer)
    interval, step = Interval(), 0
    if start is not None:
        step = start.step
        model.load_state_dict(start.model())
        optimizer.load_state(start.optimizer())
        interval = Interval(**start.state["interval"])
    _cut_metrics(path / "metrics.jsonl", step)
    if step >= config.training.steps:
        reporter.note(f"{path} is trained: {step:,} of {config.training.steps:,} steps are done")
        return
    for sentence in _introduction(config, corpora, model, batches, device):
        reporter.note(sentence)
    if step:
        reporter.note(f"going on at step {step:,}")

    reporter.begin(step, config.training.steps)
    seconds, timed_steps = 0.0, 0
    try:
        with (
            (path / "metrics.jsonl").open("a", encoding="utf-8") as metrics,
            StopSignal() as stop,
            Prefetch(batches.batch, range(step, config.training.steps)) as upcoming,
        ):
            while step < config.training.steps:
                began = time.perf_counter()
                batch = next(upcoming)
                factor = learning_rate_factor(step, config.training.steps, config.optimizer)
                losses, weights = _gradients(model, batch, config, step)
                gradient_norm = optimizer.clip()
                _refuse_non_finite([*losses.values(), gradient_norm], step, path)
                optimizer.step(factor)
                timed_steps += 1
                interval.add(losses, weights, gradient_norm)
                step += 1
                seconds += time.perf_counter() - began

                last = step == config.training.steps
                if step % config.training.log_every == 0 or last:
                    speed = timed_steps * config.data.batch_tokens / seconds
                    _write_line(metrics, _metrics_line(config, batches, step, factor, interval, speed), reporter)
                    interval, seconds, timed_steps = Interval(), 0.0, 0
                if step % config.training.validate_every == 0 or last:
                    results = validate_readouts(model, corpora, config)
                    validation = {name: result.as_dict() for name, result in results.items()}
                    _write_line(metrics, {"step": step, "validation": validation}, reporter)
                stopping = stop.received  # asked once, so that what is told below is what was saved
                if step % config.training.checkpoint_every == 0 or last or stopping:
                    _refuse_non_finite(list(model.parameters()), step, path)
                    os.fsync(metrics.fileno())
                    _save(path, step, model, optimizer, interval, config, corpora)
                reporter.step(step)
                if stopping:
                    break
    finally:
        reporter.end()
    if stopping and not last:
        reporter.note(f"stopped at step {step:,}, which is saved: the same command goes on from there")
        raise SystemExit(128 + stopping)


def _refuse_non_finite(values: list[torch.Tensor], step: int, path: Path) -> None:
    """Stop before NaN or infinity reaches the weights, the log or a checkpoint."""
    if all(torch.isfinite(value).all() for value in values):
        return
    newest = checkpoint.latest(path / "checkpoints", warn=lambda _: None)
    kept = f"the newest checkpoint is of step {newest.step:,}" if newest else "no checkpoint was written before it"
    raise UserError(
        f"the loss is no longer finite at step {step:,}: begin another run with a lower learning_rate or "
        f"muon_learning_rate; {kept}"
    )


@contextmanager
def told_memory() -> Iterator[None]:
    """Tell an allocation that failed, on any device, in one sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        raise UserError(
            "not enough memory for this model and batch: set micro_batch_rows lower (the result stays the same), "
            "or choose a smaller model"
        ) from None


def _gradients(
    model: Transformer, batch: Batch, config: Config, step: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Compute the gradient of one step's loss, micro-batch by micro-batch; return each objective's loss and its share.

    The batch's weights are normalised over the whole step, so the parts' gradients simply add up: k micro-batches give
    what one big batch gives.
    """
    model.zero_grad()
    device = next(model.parameters()).device
    readouts = READOUTS[config.objective.objective]
    names = {False: readouts[0], True: readouts[-1]}
    rows = len(batch.masked)
    shares = {names[m]: float((batch.masked == m).sum()) / rows for m in (False, True) if (batch.masked == m).any()}
    losses = {name: torch.zeros((), device=device) for name in shares}
    for first in range(0, rows, config.data.micro_batch_rows or rows):
        part = batch.rows(first, first + (config.data.micro_batch_rows or rows))
        if config.model.dropout:
            torch.manual_seed(randomness.key(config.training.seed, 5, step, first) >> 1)
        causal = int((~part.masked).sum())  # the causal rows come first
        part = part.to(device)
        with autocast(device, config.training.precision):
            hidden = model(part.inputs, part.positions, part.lo, part.hi)
            parts = [
                (names[is_masked], model.loss(hidden[which], part.targets[which], part.loss_weights[which]))
                for is_masked, which in ((False, slice(0, causal)), (True, slice(causal, None)))
                if len(part.masked[which])
            ]
        torch.stack([loss for _, loss in parts]).sum().backward()
        for name, loss in parts:
            losses[name] += loss.detach()
    return losses, shares


def _with_vocabulary(config: Config, corpora: Corpora) -> Config:
    asked = config.model.vocab_size
    if asked and asked < corpora.vocab_size:
        raise UserError(
            f"vocab_size {asked} is smaller than the tokenizer of {corpora.name}, which has {corpora.vocab_size}"
        )
    return config.replace(vocab_size=asked or corpora.vocab_size)


def _refuse_other_directories(path: Path) -> None:
    """A run goes into a new or empty directory, or into its own (which may have been killed while it was made)."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another --run")
    own = {f"{name}{ending}" for name in ("config.toml", "tokenizer.json") for ending in ("", ".tmp")}
    if path.exists() and not (path / "config.toml").exists() and {p.name for p in path.iterdir()} - own:
        raise UserError(f"{path} is not empty and is not a run directory: choose another --run")


def _open_or_create(
    config: Config, path: Path, corpora: Corpora, reporter: Reporter, *, accept_changes: bool
) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, if there is one; the directory's files are only written when everything fits."""
    newest = None
    if (path / "config.toml").exists():
        before = open_run(path)
        newest = before.latest(reporter.note)
        if newest is not None:
            _check_continuation(before.config, config, newest.state, corpora, path, accept_changes=accept_changes)
    corpora.tokenizer.save(path / "tokenizer.json")
    config.save(path / "config.toml")
    return newest


def _check_continuation(
    old: Config, new: Config, state: dict[str, Any], corpora: Corpora, path: Path, *, accept_changes: bool
) -> None:
    if state["data_fingerprint"] != corpora.fingerprint:
        raise UserError(
            f"{path} was trained on other data than {corpora.name} holds now: choose another --run, or restore the data"
        )
    before, now = old.flat(), new.flat()
    blocking = {name for name in before if before[name] != now[name]} - FREE_SETTINGS
    if accept_changes:
        blocking &= FIXED_SETTINGS
    if blocking:
        told = ", ".join(f"{name} {before[name]!r} (now {now[name]!r})" for name in sorted(blocking))
        mend = (
            "choose another --run"
            if blocking & FIXED_SETTINGS
            else "choose another --run, or add --resume to change it"
        )
        raise UserError(f"{path} was begun with {told}: {mend}")


def _save(
    path: Path,
    step: int,
    model: Transformer,
    optimizer: Optimizer,
    interval: Interval,
    config: Config,
    corpora: Corpora,
) -> None:
    state = {
        "interval": asdict(interval),
        "data_fingerprint": corpora.fingerprint,
        "tokenizer_sha256": corpora.tokenizer.sha256,
        "torch": torch.__version__,
    }
    checkpoint.save(
        path / "checkpoints", step, model.state_dict(), optimizer.state(), state, config.training.keep_checkpoints
    )


def _introduction(
    config: Config, corpora: Corpora, model: Transformer, batches: TrainingBatches, device: torch.device
) -> list[str]:
    """What a person wants to know before the first step."""
    training, data = config.training, config.data
    tokens = training.steps * data.batch_tokens
    flops = tokens * model.flops_per_token(data.context_length)
    where = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return [
        describe(model),
        f"{config.objective.objective} on {batches.tokens:,} tokens of {corpora.name}: "
        f"{training.steps:,} steps x {data.batch_tokens:,} tokens = {tokens / 1e6:.1f}M tokens, "
        f"{batches.epochs(training.steps):.2f} epochs, {flops / 1e12:.1f} TFLOP",
        *batches.introduction(training.steps),
        f"on {where}; {kernels.describe(device)}",
    ]


def _metrics_line(
    config: Config, batches: TrainingBatches, step: int, factor: float, interval: Interval, speed: float
) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * config.data.batch_tokens,
        "epoch": round(batches.epochs(step), 6),
        **interval.means(),
        "learning_rate": factor * config.optimizer.learning_rate,
        "tokens_per_second": round(speed, 1),
    }


def _write_line(file: Any, line: dict[str, Any], reporter: Reporter) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
    reporter.metrics(line)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``: the steps they tell of will be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    write_atomically(path, "".join(kept))
