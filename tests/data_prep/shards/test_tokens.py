from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards.tokens import ShardRecord, ShardWriter, SourceSpan, open_dataset
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype
from tests.data_prep.handmade import BYTES, finish_dataset

END = 0


def write_split(
    directory: Path, split: str, documents: list[list[int]], *, shard_tokens: int = 2**26, vocab_size: int = 259
) -> list[ShardRecord]:
    with ShardWriter(directory, split, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.add(np.array([*document, END]), text_bytes=len(document), words=1, origin=f"a.txt:{len(document)}")
    return writer.records


def write_dataset(
    directory: Path,
    train: list[list[int]],
    validation: list[list[int]],
    *,
    shard_tokens: int = 2**26,
    tokenizer: Tokenizer = BYTES,
) -> None:
    """A dataset from the format's description, without the pipeline."""
    directory.mkdir(parents=True, exist_ok=True)
    records = {
        name: write_split(directory, name, documents, shard_tokens=shard_tokens, vocab_size=tokenizer.vocab_size)
        for name, documents in (("train", train), ("validation", validation))
    }
    finish_dataset(directory, tokenizer, records)


def test_a_tiny_shard_has_exactly_these_bytes(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [[258, 5], [7]])
    assert (tmp_path / "train-00000.bin").read_bytes().hex(" ") == "02 01 05 00 00 00 07 00 00 00"
    assert (tmp_path / "train-00000.idx").read_bytes().hex(" ", -8) == (
        "4d4d494449445800 0001000000000000 0008020000000000 0000030000000000 0000"  # header of 34 bytes
        "030000000200 0000000000000000 0000060000000000 0000"  # 2 lengths, 2 positions in bytes
        "000000000000 0000010000000000 0000020000000000 0000"  # documents 0, 1 and the end, 2
    )


def read_as_megatron(directory: Path, name: str) -> list[list[int]]:
    """A reader written from the description of Megatron's format alone."""
    idx = (directory / f"{name}.idx").read_bytes()
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", idx)
    assert (magic, version, documents) == (b"MMIDIDX\0\0", 1, sequences + 1)
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", idx, at)
    at += 4 * sequences
    pointers = struct.unpack_from(f"<{sequences}q", idx, at)
    at += 8 * sequences
    assert struct.unpack_from(f"<{documents}q", idx, at) == tuple(range(documents))
    assert at + 8 * documents == len(idx)
    letter = {8: "H", 4: "i"}[code]
    content = (directory / f"{name}.bin").read_bytes()
    return [
        list(struct.unpack_from(f"<{length}{letter}", content, start))
        for length, start in zip(lengths, pointers, strict=True)
    ]


documents_of_tokens = st.lists(st.lists(st.integers(1, 258), max_size=12), min_size=1, max_size=30)


@given(documents=documents_of_tokens, shard_tokens=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_every_document_is_whole_in_one_shard_that_megatron_reads(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    records = write_split(directory, "train", documents, shard_tokens=shard_tokens)
    read = [read_as_megatron(directory, record.name) for record in records]
    assert [document for shard in read for document in shard] == [[*document, END] for document in documents]
    for shard, record in zip(read, records, strict=True):
        assert record.tokens == sum(map(len, shard))
        assert record.tokens <= shard_tokens or len(shard) == 1, "only a document above the limit may pass it"
        assert record.documents == len(shard)
        assert (record.first, record.last) == (f"a.txt:{len(shard[0]) - 1}", f"a.txt:{len(shard[-1]) - 1}")
        assert record.bin_sha256 == hashlib.sha256((directory / f"{record.name}.bin").read_bytes()).hexdigest()
        assert record.idx_sha256 == hashlib.sha256((directory / f"{record.name}.idx").read_bytes()).hexdigest()
    for shard, following in itertools.pairwise(read):
        assert sum(map(len, shard)) + len(following[0]) > shard_tokens, "a shard ended before it was full"


@given(documents=documents_of_tokens, shard_tokens=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_reading_gives_any_stretch_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("dataset")
    write_dataset(directory, documents, [[9]], shard_tokens=shard_tokens)
    stream = [token for document in documents for token in [*document, END]]
    split = open_dataset(directory).split("train")
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert split.read(start, stop).tolist() == stream[start:stop]
    assert split.read(start, stop).dtype == np.uint16
    filled = np.full(stop - start, -1)
    split.read_into(start, filled)
    assert filled.tolist() == stream[start:stop]
    assert split.source_spans == [SourceSpan("texts", 1.0, 0, len(stream))]
    for beyond in (-1, len(stream) + 1 - len(filled)):
        with pytest.raises(IndexError):
            split.read_into(beyond, filled)
    assert split.document_lengths().tolist() == [len(document) + 1 for document in documents]
    assert (split.tokens, split.documents, split.words) == (len(stream), len(documents), len(documents))
    open_dataset(directory).verify()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 5), (3, 2)])
def test_reading_outside_the_stream_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    write_dataset(tmp_path, [[5, 6, 7]], [])
    with pytest.raises(IndexError):
        open_dataset(tmp_path).split("train").read(start, stop)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "int32")])
