"""Whether a run may go on: which settings may have changed, and what must be as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config, all_settings
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, changes, open_run, plain_settings

# Settings that a run may be continued with changed: they alter neither the model nor the order of its data.
FREE_SETTINGS = {
    *("steps", "log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("device", "precision", "compile", "threads", "parallel", "micro_batch_rows", "prompts", "fills", "data"),
    *("verify_data", "trackers", "train", "validation", "epochs", "validations_per_epoch", "patience"),
    "micro_batch_tokens",
}
# Settings that can never change: the weights, or the meaning of a step, depend on them.
FIXED_SETTINGS = {s.name for s in all_settings() if s.section == "model"} | {
    *("context_length", "batch_tokens", "packing", "seed", "optimizer", "init_from"),
    *("task", "base", "weights", "method", "lora_rank", "lora_alpha", "lora_matrices", "batch_examples", "pairs"),
}


class Source(Protocol):
    """Where a run's weights come from: ``fingerprint`` is a hash of its content, ``name`` what a person calls it."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer


def refuse_other_directories(path: Path) -> None:
    """A run goes into a new or empty directory, or into its own (which may have been killed while it was made).

    Raises:
        UserError: something else lies at ``path``.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another --run")
    own = {f"{name}{ending}" for name in ("config.toml", "tokenizer.json") for ending in ("", ".tmp")}
    if path.exists() and not (path / "config.toml").exists() and {p.name for p in path.iterdir()} - own:
        raise UserError(f"{path} is not empty and is not a run directory: choose another --run")


def open_or_create(
    config: Config,
    path: Path,
    source: Source,
    device: torch.device,
    note: Callable[[str], None],
    *,
    accept_changes: bool,
) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one; the directory's files are only written when everything fits.

    Raises:
        UserError: the run that is there was trained on other data or with other settings, or is damaged.
    """
    newest = None
    if (path / "config.toml").exists():
        before = open_run(path)
        newest = before.latest(note)
        if newest is not None:
            _check(before, newest, config, source, accept_changes=accept_changes)
            _tell_another_place(newest, device, note)
    source.tokenizer.save(path / "tokenizer.json")
    config.save(path / "config.toml")
    return newest


def fingerprints(config: Config, source: Source, device: torch.device) -> dict[str, Any]:
    """What a checkpoint says of all that its weights come from, to be compared when the run goes on."""
    return {
        "data_fingerprint": source.fingerprint,
        "tokenizer_sha256": source.tokenizer.sha256,
        "config": plain_settings(config),
        "place": _place(device),
    }


def _place(device: torch.device) -> dict[str, Any]:
    """What the last bits of a sum depend on, beside the settings."""
    place: dict[str, Any] = {"PyTorch": torch.__version__, "device": device.type}
    if device.type == "cpu":
        place |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return place


def _check(run: Run, newest: Checkpoint, config: Config, source: Source, *, accept_changes: bool) -> None:
    """Refuse to go on from ``newest`` with what is not what it was trained with."""
    path = run.path
    if newest.state["data_fingerprint"] != source.fingerprint:
        raise UserError(
            f"{path} was trained on other data than {source.name} holds now: choose another --run, or restore the data"
        )
    kept = path / "tokenizer.json"
    if kept.exists() and run.tokenizer.sha256 != newest.state["tokenizer_sha256"]:
        raise UserError(
            f"{kept} is not the tokenizer that {path} was trained with: remove it, and the data's, which is, takes its "
            "place"
        )
    edited = {} if accept_changes else _binding(changes(newest, run.config))
    if edited:
        raise UserError(
            f"{path}/config.toml does not say what its newest checkpoint was trained with, {_told(edited)}: put it "
            f"back, or choose another --run{_unless_fixed(edited)}"
        )
    blocking = _binding(changes(newest, config))
    if accept_changes:
        blocking = {name: values for name, values in blocking.items() if name in FIXED_SETTINGS}
    if blocking:
        raise UserError(f"{path} was begun with {_told(blocking)}: choose another --run{_unless_fixed(blocking)}")


def _binding(changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return {name: changed[name] for name in sorted(changed) if name not in FREE_SETTINGS}


def _told(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {before!r} (now {now!r})" for name, (before, now) in changed.items())


def _unless_fixed(changed: dict[str, tuple[Any, Any]]) -> str:
    return "" if changed.keys() & FIXED_SETTINGS else ", or add --resume to change it"


def _tell_another_place(newest: Checkpoint, device: torch.device, note: Callable[[str], None]) -> None:
    before, now = newest.state["place"], _place(device)
    moved = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    if moved:
        note(f"trained so far with {_told(moved)}: it goes on, to rounding, not bit for bit, as it would have there")
