"""The shard format; no other file knows its bytes. ``docs/shard-format.md`` describes it for other programs.

A dataset is a directory::

    manifest.json       the contents, with a checksum of every file; written last, so it marks a finished dataset
    tokenizer.json      the tokenizer that produced the tokens
    train-00000.bin     concatenated tokens; each document ends with the end-of-text token
    train-00000.idx     where each document begins, in Megatron's index layout
    validation-…        the same for the validation split

The number is that of the part of the input. If a part fills several shards, the others are called ``train-00000_01``
and so on. A document is always within one shard. A file gets its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from data_prep.errors import UserError
from data_prep.errors.command_names import command, text_and_out
from data_prep.files import atomic_file, parse_json, sha256_of_file
from data_prep.settings import DEFAULT_SHARD_TOKENS
from data_prep.shards.writing import PartWriter
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.loss import NO_LOSS, Loss, counted_bytes
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

FORMAT_NAME = "kindling-shards"
FORMAT_VERSION = 2
IMAGES_FORMAT = "kindling-images"  # of a dataset of images, which images.py reads
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
# These exist in the directory only during a build; see journal.py.
JOURNAL = "build.json"
WORK = "work"

# The setting of an import that says how many end-of-text tokens are inside documents.
ENDS_INSIDE = "ends_inside_documents"

VERIFYING_THREADS = 4
COUNTED_TOKENS = 1 << 22  # counted at a time
MOST_OPEN_SHARDS = 4096  # Linux allows 65,530 maps per process
READING = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows changes line ends without it

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
IDX_VERSION = 1
MEGATRON_CODES = {"uint16": 8, "int32": 4}


@dataclass(frozen=True)
class ShardRecord:
    """The entry for one shard in the manifest.

    ``source`` is an index into the manifest's sources. ``first`` and ``last`` locate its first and last document in
    that source, for example ``folder/book.txt:65536``. ``lost_bytes`` of the text are not in the tokens, of which
    ``unknown_tokens`` stand for nothing; earlier versions did not count them.
    """

    name: str
    source: int
    tokens: int
    documents: int
    text_bytes: int
    words: int
    bin_sha256: str
    idx_sha256: str
    first: str
    last: str
    lost_bytes: int | None = None
    unknown_tokens: int | None = None


class ShardWriter(PartWriter[ShardRecord, "_OpenShard"]):
    """A context manager that writes a part's documents of one split as shards; leaving it finishes the last shard.

    ``finished`` lists the shards that an interrupted call already wrote; writing continues after them. ``on_finished``
    is called with the record of each new shard once both of its files are on disk.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        vocab_size: int,
        part: int = 0,
        source: int = 0,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        finished: Sequence[ShardRecord] = (),
        on_finished: Callable[[ShardRecord], None] = lambda record: None,
    ) -> None:
        super().__init__(f"{split}-{part:05d}", finished, on_finished)
        self._directory = directory
        self._source = source
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens

    def add(self, tokens: np.ndarray, *, text_bytes: int, words: int, origin: str = "", loss: Loss = NO_LOSS) -> None:
        """Append one document.

        Args:
            tokens: its tokens, including the end-of-text token.
            text_bytes, words: the size of its text in UTF-8 bytes and in words.
            origin: where it is in the source.
            loss: what of its text is not in the tokens.
        """
        signed = tokens.dtype.kind != "u"
        if tokens.size == 0 or (signed and int(tokens.min()) < 0) or int(tokens.max()) >= self._vocab_size:
            raise ValueError(f"a document needs tokens, each at least 0 and below the vocabulary of {self._vocab_size}")
        full = self._open is not None and self._open.tokens + tokens.size > self._shard_tokens
        shard = self._shard(full=full, begin=lambda name: _OpenShard(self._directory, name, self._dtype, self._source))
        shard.add(tokens.astype(self._dtype, copy=False), text_bytes, words, origin, loss)


