"""Whether a run may be resumed: which settings may have changed, and what must be the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import names_in
from lm.config.settings import Config, all_settings
from lm.model.device import uses_bfloat16
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import PROCESSOR, TOKENIZER, Processor, Run, changes, open_run, plain_settings, sha256_key
from lm.runs.run_data import WORKING_DIRECTORY

ON_RESUME = {setting.name: setting.on_resume for setting in all_settings()}


class TrainingSource(Protocol):
    """What a run is trained on: its name in messages, a hash of its content, and what made model inputs of it."""

    name: str
    fingerprint: str

    @property
    def processor(self) -> Processor: ...


def refuse_other_directories(path: Path, known: Iterable[str] = ()) -> None:
    """Raise UserError unless ``path`` is new, empty or a run directory, even one whose creation was interrupted.

    ``known`` are names of other files that it may have.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another --run")
    own = {f"{name}{ending}" for name in ("config.toml", TOKENIZER, PROCESSOR) for ending in ("", ".tmp")}
    if path.exists() and not (path / "config.toml").exists() and names_in(path) - own - {*known}:
        raise UserError(f"{path} is not empty and is not a run directory: choose another --run")


def open_or_create(
    config: Config,
    path: Path,
    source: TrainingSource,
    device: torch.device,
    note: Callable[[str], None],
    *,
    accept_changes: bool,
) -> Checkpoint | None:
    """Return the checkpoint to resume from, if any; write the directory's files only if everything fits.

    Raises:
        UserError: the existing run was trained on other data or with other settings, or is damaged.
    """
    newest = None
    if (path / "config.toml").exists():
        run = open_run(path)
        newest = run.latest(note)
        if newest is not None:
            _check(run, newest, config, source, accept_changes=accept_changes)
            before = newest.state["place"]
            if device.type == "cpu":
                before = {"products": "float32"} | before  # of runs before precision = "native"
            threads = before.get("threads", 0)
            if device.type == "cpu" and not config.training.threads and 0 < threads <= (os.cpu_count() or 1):
                torch.set_num_threads(threads)  # as before, even if a container allows fewer cores now: the same bits
            now = _environment(device, config.training.precision)
            changed = {name: (before[name], now[name]) for name in now if before.get(name, now[name]) != now[name]}
            if changed:
                note(f"trained so far with {_describe(changed)}: results will match to rounding, not bit for bit")
    source.processor.save(path / source.processor.file_name)
    config.save(path / "config.toml")
    return newest


def fingerprints(config: Config, source: TrainingSource, device: torch.device) -> dict[str, Any]:
    """The part of a checkpoint's state that is compared on resume: data, processor, settings and environment."""
    return {
        "data_fingerprint": source.fingerprint,
        sha256_key(source.processor.file_name): source.processor.sha256,
        "config": plain_settings(config),
        WORKING_DIRECTORY: str(Path.cwd()),
        "place": _environment(device, config.training.precision),
    }


def _environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What the last bits of a sum depend on, in addition to the settings."""
    products = "bfloat16" if uses_bfloat16(device, precision) else "float32"
    environment: dict[str, Any] = {"PyTorch": torch.__version__, "device": device.type, "products": products}
    if device.type == "cpu":
        environment |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return environment


def _check(run: Run, newest: Checkpoint, config: Config, source: TrainingSource, *, accept_changes: bool) -> None:
    """Raise UserError if ``newest`` was trained with other data, another processor or other settings."""
    path = run.path
    if newest.state["data_fingerprint"] != source.fingerprint:
        then = "or restore the data"
        if not config.is_finetuning and config.data.data != run.config.data.data:
            then = f"and --init-from {path} to start it from these weights"
        raise UserError(f"{path} was trained on other data than {source.name} holds now: choose another --run, {then}")
    kept = path / source.processor.file_name
    if kept.exists() and run.processor.sha256 != newest.state.get(sha256_key(kept.name)):
        raise UserError(
            f"{kept} is not the {kept.stem} that {path} was trained with: remove it, and the data's own replaces it"
        )
    edited = {} if accept_changes else _not_free(changes(newest, run.config))
    if edited:
        raise UserError(
            f"{path}/config.toml does not match its newest checkpoint, which was trained with {_describe(edited)}: "
            f"restore it, or choose another --run{_resume_hint(edited)}"
        )
    refused = _not_free(changes(newest, config))
    if accept_changes:
        refused = {name: values for name, values in refused.items() if ON_RESUME[name] == "never"}
    if refused:
        hint = _resume_hint(refused)
        if not config.is_finetuning:
            again = f"{command('train')} --resume --run {path} --steps {config.training.steps}"
            hint += f", or continue it with its own settings: {again}"
        raise UserError(f"{path} was started with {_describe(refused)}: choose another --run{hint}")


def _not_free(changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return {name: changed[name] for name in sorted(changed) if ON_RESUME[name] != "free"}


def _describe(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {before!r} (now {now!r})" for name, (before, now) in changed.items())


def _resume_hint(changed: dict[str, tuple[Any, Any]]) -> str:
    return "" if any(ON_RESUME[name] == "never" for name in changed) else ", or add --resume to change it"
