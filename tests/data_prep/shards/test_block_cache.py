from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.shards import block_cache
from data_prep.shards.block_cache import BlockCache

BLOCKS = {hashlib.sha256(block).digest(): block for block in (bytes([n]) * 100 for n in range(20))}


@pytest.fixture(autouse=True)
def one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks compete for the same room."""
    monkeypatch.setattr(block_cache, "SETS", 1)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_was_not_read_for_longest_makes_room(tmp_path: Path) -> None:
    cache, digests = BlockCache(tmp_path, 350), list(BLOCKS)
    for number, digest in enumerate(digests[:3]):
        cache.put(digest, BLOCKS[digest])
        os.utime(tmp_path / "00" / digest.hex(), (number, number))
    assert cache.get(digests[0]) == BLOCKS[digests[0]]
    cache.put(digests[3], BLOCKS[digests[3]])
    kept = [cache.get(digest) is not None for digest in digests[:4]]
    assert kept == [True, False, True, True]
    assert size_of(tmp_path) == 300


def test_without_eviction_only_free_room_is_used(tmp_path: Path) -> None:
    cache, digests = BlockCache(tmp_path, 250), list(BLOCKS)
    for digest in digests[:5]:
        cache.put(digest, BLOCKS[digest], evict=False)
    assert [cache.get(digest) is not None for digest in digests[:5]] == [True, True, False, False, False]


def test_a_block_that_was_damaged_on_disk_is_not_given_out(tmp_path: Path) -> None:
    cache, (digest, block) = BlockCache(tmp_path, 1000), next(iter(BLOCKS.items()))
    cache.put(digest, block)
    (tmp_path / "00" / digest.hex()).write_bytes(block[:50])  # as after a loss of power
    assert cache.get(digest) is None
    assert size_of(tmp_path) == 0
    cache.put(digest, block)
    assert cache.get(digest) == block


def test_what_a_killed_process_left_counts_and_makes_room(tmp_path: Path) -> None:
    cache, (digest, block) = BlockCache(tmp_path, 150), next(iter(BLOCKS.items()))
    (tmp_path / "00").mkdir()
    (tmp_path / "00" / f"{digest.hex()}.1-1").write_bytes(block)
    cache.put(digest, block)
    assert cache.get(digest) == block
    assert size_of(tmp_path) == 100


def test_a_block_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache, (digest, block) = BlockCache(tmp_path, 99), next(iter(BLOCKS.items()))
    cache.put(digest, block)
    assert cache.get(digest) is None


def test_many_threads_share_a_cache_within_its_size(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 500)

    def use(number: int) -> bool:
        digest = list(BLOCKS)[number % len(BLOCKS)]
        cache.put(digest, BLOCKS[digest])
        return cache.get(digest) in (None, BLOCKS[digest])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(400)))
    assert size_of(tmp_path) <= 500


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_cache, "rename", full)
    cache, (digest, block) = BlockCache(tmp_path, 1000), next(iter(BLOCKS.items()))
    with pytest.raises(OSError, match="No space left"):
        cache.put(digest, block)
    assert size_of(tmp_path) == 0
