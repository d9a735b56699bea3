from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.pipeline.journal import Journal, PartRecord, differences
from data_prep.shards.tokens import ShardRecord
from data_prep.shards.writing import PartWriter

SHARD = ShardRecord("train-00003", 0, 5, 2, 20, 4, "aa", "bb", "a.txt:0", "a.txt:90")


class Shard:
    def __init__(self, name: str) -> None:
        self.stack = ExitStack()

    def finish(self) -> ShardRecord:
        return SHARD


class Writer(PartWriter[ShardRecord, Shard]):
    """Puts each document into a shard of its own."""

    def __init__(self, split: str, finished: Sequence[ShardRecord], on_finished: Callable[[ShardRecord], None]) -> None:
        super().__init__(split, finished, on_finished)

    def add(self) -> None:
        self._shard(full=self._open is not None, begin=Shard)


def test_a_journal_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "build.json", {"vocab_size": 300}, "stamp")
    journal.save()
    assert Journal.load(tmp_path) == journal
    journal.threshold, journal.encoder, journal.encoders = 2**64 - 1, "words", {"words": "exact"}
    journal.save()
    assert Journal.load(tmp_path) == journal


def test_a_part_is_read_back_as_far_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    record = PartRecord.open(tmp_path, 3)
    assert (record.summary, record.shards) == (None, {"train": [], "validation": []})
    with record.writers(Writer) as writers:
        writers["train"].add()
        assert PartRecord.open(tmp_path, 3).shards == {"train": [], "validation": []}
        writers["train"].add()
        assert PartRecord.open(tmp_path, 3) == record
        assert record.shards == {"train": [SHARD], "validation": []}
    assert record.shards == {"train": [SHARD, SHARD], "validation": []}
    assert len(PartRecord.open(tmp_path, 3).shards["train"]) == 1, "the last shard is saved with the summary"
    record.finish({"documents": 2})
    assert PartRecord.open(tmp_path, 3) == record
    assert PartRecord.open(tmp_path, 4).summary is None


@pytest.mark.parametrize("content", ['{"identity": ', "{}", '{"summary": 1}'])
def test_a_broken_record_is_refused_with_the_folder_to_remove(tmp_path: Path, content: str) -> None:
    assert Journal.load(tmp_path) is None
    (tmp_path / "work").mkdir()
    for path in (tmp_path / "build.json", tmp_path / "work/part-00000.json"):
        path.write_text(content)
    message = f'is damaged: remove "{tmp_path}" and build again'
    with pytest.raises(UserError, match=message):
        Journal.load(tmp_path)
    with pytest.raises(UserError, match=message):
        PartRecord.open(tmp_path, 0)


def test_differences_name_each_changed_setting() -> None:
    found = list(differences({"a_b": 1, "same": 2, "gone": "x"}, {"a_b": 3, "same": 2, "new": None}))
    assert found == ["a b was 1, now 3", 'gone was "x", now null']
