"""A dataset behind HTTP or S3 is read like one on this machine, and what a store does wrong is never given out."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.errors import StoreError, UserError
from data_prep.shards import block_cache, remote
from data_prep.shards.remote import Access
from data_prep.shards.tokens import SPLITS, Dataset, ShardWriter, open_dataset
from data_prep.sources import remote_files
from tests.data_prep.handmade import BYTES, finish_dataset
from tests.stores import HttpStore, http_store, s3_store


def make_dataset(directory: Path, documents: int, most_tokens: int, shard_tokens: int) -> Path:
    """Documents of random bytes in several shards."""
    directory.mkdir()
    draw, records = np.random.default_rng(0), {}
    for split in SPLITS:
        with ShardWriter(directory, split, vocab_size=BYTES.vocab_size, shard_tokens=shard_tokens) as writer:
            for length in draw.integers(1, most_tokens, size=documents):
                ids = draw.integers(1, 200, size=length)
                writer.add(np.array([*ids, BYTES.end_of_text_id]), text_bytes=int(length), words=1)
        records[split] = writer.records
    finish_dataset(directory, BYTES, records)
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("whole") / "data", 60, 300, 3000)


@pytest.fixture
def served(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(whole, tmp_path / "served" / "data")


@pytest.fixture
def web(served: Path) -> Iterator[HttpStore]:
    with http_store(served.parent) as store:
        yield store


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Blocks of 512 bytes, a cache for eight of them, and no waiting between attempts."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 512)
    monkeypatch.setattr(remote, "PART_BYTES", 2048)
    monkeypatch.setattr(remote, "HELD_BLOCKS", 2)
    monkeypatch.setattr(block_cache, "SETS", 2)
    found: list[float] = []
    monkeypatch.setattr(remote_files, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(str(tmp_path / "cache"), cache_bytes=8 * 512, retries=2, timeout_seconds=20)


def assert_equal(there: Dataset, here: Dataset) -> None:
    """The same manifest, tokens, lengths and tokenizer, read in any order."""
    assert there.fingerprint == here.fingerprint
    assert there.tokenizer.sha256 == here.tokenizer.sha256
    draw = random.Random(0)
    for name in SPLITS:
        ours, theirs = there.split(name), here.split(name)
        assert np.array_equal(ours.document_lengths(), theirs.document_lengths())
        assert np.array_equal(ours.read(0, ours.tokens), theirs.read(0, theirs.tokens))
        for _ in range(40):
            start, stop = sorted(draw.choices(range(ours.tokens + 1), k=2))
            stop = min(stop, start + 700)
            ours.announce(start, stop)
            out = np.empty(stop - start, np.int64)
            ours.read_into(start, out)
            assert np.array_equal(out, theirs.read(start, stop))


def cached_bytes(access: Access) -> int:
    return sum(path.stat().st_size for path in Path(access.cache, "blocks").rglob("*") if path.is_file())


def test_a_dataset_behind_http_is_the_one_on_disk(web: HttpStore, whole: Path, access: Access) -> None:
    there, here = open_dataset(web.url, access), open_dataset(whole)
    there.verify()
    assert_equal(there, here)
    assert 0 < cached_bytes(access) <= access.cache_bytes < sum(path.stat().st_size for path in whole.iterdir()) / 4


def test_a_dataset_behind_s3_is_the_one_on_disk(whole: Path, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_store(whole, monkeypatch) as store:
        there = open_dataset(store.url, access)
        there.verify()
        assert_equal(there, open_dataset(whole))
        (whole.parent / "nothing").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r'"s3://bucket/other" is not a Kindling dataset, or not there'):
            open_dataset("s3://bucket/other", access)
        with pytest.raises(UserError, match=r'"s3://none/data" is not a Kindling dataset, or not there'):
            open_dataset("s3://none/data", access)


def test_what_was_not_verified_before_is_verified_when_it_is_used(web: HttpStore, whole: Path, access: Access) -> None:
    assert_equal(open_dataset(web.url, access), open_dataset(whole))


def test_a_later_start_reads_no_shard_whole(web: HttpStore, access: Access) -> None:
    first = open_dataset(web.url, access)
    assert not first.is_verified
    first.verify()
    web.asked.clear()
    again = open_dataset(web.url, access)
    assert again.is_verified
    again.split("train").read(5, 10)
    sizes = [size for name, size in web.asked if name.startswith("train")]
    assert max(sizes) <= 512


def test_a_cache_that_holds_all_is_all_that_a_second_run_needs(web: HttpStore, whole: Path, access: Access) -> None:
    large = Access(access.cache, 10**6, 0, access.timeout_seconds)
    open_dataset(web.url, large).verify()
    again = open_dataset(web.url, large)
    web.gate.set("refusing")
    assert_equal(again, open_dataset(whole))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_bytes_that_changed_after_the_verification_are_noticed(
    web: HttpStore, served: Path, whole: Path, access: Access, waits: list[float]
) -> None:
    there = open_dataset(web.url, access)
    there.verify()
    record = there.split("train").records[0]
    shutil.rmtree(Path(access.cache) / "blocks")  # or the cache would have what was there before
    flip(served / f"{record.name}.bin", 2 * 1000)
    tokens = there.split("train")
    assert np.array_equal(tokens.read(0, 200), open_dataset(whole).split("train").read(0, 200))  # another block
    changed = rf'cannot read ".*{record.name}\.bin": its bytes have changed since it was verified \(3 attempts\)'
    for _ in range(2):
        with pytest.raises(StoreError, match=changed):
            tokens.read(990, 1010)
    assert waits == [1, 2, 1, 2]
    flip(served / f"{record.name}.bin", 2 * 1000)
    assert np.array_equal(tokens.read(990, 1010), open_dataset(whole).split("train").read(990, 1010))


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_bytes_that_are_wrong_from_the_start_are_never_given_out(
    web: HttpStore, served: Path, access: Access, ending: str
) -> None:
    flip(served / f"train-00000.{ending}", 40)
    damaged = rf'"{web.url}/train-00000\.{ending}" is damaged: its checksum differs from the one in manifest\.json'
    with pytest.raises(UserError, match=damaged):
        open_dataset(web.url, access).verify()
    with pytest.raises(UserError, match=damaged):
        split = open_dataset(web.url, access).split("train")
        split.read(0, 5) if ending == "bin" else split.document_lengths()


def test_another_size_or_a_missing_file_is_seen_at_once(web: HttpStore, served: Path, access: Access) -> None:
    path = served / "train-00000.bin"
    content = path.read_bytes()
    for other in (content[:-2], content + b"12", b""):
        path.write_bytes(other)
        with pytest.raises(StoreError, match=rf"train-00000\.bin\": it has not the {len(content):,} bytes"):
            open_dataset(web.url, access)
    path.unlink()
    with pytest.raises(UserError, match=r'/data/train-00000\.bin" is missing: copy or build the whole dataset again'):
        open_dataset(web.url, access)
    (served / "tokenizer.json").write_text("{}")
    with pytest.raises(StoreError, match=r"tokenizer\.json\": .*not the tokenizer that produced these tokens"):
        open_dataset(web.url, Access(access.cache + "2", 10**6, 0))
    (served / "manifest.json").unlink()
    with pytest.raises(UserError, match=r'/data" is not a Kindling dataset, or not there: it has no manifest\.json'):
        open_dataset(web.url, access)


def test_an_outage_is_reported_once_and_waited_for(
    web: HttpStore, whole: Path, access: Access, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there, waits = open_dataset(web.url, access), []
    there.verify()
    shutil.rmtree(Path(access.cache) / "blocks")

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if seconds == 2:
            web.gate.set("open")

    monkeypatch.setattr(remote_files, "time", SimpleNamespace(sleep=wait))
    expected = open_dataset(whole).split("train").read(0, 100)  # one block: one thread
    for state in ("refusing", "stalling"):
        tokens = open_dataset(web.url, Access(access.cache, 0, 9, 1)).split("train")
        caplog.clear()
        web.gate.set(state)
        assert np.array_equal(tokens.read(0, 100), expected)
        first, second = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
        assert first.startswith(f'cannot read "{web.url}/train-00000')
        assert ("no answer within 1 seconds" in first) == (state == "stalling")
        assert first.endswith("; trying again")
        assert second == f"{web.url} answers again"
    assert waits


def test_an_outage_without_end_is_one_sentence(web: HttpStore, access: Access, waits: list[float]) -> None:
    there = open_dataset(web.url, access)
    web.gate.set("refusing")
    with pytest.raises(StoreError) as error:
        there.split("train").read(0, 10)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f'cannot read "{web.url}/train-00000')
    assert message.endswith("(3 attempts); the same command continues when the store is back")
    assert waits == [1, 2]
    waits.clear()
    with pytest.raises(StoreError, match=r'cannot read ".*/manifest\.json": .* \(8 attempts\)'):
        open_dataset(web.url, Access(access.cache, 0, 7, 20))
    assert waits == [1, 2, 4, 8, 16, 32, 60]


def test_wrong_credentials_are_one_sentence_at_once(
    whole: Path, access: Access, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    class ForbiddenError(Exception):
        status = 403

    with s3_store(whole, monkeypatch) as store:
        import s3fs

        for error in (PermissionError("Access Denied"), ForbiddenError("403, message='Forbidden'")):

            async def refuse(*_: object, error: Exception = error, **__: object) -> bytes:
                raise error

            monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", refuse)
            with pytest.raises(StoreError, match=rf'access to "{store.url}/manifest\.json" was refused \({error}\)'):
                open_dataset(store.url, access)
        monkeypatch.undo()
    assert not waits


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/data", r'"s3://…@bucket" has a user name or password in it.*environment'),
        ("https://me:secret@example.org/data", r'"https://…@example\.org" has a user name'),
        ("https://example.org/data?token=secret", r'"https://example\.org/…" must name a folder: leave out'),
        ("nonsense://example/data", r'"nonsense://example/data" cannot be read: Protocol not known'),
    ],
)
def test_urls_with_secrets_or_unknown_systems_are_refused(access: Access, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_dataset(url, access)
    assert "secret" not in str(error.value)


def test_a_missing_package_is_named(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote_files, "filesystem_of", missing)
    with pytest.raises(UserError, match=r'needs a package that is not installed: pip install "kindling-lm\[remote\]"'):
        open_dataset("s3://bucket/data", access)


def test_a_store_without_byte_ranges_is_refused(served: Path, access: Access) -> None:
    with http_store(served.parent) as store:
        store.ranges = False
        with pytest.raises(StoreError, match="or the store does not serve byte ranges"):
            open_dataset(store.url, access)


def test_a_manifest_cannot_have_files_written_elsewhere(web: HttpStore, served: Path, access: Access) -> None:
    path = served / "manifest.json"
    manifest = json.loads(path.read_text())
    for changes in ({"file": "../../tokenizer.json"}, {"sha256": "../../elsewhere"}):
        path.write_text(json.dumps(manifest | {"tokenizer": manifest["tokenizer"] | changes}))
        with pytest.raises(UserError, match=r"the manifest of .* (names a file|has a checksum)"):
            open_dataset(web.url, access)


def test_a_full_disk_costs_the_cache_and_not_the_run(
    web: HttpStore, whole: Path, access: Access, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = open_dataset(web.url, access)
    there.verify()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_cache, "rename", full)
    assert_equal(there, open_dataset(whole))
    (sentence,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert sentence == (
        f'the cache "{access.cache}" cannot be used (No space left on device): blocks are read from the store each time'
    )
    monkeypatch.setattr(remote, "write_atomically", full)
    with pytest.raises(
        UserError, match=r"cannot write to the cache .* \(No space left on device\): make room, or name"
    ):
        open_dataset(web.url, Access(access.cache + "2", 10**6)).verify()


def test_damage_in_the_cache_is_found_and_repaired(web: HttpStore, whole: Path, access: Access) -> None:
    large = Access(access.cache, 10**6, 0, access.timeout_seconds)
    open_dataset(web.url, large).verify()
    for path in Path(access.cache).rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(path, -1)
    assert_equal(open_dataset(web.url, large), open_dataset(whole))


PROGRAM = """
import sys
import numpy as np
from data_prep.shards import block_cache, remote
from data_prep.shards.remote import Access
from data_prep.shards.tokens import open_dataset

