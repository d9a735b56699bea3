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
    """A run, started or resumed at ``step``, as a tracker sees it.

    ``identity`` is the same in every session; ``given`` has the keys (``_key``) of lines sent in earlier sessions.
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
    return AppendOnly(opened, opened.finish, run.given)


def trackio_run(run: Tracked) -> Tracker:
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


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": wandb_run,
    "trackio": trackio_run,
}


def _key(line: dict[str, Any]) -> tuple[int, str]:
    """The key of a line: its step and its kind."""
    return line["step"], line.get("event") or ("validation" if "validation" in line or "metrics" in line else "loss")


def require(names: Sequence[str]) -> None:
    """Check that these trackers are installed.

    Raises:
        UserError: one line for each missing one, with the command that installs it.
    """
    specs = {name: importlib.util.find_spec(name) for name in names}
    # A folder of that name in the current directory is a module too, but without an origin.
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise UserError(
            "\n".join(
                f'the tracker {name} is not installed: pip install "kindling-lm[{name}]", or train without it'
                for name in missing
            )
        )


def values_of(line: dict[str, Any]) -> Values:
    """The values of a line of metrics.jsonl, by the names a tracker shows.

    The means of an interval are under ``train/``, validation losses under ``validation/READOUT/``, and an event is a
    text and a learning-rate multiplier under ``event/``.
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
    """A follower of the log (``metrics_log.Follower``) that passes lines to a tracker and survives its failure."""

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._tracker: Tracker | None = None

    def open(self, run: Tracked, earlier: Sequence[dict[str, Any]]) -> bool:
        """Open the tracker and send it the ``earlier`` lines; return whether that worked."""

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
            with redirect_stdout(sys.stderr):  # stdout is for the command's own output
                action()
        except Exception as failure:  # no failure of a tracker may end the run
            self._tracker = None
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            self._note(
                f"the tracker {self._name} failed ({reason}) and is no longer used; {METRICS} still has every line"
            )


def open_trackers(config: Config, path: Path, step: int, note: Callable[[str], None]) -> list[Guarded]:
    """Open the trackers of a run that is started or resumed at ``step``.

    A tracker that cannot be opened (no network, no account) is reported to ``note`` and omitted.
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