def test_large_vocabularies_take_four_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size).name == dtype
    write_split(tmp_path, "train", [[vocab_size - 1, 1]], vocab_size=vocab_size)
    assert read_as_megatron(tmp_path, "train-00000") == [[vocab_size - 1, 1, END]]


@pytest.mark.parametrize("tokens", [[259], [-1], []])
def test_tokens_outside_the_vocabulary_are_never_written(tmp_path: Path, tokens: list[int]) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size=259)
    with pytest.raises(ValueError, match="259"):
        writer.add(np.array(tokens, dtype=np.int64), text_bytes=1, words=1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_finished_shards_and_nothing_half_made(tmp_path: Path) -> None:
    finished = []
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path, "train", vocab_size=259, shard_tokens=2, on_finished=finished.append) as writer,
    ):
        writer.add(np.array([5, END]), text_bytes=1, words=1)
        writer.add(np.array([6, END]), text_bytes=1, words=1)
        raise RuntimeError
    assert [record.name for record in finished] == ["train-00000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.bin", "train-00000.idx"]


def test_writing_goes_on_after_finished_shards(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    documents = [[n, n] for n in range(1, 8)]
    whole = write_split(tmp_path / "whole", "train", documents, shard_tokens=6)
    first = write_split(tmp_path / "parts", "train", documents[:2], shard_tokens=6)
    with ShardWriter(tmp_path / "parts", "train", vocab_size=259, shard_tokens=6, finished=first) as writer:
        for document in documents[2:]:
            writer.add(np.array([*document, END]), text_bytes=2, words=1, origin="a.txt:2")
    assert writer.records == whole


def test_an_empty_split_can_be_read(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[5]], [])
    split = open_dataset(tmp_path).split("validation")
    assert (split.tokens, split.documents) == (0, 0)
    assert len(split.read(0, 0)) == len(split.document_lengths()) == 0


