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
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import UserError
from data_prep.errors.command_names import command, text_and_out
from data_prep.files import atomic_file, is_remote, parse_json
from data_prep.settings import DEFAULT_SHARD_TOKENS
from data_prep.shards.folder import Folder, LocalFolder, Numbers, StoredFile
from data_prep.shards.writing import PartWriter
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.loss import NO_LOSS, Loss, counted_bytes
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

if TYPE_CHECKING:
    from data_prep.shards.remote import Access

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
MOST_OPEN_SHARDS = 4096  # Linux allows 65,530 maps per process

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

    Shards are opened on first use, those on this machine as memory maps, and at most ``MOST_OPEN_SHARDS`` stay open.
    Reading is thread-safe.
    """

    def __init__(
        self,
        folder: Folder,
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
        self.is_remote = folder.is_remote
        self._folder = folder
        self._dtype = dtype
        self._sources = sources
        self._ends = list(accumulate(record.tokens for record in self.records))
        self._tokens_of = lru_cache(maxsize=MOST_OPEN_SHARDS)(self._open)

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

    def announce(self, start: int, stop: int) -> None:
        """Say that tokens ``[start, stop)`` are going to be read: from a store, they are fetched meanwhile."""
        size = self._dtype.itemsize
        for shard, first, last in self._spans(start, stop):
            self._folder.announce(self.bin_file(self.records[shard]), first * size, last * size)

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the same tokens as read-only views of their shards."""
        for shard, first, last in self._spans(start, stop):
            yield self._tokens_of(shard)[first:last]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield which tokens, ``[first, last)``, of which shards these are."""
        shard = bisect_right(self._ends, start)
        while start < stop:
            shard_start = self._ends[shard] - self.records[shard].tokens
            shard_stop = min(stop, self._ends[shard])
            yield shard, start - shard_start, shard_stop - shard_start
            start = shard_stop
            shard += 1

    def document_lengths(self) -> np.ndarray:
        """Return the number of tokens per document, including end-of-text: ``int32``, shape ``(documents,)``."""
        lengths = [self.shard_lengths(record) for record in self.records]
        return np.concatenate(lengths) if lengths else np.empty(0, np.int32)

    def shard_lengths(self, record: ShardRecord) -> np.ndarray:
        """Return ``document_lengths`` for one shard."""
        content = self._folder.open(self.idx_file(record), np.dtype(np.uint8))
        return np.array(content[IDX_HEADER.size : IDX_HEADER.size + 4 * record.documents]).view("<i4")

    def bin_file(self, record: ShardRecord) -> StoredFile:
        """The file of a shard's tokens."""
        return StoredFile(f"{record.name}.bin", record.tokens * self._dtype.itemsize, record.bin_sha256)

    def idx_file(self, record: ShardRecord) -> StoredFile:
        """The file that says where a shard's documents begin."""
        return StoredFile(f"{record.name}.idx", index_size(record.documents), record.idx_sha256)

    def _open(self, shard: int) -> Numbers:
        return self._folder.open(self.bin_file(self.records[shard]), self._dtype)


