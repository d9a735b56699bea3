from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.journal import Journal, Reading, differences
from data_prep.shards import ShardRecord


def test_a_journal_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "build.json", {"vocab_size": 300})
    journal.save()
    assert Journal.load(tmp_path) == journal
    journal.finish_reading(Reading(3, 100, "ab", 2**64 - 1, {"lines": 2}))
    journal.finish_shard("train", ShardRecord("train-00000", 5, 2, 20, 4, "aa", "bb", 0, 1))
    assert Journal.load(tmp_path) == journal


def test_without_a_journal_there_is_none_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert Journal.load(tmp_path) is None
    (tmp_path / "build.json").write_text('{"identity": ')
    with pytest.raises(UserError, match="is damaged"):
        Journal.load(tmp_path)


def test_differences_name_each_changed_setting() -> None:
    found = list(differences({"a_b": 1, "same": 2, "gone": "x"}, {"a_b": 3, "same": 2, "new": None}))
    assert found == ["a b was 1, now 3", 'gone was "x", now null']