def test_a_dataset_knows_its_tokenizer_and_its_fingerprint(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[5]], [[6]])
    dataset = open_dataset(str(tmp_path))
    assert dataset.directory == tmp_path
    assert dataset.tokenizer is dataset.tokenizer
    assert dataset.tokenizer.vocab_size == dataset.vocab_size == 259
    assert dataset.fingerprint == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    with pytest.raises(UserError, match='no split "test"'):
        dataset.split("test")


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def flip_byte(name: str, at: int) -> Callable[[Path], None]:
    def flip(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[at] ^= 1
        (directory / name).write_bytes(bytes(content))

    return flip


DAMAGES = {
    "missing bin": (lambda d: (d / "train-00000_01.bin").unlink(), r"train-00000_01\.bin.* is missing"),
    "missing idx": (lambda d: (d / "train-00000.idx").unlink(), r"train-00000\.idx.* is missing"),
    "short bin": (overwrite("train-00000.bin", b"1234"), r"train-00000\.bin.* has 4 bytes instead of 6"),
    "short idx": (overwrite("train-00000.idx", b""), r"train-00000\.idx.* has 0 bytes"),
    "other index": (flip_byte("train-00000.idx", 17), r"train-00000\.idx.* does not match the manifest"),
    "other tokenizer": (overwrite("tokenizer.json", b"{}"), r"tokenizer\.json.* is missing or not the tokenizer"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json.* is missing"),
    "newer version": (edit_manifest(version=3), r"manifest\.json.* has version 3, but this program reads version 2"),
    "other format": (edit_manifest(format="parquet"), r"manifest\.json.* is damaged"),
    "no splits": (edit_manifest(splits={}), r"manifest\.json.* is damaged"),
    "broken manifest": (overwrite("manifest.json", b'{"format": '), r"manifest\.json.* is damaged"),
    "manifest of other things": (overwrite("manifest.json", b"[]"), r"manifest\.json.* is damaged"),
    "no manifest": (
        lambda d: (d / "manifest.json").unlink(),
        r"has no manifest\.json\); make one with: kindling prep build \S+ --out data/",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_dataset_is_not_opened(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_dataset(tmp_path, [[5, 6], [7, 8]], [[9]], shard_tokens=3)
    open_dataset(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_what_is_no_dataset_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        open_dataset(tmp_path / "nothing")
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_verify_names_a_file_of_which_one_bit_changed(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, [[5, 6], [7, 8]], [[9]])
    flip_byte(name, -1)(tmp_path)
    dataset = open_dataset(tmp_path)  # quick, so it cannot see this
    with pytest.raises(UserError, match=rf"{name}.* is damaged"):
        dataset.verify()


def repair_checksums(directory: Path) -> None:
    """Make the manifest agree with the files, so that only their meaning is wrong."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for split in manifest["splits"].values():
        for record in split["shards"]:
            for suffix in ("bin", "idx"):
                content = (directory / f"{record['name']}.{suffix}").read_bytes()
                record[f"{suffix}_sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte("train-00000.bin", 1), "tokens that its tokenizer cannot produce"),  # 5 becomes 261
        (flip_byte("train-00000.bin", 4), "tokens that its tokenizer cannot produce"),  # no end of text
        (flip_byte("train-00000.idx", 34), "is inconsistent"),  # a length
        (flip_byte("train-00000.idx", 42), "is inconsistent"),  # a position
    ],
)
def test_verify_sees_wrong_content_under_right_checksums(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    write_dataset(tmp_path, [[5, 6], [7, 8]], [[9]])
    damage(tmp_path)
    repair_checksums(tmp_path)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path).verify()


@pytest.mark.parametrize("settings", [{}, {"converted_from": "olmo", "ends_inside_documents": 0}])
def test_verify_counts_the_ends_of_documents(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_dataset(tmp_path, [[5, 6, 7], [7, 8]], [[9]])
    edit_manifest(settings=settings)(tmp_path)
    open_dataset(tmp_path).verify()
    tokens = np.fromfile(tmp_path / "train-00000.bin", "<u2")
    tokens[1] = BYTES.end_of_text_id
    tokens.tofile(tmp_path / "train-00000.bin")
    repair_checksums(tmp_path)
    with pytest.raises(UserError, match="has 1 end-of-text tokens inside documents"):
        open_dataset(tmp_path).verify()
    # What an import counted, or an earlier import did not count, is right.
    for known in ({"converted_from": "olmo", "ends_inside_documents": 1}, {"converted_from": "olmo"}):
        edit_manifest(settings=known)(tmp_path)
        open_dataset(tmp_path).verify()


def test_opening_reads_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, [[5, 6], [7, 8]], [[9]])
    monkeypatch.setattr(np, "memmap", None)
    assert open_dataset(tmp_path).split("train").tokens == 6