class _OpenShard:
    """The shard being written: tokens go straight to disk, only four bytes per document stay in memory."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], source: int) -> None:
        self.tokens = 0
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._source = source
        self._lengths = array("i")
        self._text_bytes = 0
        self._words = 0
        self._lost_bytes = self._unknown_tokens = 0
        self._first = self._last = ""
        self._hash = hashlib.sha256()
        self.stack = ExitStack()
        self._file: IO[bytes] = self.stack.enter_context(atomic_file(directory / f"{name}.bin", sync_name=False))

    def add(self, tokens: np.ndarray, text_bytes: int, words: int, origin: str, loss: Loss) -> None:
        content = tokens.tobytes()
        self._hash.update(content)
        self._file.write(content)
        if not self._lengths:
            self._first = origin
        self._last = origin
        self._lengths.append(tokens.size)
        self.tokens += tokens.size
        self._text_bytes += text_bytes
        self._words += words
        self._lost_bytes += loss.lost_bytes
        self._unknown_tokens += loss.unknown_tokens

    def finish(self) -> ShardRecord:
        self.stack.close()
        index = index_bytes(np.frombuffer(self._lengths, dtype=np.int32), self._dtype)
        with atomic_file(self._directory / f"{self._name}.idx") as file:
            file.write(index)
        return ShardRecord(
            name=self._name,
            source=self._source,
            tokens=self.tokens,
            documents=len(self._lengths),
            text_bytes=self._text_bytes,
            words=self._words,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            first=self._first,
            last=self._last,
            lost_bytes=self._lost_bytes,
            unknown_tokens=self._unknown_tokens,
        )


def count_words(content: bytes) -> int:
    """Count runs of bytes above the space: spaces and control characters separate words."""
    above = np.frombuffer(content, np.uint8) > 32
    return int(np.count_nonzero(above[1:] > above[:-1])) + int(above[:1].sum())


def index_bytes(lengths: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    """Return the ``.idx`` file of a shard, given the number of tokens in each document."""
    count = len(lengths)
    starts = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1], out=starts[1:])
    return b"".join(
        [
            IDX_HEADER.pack(IDX_MAGIC, IDX_VERSION, MEGATRON_CODES[dtype.name], count, count + 1),
            lengths.astype("<i4").tobytes(),
            (starts * dtype.itemsize).tobytes(),
            np.arange(count + 1, dtype="<i8").tobytes(),  # every sequence is a document
        ]
    )


def index_size(documents: int) -> int:
    """Return the size of an ``.idx`` file in bytes."""
    return IDX_HEADER.size + 12 * documents + 8 * (documents + 1)


@dataclass(frozen=True)
class SourceSpan:
    """Tokens ``[start, stop)`` of a split, which are whole documents from one source."""

    name: str
    weight: float
    start: int
    stop: int


class Split:
    """One split of a dataset, read as one stream of tokens across its shards.

    Shards are memory-mapped on first use, and at most ``MOST_OPEN_SHARDS`` stay mapped. Reading is thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        dtype: np.dtype[Any],
        totals: dict[str, Any],
        sources: Sequence[dict[str, Any]],
    ) -> None:
        self.name = name
        self.tokens: int = totals["tokens"]
        self.documents: int = totals["documents"]
        self.text_bytes: int = totals["text_bytes"]
        self.words: int = totals["words"]
        #: Bytes of text that are not in the tokens; 0 if an earlier version did not count them.
        self.lost_bytes: int = totals.get("lost_bytes") or 0
        self.records = [ShardRecord(**record) for record in totals["shards"]]
        self._directory = directory
        self._dtype = dtype
        self._sources = sources
        self._ends = list(accumulate(record.tokens for record in self.records))
        self._tokens_of = lru_cache(maxsize=MOST_OPEN_SHARDS)(self._map)

    @property
    def counted_bytes(self) -> int:
        """The bytes of text that the tokens stand for, over which bits per byte are taken."""
        return counted_bytes(self.text_bytes, self.lost_bytes)

    @property
    def source_spans(self) -> list[SourceSpan]:
        """The range of each source's tokens in the stream, in order; sources without tokens here are omitted."""
        spans: list[SourceSpan] = []
        stop = 0
        for number, records in groupby(self.records, lambda record: record.source):
            start, stop = stop, stop + sum(record.tokens for record in records)
            spans.append(SourceSpan(self._sources[number]["name"], self._sources[number]["weight"], start, stop))
        return spans

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)`` of the stream: ``uint16`` or ``int32``, shape ``(stop - start,)``.

        The array may be a read-only view of the file; copy it before modifying it.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.tokens}")
        parts = list(self._pieces(start, stop))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill ``out``, a one-dimensional integer array, with tokens starting at ``start``."""
        if not 0 <= start <= self.tokens - len(out):
            raise IndexError(f"tokens {start} to {start + len(out)} of a split of {self.tokens}")
        filled = 0
        for part in self._pieces(start, start + len(out)):
            out[filled : filled + len(part)] = part
            filled += len(part)

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the same tokens as read-only views of their shards."""
        shard = bisect_right(self._ends, start)
        while start < stop:
            shard_start = self._ends[shard] - self.records[shard].tokens
            shard_stop = min(stop, self._ends[shard])
            yield self._tokens_of(shard)[start - shard_start : shard_stop - shard_start]
            start = shard_stop
            shard += 1

    def document_lengths(self) -> np.ndarray:
        """Return the number of tokens per document, including end-of-text: ``int32``, shape ``(documents,)``."""
        lengths = [self.shard_lengths(record) for record in self.records]
        return np.concatenate(lengths) if lengths else np.empty(0, np.int32)

    def shard_lengths(self, record: ShardRecord) -> np.ndarray:
        """Return ``document_lengths`` for one shard."""
        path = self._directory / f"{record.name}.idx"
        return np.fromfile(path, dtype="<i4", count=record.documents, offset=IDX_HEADER.size)

    def _map(self, shard: int) -> np.ndarray:
        path = self._directory / f"{self.records[shard].name}.bin"
        # A plain array around the map: slicing np.memmap itself takes microseconds each time.
        return np.asarray(np.memmap(path, dtype=self._dtype, mode="r"))