remote.BLOCK_BYTES, remote.PART_BYTES, remote.HELD_BLOCKS, block_cache.SETS = 512, 2048, 2, 2
url, cache, seed = sys.argv[1:]
split = open_dataset(url, Access(cache, 8 * 512)).split("train")
draw = np.random.default_rng(int(seed))
print("begun", flush=True)
total = 0
for _ in range(300):
    start = int(draw.integers(0, split.tokens - 50))
    total += int(split.read(start, start + 50).astype(np.int64).sum())
print(total)
"""


def start(url: str, cache: str, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, url, cache, str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_share_a_cache_and_one_may_be_killed(web: HttpStore, whole: Path, access: Access) -> None:
    """Two read at once, in another order each; a third is killed meanwhile, in the middle of its work."""
    killed, *others = [start(web.url, access.cache, seed) for seed in range(3)]
    assert killed.stdout.readline() == "begun\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    split = open_dataset(whole).split("train")
    for seed, process in enumerate(others, 1):
        draw, total = np.random.default_rng(seed), 0
        for _ in range(300):
            first = int(draw.integers(0, split.tokens - 50))
            total += int(split.read(first, first + 50).astype(np.int64).sum())
        assert process.communicate()[0] == f"begun\n{total}\n"
    assert cached_bytes(access) <= access.cache_bytes + 3 * 512  # each may have had one block more at the end
    for path in Path(access.cache, "blocks").rglob("*"):
        if path.is_file() and "." not in path.name:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_files_are_opened_and_inspected_by_their_url(web: HttpStore, prep: Callable, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert "is intact" in prep("verify", web.url).stdout
    found = json.loads(prep("inspect", web.url, "--json").stdout)
    assert found["directory"] == web.url
    assert (tmp_path / "mine" / "kindling" / "data" / "files").is_dir()
