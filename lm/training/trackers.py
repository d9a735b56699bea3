"""Trackers: TensorBoard, Weights & Biases and Trackio, given each line of ``metrics.jsonl`` as it is written.

Each is imported only when the setting ``trackers`` names it. What a tracker calls a run is kept in the run directory
(``trackers.json``), so that a continued run goes on in the same log; one that is asked for later is first given the
lines that are there already. The file is the record: a tracker that fails is told of once and left out, and the
training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from lm.config.settings import Config
from lm.runs import metrics_log
from lm.runs.directory import METRICS

IDENTITIES = "trackers.json"
PROJECT = "kindling"
Values = dict[str, float | str]


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker sees it, going on from ``step``.

    ``identity`` is the same in every session; ``given`` names the lines (``_key``) that earlier sessions gave it.
    """

    path: Path
    identity: str
    step: int
    settings: dict[str, Any]
    given: set[tuple[int, str]]


class Tracker(Protocol):
    """One tracker's log of one run."""

    def write(self, line: dict[str, Any]) -> None: ...
    def go_back(self, step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run directory's ``tensorboard``; what is done again is purged from them."""

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
        self._writer.flush()  # a checkpoint of this step may follow: the run could go on from it after a crash

    def go_back(self, step: int) -> None:
        self.close()
        self._open_after(step)

    def close(self) -> None:
        self._writer.close()

    def _open_after(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)


class Rising:
    """A run of Weights & Biases or Trackio, whose steps only rise: it is given each line once and takes none back."""

    def __init__(self, run: Any, finish: Callable[[], None], given: set[tuple[int, str]]) -> None:
        self._run, self._finish, self._given = run, finish, given
        self._highest = max((step for step, _ in given), default=0)

    def write(self, line: dict[str, Any]) -> None:
        if _key(line) not in self._given:
            self._given.add(_key(line))
            self._highest = max(self._highest, line["step"])  # an event may tell of a step before
            self._run.log(values_of(line), step=self._highest)

    def go_back(self, step: int) -> None:
        """The steps that are done again show as they were at first; the event of going back is there."""

    def close(self) -> None:
        self._finish()


def wandb_run(run: Tracked) -> Tracker:
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
    return Rising(opened, opened.finish, run.given)


def trackio_run(run: Tracked) -> Tracker:
    """On this machine, unless ``TRACKIO_SPACE_ID`` says where; ``TRACKIO_PROJECT`` names the project."""
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
    return Rising(opened, trackio.finish, run.given)


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": wandb_run,
    "trackio": trackio_run,
}


def _key(line: dict[str, Any]) -> tuple[int, str]:
    """What names a line: its step and what kind of line it is."""
    return line["step"], line.get("event") or ("validation" if "validation" in line or "metrics" in line else "loss")


def require(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        UserError: one line for each, with the command that installs it.
    """
    specs = {name: importlib.util.find_spec(name) for name in names}
    # A folder of that name in the current directory counts as a module too, but one without an origin.
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise UserError(
            "\n".join(
                f'the tracker {name} is not installed: pip install "kindling-lm[{name}]", or train without it'
                for name in missing
            )
        )


def values_of(line: dict[str, Any]) -> Values:
    """What a tracker is given of a line of metrics.jsonl, by the names it shows.

    Means of an interval are under ``train/``, losses under ``validation/READOUT/``, trouble is a text and a rate under
    ``event/``.
    """
    if "validation" in line:
        return {
            f"validation/{readout}/{unit}": loss[unit]
            for readout, loss in line["validation"].items()
            for unit in ("nats_per_token", "bits_per_byte")
        }
    if "metrics" in line:
        return {f"validation/{name}": value for name, value in line["metrics"].items()}
    if "event" in line:
        return {"event/what": f"{line['event']}: {line['reason']}", "event/rate": line["rate"]}
    return {f"train/{name}": value for name, value in line.items() if name != "step"}


class Guarded:
    """A follower of the log (``metrics_log.Follower``) that hands lines on to a tracker, and outlives its failure."""

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._tracker: Tracker | None = None

    def open(self, run: Tracked, earlier: Sequence[dict[str, Any]]) -> bool:
        """Open the tracker and give it the ``earlier`` lines; did that work?"""

        def opened() -> None:
            self._tracker = TRACKERS[self._name](run)

        self._attempt(opened)
        for line in earlier:
            self.write(line)
        return self._tracker is not None

    def write(self, line: dict[str, Any]) -> None:
        if tracker := self._tracker:
            self._attempt(lambda: tracker.write(line))

    def go_back(self, step: int) -> None:
        if tracker := self._tracker:
            self._attempt(lambda: tracker.go_back(step))

    def close(self) -> None:
        if tracker := self._tracker:
            self._attempt(tracker.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # stdout is for what was asked of the command
                action()
        except Exception as failure:  # whatever it is, the run is worth more
            self._tracker = None
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            self._note(
                f"the tracker {self._name} failed ({reason}) and is left out from here on; {METRICS} has every line"
            )


def open_trackers(config: Config, path: Path, step: int, note: Callable[[str], None]) -> list[Guarded]:
    """The trackers of a run that begins at ``step`` or goes on from it, ready to follow its log.

    ``note`` is told of a tracker that cannot be opened (no network, no account); the run goes on without it.
    """
    identities = _identities(path / IDENTITIES)
    settings = {n: list(v) if isinstance(v, tuple) else v for n, v in config.flat().items()}
    lines = list(metrics_log.read(path / METRICS))
    opened = []
    for name in dict.fromkeys(config.training.trackers):
        known = name in identities
        given = {_key(line) for line in lines} if known else set()
        run = Tracked(path, identities.get(name) or uuid.uuid4().hex[:8], step, settings, given)
        follower = Guarded(name, note)
        if follower.open(run, [] if known else [line for line in lines if line["step"] <= step]):
            identities[name] = run.identity
            opened.append(follower)
    if opened:
        write_atomically(path / IDENTITIES, json.dumps(identities, indent=1) + "\n")
    return opened


def _identities(path: Path) -> dict[str, str]:
    try:
        known = read_json(path)
        return {str(name): str(identity) for name, identity in known.items()}
    except (OSError, ValueError, AttributeError):
        return {}