class TokenStream(Protocol):
    """Tokens that can be read like a ``Split``."""

    tokens: int

    def read(self, start: int, stop: int) -> np.ndarray: ...


def token_counts(split: TokenStream, vocab_size: int) -> np.ndarray:
    """Count how often each token occurs: int64, shape ``(vocab_size,)``. Reads the split block by block."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, split.tokens, COUNTED_TOKENS):
        counts += np.bincount(split.read(start, min(start + COUNTED_TOKENS, split.tokens)), minlength=vocab_size)
    return counts


class Dataset:
    """A finished dataset, checked when it was opened. Use ``open_dataset`` to get one."""

    def __init__(self, directory: Path, manifest: dict[str, Any], fingerprint: str) -> None:
        self.directory = directory
        self.manifest = manifest
        #: SHA-256 of manifest.json. The manifest has the checksum of every file, so this identifies all content.
        self.fingerprint = fingerprint
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._code = MEGATRON_CODES[self._dtype.name]
        self._splits = {
            name: Split(directory, name, self._dtype, manifest["splits"][name], manifest["sources"]) for name in SPLITS
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that produced the tokens."""
        return load_tokenizer(self.directory / TOKENIZER_FILE)

    def split(self, name: str) -> Split:
        """Return the split ``train`` or ``validation``; an empty split has no tokens."""
        if name not in self._splits:
            raise UserError(f'there is no split "{name}": choose {" or ".join(SPLITS)}')
        return self._splits[name]

    def check_files(self) -> None:
        """Raise ``UserError`` unless every file exists with the right size and header. Reads no tokens."""
        for made_by in ("tokenizer", "visual_tokenizer"):
            entry = self.manifest.get(made_by)
            if entry and not (
                (path := self.directory / entry["file"]).is_file() and sha256_of_file(path) == entry["sha256"]
            ):
                raise UserError(
                    f'"{path}" is missing or not the tokenizer that produced these tokens: build the dataset again'
                )
        with os.scandir(self.directory) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        for split in self._splits.values():
            for record in split.records:
                self._check_size(sizes, f"{record.name}.bin", record.tokens * self._dtype.itemsize)
                self._check_size(sizes, f"{record.name}.idx", index_size(record.documents))
                self._check_header(record)

    def _check_size(self, sizes: dict[str, int], name: str, expected: int) -> None:
        path = f"{self.directory}/{name}"
        if name not in sizes:
            raise UserError(f'"{path}" is missing: copy or build the whole dataset again')
        if sizes[name] != expected:
            raise UserError(f'"{path}" has {sizes[name]:,} bytes instead of {expected:,}: copy or build it again')

    def _check_header(self, record: ShardRecord) -> None:
        path = f"{self.directory}/{record.name}.idx"
        descriptor = os.open(path, READING)  # a Path and a file object take three times as long
        header = os.read(descriptor, IDX_HEADER.size)
        os.close(descriptor)
        if header != IDX_HEADER.pack(IDX_MAGIC, IDX_VERSION, self._code, record.documents, record.documents + 1):
            raise UserError(f'"{path}" does not match the manifest: build the dataset again')

    def verify(self, on_file: Callable[[str, int], None] = lambda name, size: None) -> None:
        """Read everything, and raise ``UserError`` at the first file that has changed since the build.

        Documents must also end where their end-of-text tokens are. Only an import can have such tokens inside
        documents, and says how many. ``on_file`` is called with the name and size of each intact file.
        """
        inside = 0
        shards = [(split, record) for split in self._splits.values() for record in split.records]
        with ThreadPoolExecutor(VERIFYING_THREADS) as threads:  # hashing releases the interpreter lock
            checks = [threads.submit(self._verify_shard, split, record) for split, record in shards]
            try:
                for (_, record), check in zip(shards, checks, strict=True):
                    inside += check.result()
                    on_file(f"{record.name}.bin", record.tokens * self._dtype.itemsize)
                    on_file(f"{record.name}.idx", index_size(record.documents))
            finally:
                threads.shutdown(cancel_futures=True)
        # Earlier imports did not count them.
        settings = self.manifest["settings"]
        if inside != settings.get(ENDS_INSIDE, inside if "converted_from" in settings else 0):
            raise UserError(
                f'"{self.directory}" has {inside:,} end-of-text tokens inside documents, where the text spells the '
                "token: build the dataset again, or train on it as it is with --verify-data false"
            )

    def _verify_shard(self, split: Split, record: ShardRecord) -> int:
        """Check one shard, and return how many end-of-text tokens are inside its documents."""
        for suffix, expected in ((".bin", record.bin_sha256), (".idx", record.idx_sha256)):
            path = self.directory / (record.name + suffix)
            if sha256_of_file(path) != expected:
                raise UserError(f'"{path}" is damaged: its checksum differs from the one in {MANIFEST}')
        lengths = split.shard_lengths(record)
        index = (self.directory / f"{record.name}.idx").read_bytes()
        if int(lengths.sum()) != record.tokens or index != index_bytes(lengths, self._dtype):
            raise UserError(f'"{self.directory / record.name}.idx" is inconsistent: build the dataset again')
        tokens = np.memmap(self.directory / f"{record.name}.bin", dtype=self._dtype, mode="r")
        ends, end_of_text = np.cumsum(lengths, dtype=np.int64) - 1, self.manifest["tokenizer"]["end_of_text_id"]
        if int(tokens.max()) >= self.vocab_size or np.any(tokens[ends] != end_of_text):
            raise UserError(f'"{self.directory / record.name}.bin" contains tokens that its tokenizer cannot produce')
        blocks = (tokens[start : start + COUNTED_TOKENS] for start in range(0, record.tokens, COUNTED_TOKENS))
        return sum(int(np.count_nonzero(block == end_of_text)) for block in blocks) - record.documents


