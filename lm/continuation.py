"""Whether a run may go on: which settings may have changed, and what must be as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from lm.checkpoint import Checkpoint
from lm.config import Config, all_settings
from lm.corpora import Corpora
from lm.run_directory import open_run

# Settings that a run may be continued with changed: they alter neither the model nor the order of its data.
FREE_SETTINGS = {
    *("steps", "log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints"),
    *("device", "precision", "threads", "parallel", "micro_batch_rows", "prompts", "fills", "data", "verify_data"),
}
# Settings that can never change: the weights, or the meaning of a step, depend on them.
FIXED_SETTINGS = {s.name for s in all_settings() if s.section == "model"} | {
    *("context_length", "batch_tokens", "packing", "seed", "optimizer")
}


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
    config: Config, path: Path, corpora: Corpora, note: Callable[[str], None], *, accept_changes: bool
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
            _check(before.config, config, newest.state, corpora, path, accept_changes=accept_changes)
    corpora.tokenizer.save(path / "tokenizer.json")
    config.save(path / "config.toml")
    return newest


def _check(
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