class Dataset:
    """A finished dataset, checked when it was opened. Use ``open_dataset`` to get one."""

    def __init__(self, folder: Folder, manifest: dict[str, Any], fingerprint: str) -> None:
        self.folder = folder
        self.manifest = manifest
        #: SHA-256 of manifest.json. The manifest has the checksum of every file, so this identifies all content.
        self.fingerprint = fingerprint
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._code = MEGATRON_CODES[self._dtype.name]
        self._splits = {
            name: Split(folder, name, self._dtype, manifest["splits"][name], manifest["sources"]) for name in SPLITS
        }

    @property
    def location(self) -> str:
        """The path or URL of its folder."""
        return str(self.folder)

    @property
    def directory(self) -> Path:
        """Its folder on this machine. Raises UserError if it is elsewhere."""
        if not isinstance(self.folder, LocalFolder):
            raise UserError(f'this needs a dataset on this machine: copy "{self.location}" to a folder')
        return self.folder.path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that produced the tokens."""
        entry = self.manifest["tokenizer"]
        return load_tokenizer(self.folder.copy_of(entry["file"], entry["sha256"]))

    def split(self, name: str) -> Split:
        """Return the split ``train`` or ``validation``; an empty split has no tokens."""
        if name not in self._splits:
            raise UserError(f'there is no split "{name}": choose {" or ".join(SPLITS)}')
        return self._splits[name]

    def check_files(self) -> None:
        """Raise ``UserError`` unless every file exists with the right size and header. Reads no tokens."""
        for made_by in ("tokenizer", "visual_tokenizer"):
            if entry := self.manifest.get(made_by):
                self.folder.copy_of(entry["file"], entry["sha256"])
        shards = [(split, record) for split in self._splits.values() for record in split.records]
        self.folder.check_sizes([of(record) for split, record in shards for of in (split.bin_file, split.idx_file)])
        for split, record in shards:
            counts = (record.documents, record.documents + 1)
            header = IDX_HEADER.pack(IDX_MAGIC, IDX_VERSION, self._code, *counts)
            self.folder.check_header(split.idx_file(record).name, header)

    @property
    def is_verified(self) -> bool:
        """Whether everything that can still be read is known to be right, because it was verified before."""
        return self.folder.is_verified(self.fingerprint)

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
                for (split, record), check in zip(shards, checks, strict=True):
                    inside += check.result()
                    for file in (split.bin_file(record), split.idx_file(record)):
                        on_file(file.name, file.size)
            finally:
                threads.shutdown(cancel_futures=True)
        # Earlier imports did not count them.
        settings = self.manifest["settings"]
        if inside != settings.get(ENDS_INSIDE, inside if "converted_from" in settings else 0):
            raise UserError(
                f'"{self.location}" has {inside:,} end-of-text tokens inside documents, where the text spells the '
                "token: build the dataset again, or train on it as it is with --verify-data false"
            )
        self.folder.set_verified(self.fingerprint)

    def _verify_shard(self, split: Split, record: ShardRecord) -> int:
        """Check one shard, and return how many end-of-text tokens are inside its documents."""
        bin_file, idx_file = split.bin_file(record), split.idx_file(record)
        index = b"".join(self.folder.parts(idx_file))
        lengths = np.frombuffer(index, "<i4", record.documents, IDX_HEADER.size)
        sizes_fit = int(lengths.sum()) == record.tokens and bool((lengths > 0).all())
        if not sizes_fit or index != index_bytes(lengths, self._dtype):
            raise UserError(f'"{self.location}/{idx_file.name}" is inconsistent: build the dataset again')
        end_of_text, largest, found, at_ends, start = self.manifest["tokenizer"]["end_of_text_id"], 0, 0, 0, 0
        ends = np.cumsum(lengths, dtype=np.int64) - 1
        for part in self.folder.parts(bin_file):  # at its end, the checksum has been compared
            is_end = (tokens := np.frombuffer(part, self._dtype)) == end_of_text
            first, last = np.searchsorted(ends, (start, start + len(tokens)))
            largest = max(largest, int(tokens.max()))
            found += int(np.count_nonzero(is_end))
            at_ends += int(np.count_nonzero(is_end[ends[first:last] - start]))
            start += len(tokens)
        if largest >= self.vocab_size or at_ends != record.documents:
            raise UserError(f'"{self.location}/{bin_file.name}" contains tokens that its tokenizer cannot produce')
        return found - record.documents


def open_dataset(location: str | Path, access: Access | None = None) -> Dataset:
    """Open a finished dataset. Only sizes and headers are checked, so this is fast for datasets of any size.

    Args:
        location: its folder, or a URL.
        access: how a URL is read; None: with the defaults.

    Raises:
        UserError: it is not a finished dataset, or a file is missing or has the wrong size. Of a URL also as of
            ``RemoteFolder``.
    """
    if is_remote(location):
        from data_prep.shards.remote import Access, RemoteFolder  # rarely needed

        store = RemoteFolder(str(location), access or Access())
        return _checked(store, store.manifest(MANIFEST))
    directory = Path(location)
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
    return _checked(LocalFolder(directory), path.read_bytes())


def _checked(folder: Folder, content: bytes) -> Dataset:
    """The dataset with this manifest, after a look at its files."""
    dataset = _parse_manifest(folder, content)
    dataset.check_files()
    return dataset


def _parse_manifest(folder: Folder, content: bytes) -> Dataset:
    path = f"{folder}/{MANIFEST}"
    try:
        manifest = parse_json(content)
        if manifest["format"] == IMAGES_FORMAT:
            here = (
                ", which are read from this machine only: copy it to a folder" if folder.is_remote else ", not of text"
            )
            raise UserError(f'"{folder}" is a dataset of images{here}')
        if manifest["format"] != FORMAT_NAME:
            raise ValueError
        version = manifest["version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f'"{path}" has version {version}, but this program reads version {FORMAT_VERSION}: build it again'
            )
        return Dataset(folder, manifest, hashlib.sha256(content).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'"{path}" is damaged or not a manifest of {FORMAT_NAME}: build the dataset again') from None