def open_dataset(directory: str | Path) -> Dataset:
    """Open a finished dataset. Only sizes and headers are checked, so this is fast for datasets of any size.

    Raises ``UserError`` if the directory is not a finished dataset, or if a file is missing or has the wrong size.
    """
    directory = Path(directory)
    if directory.is_file():
        made = f"{command('prep build')} {text_and_out(directory)}"
        raise UserError(f'"{directory}" is a file, not a Kindling dataset; make one with: {made}')
    if not directory.is_dir():
        raise UserError(f'there is no folder "{directory}"')
    path = directory / MANIFEST
    if not path.is_file() and (directory / JOURNAL).is_file():
        raise UserError(f'the build of "{directory}" is not finished: run the same build command again to resume it')
    if not path.is_file():
        raise UserError(
            f'"{directory}" is not a Kindling dataset (it has no {MANIFEST}); '
            f"make one with: {command('prep build')} {text_and_out(directory)}"
        )
    content = path.read_bytes()
    dataset = _parse_manifest(directory, content)
    dataset.check_files()
    return dataset


def _parse_manifest(directory: Path, content: bytes) -> Dataset:
    path = directory / MANIFEST
    try:
        manifest = parse_json(content)
        if manifest["format"] == IMAGES_FORMAT:
            raise UserError(f'"{directory}" is a dataset of images, not of text')
        if manifest["format"] != FORMAT_NAME:
            raise ValueError
        version = manifest["version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f'"{path}" has version {version}, but this program reads version {FORMAT_VERSION}: build it again'
            )
        return Dataset(directory, manifest, hashlib.sha256(content).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'"{path}" is damaged or not a manifest of {FORMAT_NAME}: build the dataset again') from None
