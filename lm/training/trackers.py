"""Trackers: TensorBoard, Weights & Biases and Trackio, which receive each line of ``metrics.jsonl`` as it is written.

Each is imported only if the setting ``trackers`` names it. ``trackers.json`` in the run directory keeps each tracker's
name of the run, so that a resumed run continues in the same log; a tracker that is added later first receives the
existing lines. If a tracker fails, that is reported once, and training continues without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from lm.config.settings import Config
from lm.runs import metrics_log
from lm.runs.directory import METRICS, plain_settings
from lm.runs.metrics_log import Follower

IDENTITIES = "trackers.json"
PROJECT = "kindling"


@dataclass(frozen=True)
class Tracked:
    """A run, started or resumed at ``step``, as a tracker sees it.

    ``identity`` is the same in every session; ``given`` has the keys (``_key``) of lines sent in earlier sessions.
    """

    path: Path
    identity: str
    step: int
    settings: dict[str, Any]
    given: set[tuple[int, str]]


class TensorBoard:
    """Event files in the run directory's ``tensorboard``; steps that are repeated are purged from them."""

    def __init__(self, run: Tracked) -> None:
        self._folder = run.path / "tensorboard"
        self._open_after(run.step)
        settings = "".join(f"    {name} = {value}\n" for name, value in run.settings.items())
        self._writer.add_text("settings", settings, run.step)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in values_of(line).items():
            if isinstance(value, str):
                self._writer.add_text(name, value, line["step"])
            else:
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()  # a checkpoint of this step may follow, from which the run could be resumed after a crash

    def go_back(self, step: int) -> None:
        self.close()
        self._open_after(step)

    def close(self) -> None:
        self._writer.close()

    def _open_after(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)


class AppendOnly:
    """A run of Weights & Biases or Trackio, whose steps must not decrease: it receives each line once and keeps all."""

    def __init__(self, run: Any, finish: Callable[[], None], given: set[tuple[int, str]]) -> None:
        self._run, self._finish, self._given = run, finish, given
        self._highest = max((step for step, _ in given), default=0)

    def write(self, line: dict[str, Any]) -> None:
        if _key(line) not in self._given:
            self._given.add(_key(line))
            self._highest = max(self._highest, line["step"])  # an event may belong to an earlier step
            self._run.log(values_of(line), step=self._highest)

    def go_back(self, step: int) -> None:
        """Keep the steps that will be repeated as they were; the rollback itself is logged as an event."""

    def close(self) -> None:
        self._finish()


def wandb_run(run: Tracked) -> Follower:
    """``WANDB_MODE=offline`` needs no network, ``WANDB_PROJECT`` names the project."""
    import wandb

    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.path.name,
        id=run.identity,
        resume="allow",
        dir=str(run.path),
        config=run.settings,
        allow_val_change=True,
    )
    return AppendOnly(opened, opened.finish, run.given)


def trackio_run(run: Tracked) -> Follower:
    """Logs to this machine, or to the space ``TRACKIO_SPACE_ID``; ``TRACKIO_PROJECT`` names the project."""
    import trackio

    opened = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{run.path.name}-{run.identity}",
        resume="allow",
        config=run.settings,
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    return AppendOnly(opened, trackio.finish, run.given)


TRACKERS: dict[str, Callable[[Tracked], Follower]] = {
    "tensorboard": TensorBoard,
    "wandb": wandb_run,
    "trackio": trackio_run,
}


def _key(line: dict[str, Any]) -> tuple[int, str]:
    """A line's step and kind."""
    return line["step"], line.get("event") or ("validation" if "validation" in line or "metrics" in line else "loss")


def require(names: Sequence[str]) -> None:
    """Raise UserError if trackers are not installed: a line for each, with the command that installs it."""
    specs = {name: importlib.util.find_spec(name) for name in names}
    # A folder of that name in the current directory is a module too, but without an origin.
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    advice = 'the tracker {0} is not installed: pip install "kindling-lm[{0}]", or train without it'
    if missing:
        raise UserError("\n".join(advice.format(name) for name in missing))


def values_of(line: dict[str, Any]) -> dict[str, float | str]:
    """The values of a line of metrics.jsonl, by the names a tracker shows.

    The means of an interval are under ``train/``, those of a validation under ``validation/``, or if they are of the
    mean of the weights under ``average/validation/``; an event is a text and a rate multiplier under ``event/``.
    """
    if "average" in line:
        own = {name: part for name, part in line.items() if name != "average"}
        return values_of(own) | {f"average/{name}": value for name, value in values_of(line["average"]).items()}
    if "validation" in line:
        return {
            f"validation/{name}/{unit}": value
            for name, found in line["validation"].items()
            for unit, value in found.items()
            if unit not in ("predicted", "images", "pieces")  # how many were measured
        }
    if "metrics" in line:
        return {f"validation/{name}": value for name, value in line["metrics"].items()}
    if "event" in line:
        return {"event/what": f"{line['event']}: {line['reason']}", "event/rate": line["rate"]}
    return {f"train/{name}": value for name, value in line.items() if name != "step"}


class Guarded:
    """A ``Follower`` that opens a tracker, passes lines to it and survives its failure: ``tracker`` is then None."""

    tracker: Follower | None = None

    def __init__(self, name: str, note: Callable[[str], None], run: Tracked) -> None:
        self._name, self._note = name, note
        with self._guard():
            self.tracker = TRACKERS[name](run)

    def write(self, line: dict[str, Any]) -> None:
        with self._guard():
            if self.tracker:
                self.tracker.write(line)

    def go_back(self, step: int) -> None:
        with self._guard():
            if self.tracker:
                self.tracker.go_back(step)

    def close(self) -> None:
        with self._guard():
            if self.tracker:
                self.tracker.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the command's own output
                yield
        except Exception as failure:  # no failure of a tracker may end the run
            self.tracker = None
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            self._note(
                f"the tracker {self._name} failed ({reason}) and is no longer used; {METRICS} still has every line"
            )


def open_trackers(config: Config, path: Path, step: int, note: Callable[[str], None]) -> list[Guarded]:
    """Open the trackers of a run that starts or resumes at ``step``; those that fail are reported to ``note``."""
    try:
        identities = {str(name): str(identity) for name, identity in read_json(path / IDENTITIES).items()}
    except (OSError, ValueError, AttributeError):
        identities = {}
    lines = list(metrics_log.read(path / METRICS))
    opened = []
    for name in dict.fromkeys(config.training.trackers):
        known = name in identities
        given = {_key(line) for line in lines} if known else set()
        run = Tracked(path, identities.get(name) or uuid.uuid4().hex[:8], step, plain_settings(config), given)
        follower = Guarded(name, note, run)
        for line in lines:
            if not known and line["step"] <= step:
                follower.write(line)
        if follower.tracker:
            identities[name] = run.identity
            opened.append(follower)
    if opened:
        write_atomically(path / IDENTITIES, json.dumps(identities, indent=1) + "\n")
    return opened
