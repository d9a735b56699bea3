"""The progress of an unfinished build, so that it can be resumed.

``build.json`` contains what determines the result and what was found before the first shard. Each part of the input has
its own record in the folder ``work``, written by the worker in charge of it. Every file is either complete or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from data_prep.errors import UserError
from data_prep.files import parse_json, write_atomically
from data_prep.shards.tokens import JOURNAL, SPLITS, WORK, ShardRecord
from data_prep.shards.writing import PartWriter

Writer = TypeVar("Writer", bound=PartWriter[Any, Any])


@dataclass
class Journal:
    """The state of a build before its parts.

    Attributes:
        identity: everything that determines the result, sources and settings.
        stamp: a fingerprint of the source files and their modification times.
        threshold: a document is in validation if its hash is below it; None: not known yet.
        encoder: short name of the chosen encoder; empty: not chosen yet.
        encoders: each encoder tried, and the outcome.
        channels: of a build of images, as chosen; 0: not chosen yet, or a build of text.
    """

    path: Path
    identity: dict[str, Any]
    stamp: str
    threshold: int | None = None
    encoder: str = ""
    encoders: dict[str, str] = field(default_factory=dict)
    channels: int = 0

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """Load the journal of an unfinished build in ``directory``; None if there is none."""
        path = directory / JOURNAL
        if not path.is_file():
            return None
        try:
            return cls(path, **parse_json(path.read_bytes()))
        except (ValueError, TypeError):
            raise _damaged(path) from None

    def save(self) -> None:
        """Write ``build.json``."""
        content = {name: value for name, value in vars(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(content, indent=2))


def part_path(directory: Path, number: int, suffix: str) -> Path:
    """Return a temporary file about part ``number`` of the build in ``directory``.

    Its suffix is ``json`` for its record, ``signatures`` for those of its documents, or ``duplicates``, which has one
    byte per document, 1 for those to drop.
    """
    return directory / WORK / f"part-{number:05d}.{suffix}"


@dataclass
class PartRecord:
    """The finished shards of one part, as records of text or of images.

    ``summary`` is set when the part is finished: what its worker reports of it, ready for JSON. Changes are on disk
    when a method returns, except for the last shards of a part, which are saved with the summary.
    """

    path: Path
    shards: dict[str, list[Any]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    summary: dict[str, Any] | None = None

    @classmethod
    def open(cls, directory: Path, number: int, kind: Callable[..., Any] = ShardRecord) -> Self:
        """Load the record of part ``number``, with shards of this ``kind``; empty if it has not been started."""
        path = part_path(directory, number, "json")
        if not path.is_file():
            return cls(path)
        try:
            content = parse_json(path.read_bytes())
            shards = {split: [kind(**record) for record in content["shards"][split]] for split in SPLITS}
            return cls(path, shards, content["summary"])
        except (ValueError, KeyError, TypeError):
            raise _damaged(path) from None

    @contextmanager
    def writers(self, writer: Callable[..., Writer]) -> Iterator[dict[str, Writer]]:
        """Open a ``writer`` for each split, which continues after the finished shards and adds its own here."""
        ended = False

        def writer_of(split: str) -> Writer:
            def finish_shard(shard: Any) -> None:
                self.shards[split].append(shard)
                if not ended:
                    self._save()

            return writer(split=split, finished=self.shards[split], on_finished=finish_shard)

        found = {split: writer_of(split) for split in SPLITS}
        with ExitStack() as stack:
            for each in found.values():
                stack.enter_context(each)
            yield found
            ended = True

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the part as finished."""
        self.summary = summary
        self._save()

    def _save(self) -> None:
        shards = {split: [asdict(record) for record in records] for split, records in self.shards.items()}
        write_atomically(self.path, json.dumps({"shards": shards, "summary": self.summary}))


def _damaged(path: Path) -> UserError:
    directory = path.parent if path.name == JOURNAL else path.parent.parent
    return UserError(f'"{path}" is damaged: remove "{directory}" and build again')


def differences(existing: dict[str, Any], requested: dict[str, Any]) -> Iterator[str]:
    """Yield one phrase for each entry in which two identities differ."""
    for name in sorted(existing.keys() | requested.keys()):
        if existing.get(name) != requested.get(name):
            yield f"{name.replace('_', ' ')} was {_shown(existing.get(name))}, now {_shown(requested.get(name))}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
