"""Begin, resume or recognize a build: a folder has one writer at a time, and a build that was killed can be resumed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import LOCK, empty_directory, names_in, only_writer_of
from data_prep.pipeline.journal import Journal, differences
from data_prep.progress import Reporter
from data_prep.shards.manifest import save_manifest
from data_prep.shards.tokens import JOURNAL, MANIFEST, WORK

STDIN_COPY = "stdin.txt"
SMALLEST_PART_BYTES = 1 << 20
# There are at least this many parts, unless they would be too small, so that several processes have work.
FEWEST_PARTS = 16


def part_size(total_bytes: int) -> int:
    """Return the size of parts in bytes; it depends on the size of the sources, never on the number of workers."""
    return max(total_bytes // FEWEST_PARTS, SMALLEST_PART_BYTES)


def stamp_of(paths: Iterable[str]) -> str:
    """Return a fingerprint of the names, sizes and modification times of those files that are local."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        if Path(path).is_file() and not path.endswith(STDIN_COPY):
            status = Path(path).stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def build_or_resume(
    out: Path,
    identity: dict[str, Any],
    *,
    stamp: Callable[[], str],
    finished: Callable[[], dict[str, Any]],
    run: Callable[[Journal], dict[str, Any]],
    progress: Reporter,
) -> dict[str, Any]:
    """Build the dataset ``out``, or resume its build, and return its manifest.

    Args:
        identity: everything that determines the result, ready for JSON.
        stamp: computes ``stamp_of`` the sources.
        finished: opens the finished dataset in ``out`` and returns its manifest.
        run: builds what is not in the journal yet, and returns the manifest.

    Raises:
        UserError: another process is writing there, or ``out`` has something else. A new build that fails before its
            first part is done leaves nothing behind.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f'"{out}" is a file: choose another --out')
    created = [path for path in (out, *out.parents) if not path.exists()]  # deepest first
    out.mkdir(parents=True, exist_ok=True)
    busy = f'another build is writing to "{out}": wait for it, or choose another --out'
    try:
        with only_writer_of(out / LOCK, busy):
            if (out / MANIFEST).is_file():
                manifest = finished()
                _refuse_other_settings(out, {"sources": manifest["sources"]} | manifest["settings"], identity)
                progress.note(f'"{out}" is already built with these settings; nothing to do')
            else:
                manifest = _begun_or_resumed(out, identity, stamp(), run, progress)
            _remove_work(out)  # of this build, or of one killed between its last two steps
            return manifest
    except UserError:
        with suppress(OSError):  # unless a part is done, or another build began
            for directory in created:
                directory.rmdir()
        raise


def _begun_or_resumed(
    out: Path, identity: dict[str, Any], stamp: str, run: Callable[[Journal], dict[str, Any]], progress: Reporter
) -> dict[str, Any]:
    journal = Journal.load(out)
    if journal is not None:
        _refuse_other_settings(out, journal.identity, identity)
        refuse_changed_sources(out, stamp, journal)
        progress.note(f'resuming the build in "{out}"')
        return _run(out, journal, run)
    others = names_in(out) - {f"{JOURNAL}.tmp"}  # which a build killed during its first write leaves
    if others:
        raise UserError(f'"{out}" is not empty (it contains "{min(others)}") and not a build: choose another --out')
    try:
        return _run(out, Journal(out / JOURNAL, identity, stamp), run)
    except UserError:
        if not any(out.glob(f"{WORK}/part-*.json")):
            empty_directory(out)
        raise


def _run(out: Path, journal: Journal, run: Callable[[Journal], dict[str, Any]]) -> dict[str, Any]:
    journal.save()
    (out / WORK).mkdir(exist_ok=True)
    manifest = run(journal)
    save_manifest(out, manifest)
    return manifest


def _remove_work(out: Path) -> None:
    (out / STDIN_COPY).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / JOURNAL).unlink(missing_ok=True)


def _refuse_other_settings(out: Path, existing: dict[str, Any], requested: dict[str, Any]) -> None:
    if ("format" in existing) != ("format" in requested):
        raise UserError(f'"{out}" has a build of {"images" if "format" in existing else "text"}: choose another --out')
    changes = "; ".join(differences(existing, requested))
    if changes:
        raise UserError(
            f'"{out}" contains a build with different settings ({changes}): choose another --out, or remove the folder'
        )


def refuse_changed_sources(out: Path, stamp: str, journal: Journal) -> None:
    """Raise ``UserError`` if the sources have another stamp than when the build began."""
    if stamp != journal.stamp:
        raise UserError(f'the sources changed since the build in "{out}" began: remove "{out}" and build again')
