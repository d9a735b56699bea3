"""What an unfinished build has done so far, so that a later call can go on.

``build.json`` holds what decides the result and what was found before the first shard. Each part of the input has a
record of its own in the folder ``work``, written by whoever works on it. Every file is whole or not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from data_prep.errors import UserError
from data_prep.files import parse_json, write_atomically
from data_prep.shards.tokens import JOURNAL, SPLITS, WORK, ShardRecord


@dataclass
class Journal:
    """The state of a build before its parts.

    Attributes:
        identity: all that decides the result, sources and settings.
        stamp: a fingerprint of the sources' files and their times of change.
        threshold: a document belongs to validation if its hash is below it; None: not known yet.
        encoder: the short name of the encoder that was chosen; empty: not chosen yet.
        encoders: each encoder that was tried, and what came of it.
    """

    path: Path
    identity: dict[str, Any]
    stamp: str
    threshold: int | None = None
    encoder: str = ""
    encoders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """The journal of an unfinished build in ``directory``, or None."""
        path = directory / JOURNAL
        if not path.is_file():
            return None
        try:
            return cls(path, **parse_json(path.read_bytes()))
        except (ValueError, TypeError):
            raise _damaged(path) from None

    def save(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(content, indent=2))


@dataclass
class PartRecord:
    """What has been made of one part.

    ``summary`` is there when the part is finished: ``digest``, and the reports of ``reading`` and ``cleaning``. A
    change is on the disk when it returns, but for the shards that end with the part: they come with the summary.
    """

    path: Path
    shards: dict[str, list[ShardRecord]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    summary: dict[str, Any] | None = None

    @classmethod
    def open(cls, directory: Path, number: int) -> Self:
        """The record of part ``number``, empty if the part has not been begun."""
        path = directory / WORK / f"part-{number:05d}.json"
        if not path.is_file():
            return cls(path)
        try:
            content = parse_json(path.read_bytes())
            shards = {split: [ShardRecord(**record) for record in content["shards"][split]] for split in SPLITS}
            return cls(path, shards, content["summary"])
        except (ValueError, KeyError, TypeError):
            raise _damaged(path) from None

    def finish_shard(self, split: str, record: ShardRecord, *, is_last: bool) -> None:
        self.shards[split].append(record)
        if not is_last:
            self._save()

    def finish(self, summary: dict[str, Any]) -> None:
        self.summary = summary
        self._save()

    def _save(self) -> None:
        shards = {split: [asdict(record) for record in records] for split, records in self.shards.items()}
        write_atomically(self.path, json.dumps({"shards": shards, "summary": self.summary}))


def _damaged(path: Path) -> UserError:
    directory = path.parent if path.name == JOURNAL else path.parent.parent
    return UserError(f'"{path}" is damaged: remove "{directory}" and build again')


def differences(there: dict[str, Any], asked: dict[str, Any]) -> Iterator[str]:
    """One phrase for each entry in which two identities differ."""
    for name in sorted(there.keys() | asked.keys()):
        if there.get(name) != asked.get(name):
            yield f"{name.replace('_', ' ')} was {_shown(there.get(name))}, now {_shown(asked.get(name))}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
