"""What an unfinished build has done so far. It lies beside the shards, and a later call reads it and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.shards import JOURNAL, SPLITS, ShardRecord


@dataclass(frozen=True)
class Reading:
    """What the first reading of all documents found.

    A document belongs to validation if its hash is below ``threshold``.
    """

    documents: int
    text_bytes: int
    corpus_sha256: str
    threshold: int
    skipped: dict[str, int]


@dataclass
class Journal:
    """``identity`` is all that decides the result: sources and settings. A change is on the disk when it returns."""

    path: Path
    identity: dict[str, Any]
    reading: Reading | None = None
    shards: dict[str, list[ShardRecord]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """The journal of an unfinished build in ``directory``, or None."""
        path = directory / JOURNAL
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            reading = Reading(**content["reading"]) if content["reading"] else None
            shards = {split: [ShardRecord(**record) for record in content["shards"][split]] for split in SPLITS}
            return cls(path, content["identity"], reading, shards)
        except (ValueError, KeyError, TypeError):
            raise UserError(f'"{path}" is damaged: remove "{directory}" and build again') from None

    def save(self) -> None:
        content = {
            "identity": self.identity,
            "reading": asdict(self.reading) if self.reading else None,
            "shards": {split: [asdict(record) for record in records] for split, records in self.shards.items()},
        }
        write_atomically(self.path, json.dumps(content, indent=2))

    def finish_reading(self, reading: Reading) -> None:
        self.reading = reading
        self.save()

    def finish_shard(self, split: str, record: ShardRecord) -> None:
        self.shards[split].append(record)
        self.save()


def differences(there: dict[str, Any], asked: dict[str, Any]) -> Iterator[str]:
    """One phrase for each entry in which two identities differ."""
    for name in sorted(there.keys() | asked.keys()):
        if there.get(name) != asked.get(name):
            yield f"{name.replace('_', ' ')} was {_shown(there.get(name))}, now {_shown(asked.get(name))}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
