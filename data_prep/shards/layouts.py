"""The token files of other programs: how to read each layout, and how to write its companion files.

All layouts contain concatenated little-endian tokens. They differ in the header and in the files that accompany the
tokens. ``docs/shard-format.md`` has the table.
"""

from __future__ import annotations

import csv
import gzip
import io
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.settings import LARGEST_SHARD_TOKENS
from data_prep.shards.tokens import IDX_HEADER, IDX_MAGIC, IDX_VERSION
from data_prep.tokenizers.tokenizer import token_dtype

# The layouts by their names on the command line, with the suffix of their token files.
SUFFIXES = {"nanogpt": ".bin", "llmc": ".bin", "datatrove": ".ds", "olmo": ".npy", "megatron": ".bin"}

LLMC_HEADER_BYTES = 1024
LLMC_LARGEST_FILE = 2**31 - 1  # llm.c's reader stores the position in a C int
LLMC_MAGICS: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic: (version, type of the tokens)
LLMC_MAGIC_OF_SIZE = {dtype.itemsize: magic for magic, (_, dtype) in LLMC_MAGICS.items()}

MEGATRON_DTYPES = {code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8"), 1)} | {
    8: np.dtype("<u2")
}
BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A token file of another program: where its tokens are, and the lengths of its documents if known."""

    path: Path
    dtype: np.dtype[Any]
    offset: int = 0  # bytes before the first token
    lengths: np.ndarray | None = None  # int64, (documents,)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped, shape ``(tokens,)``."""
        if self.path.stat().st_size == self.offset:
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset))


def read_token_file(path: Path, layout: str, vocab_size: int) -> TokenFile:
    """Examine a file of a layout in ``SUFFIXES`` and its companion files, without reading tokens.

    ``vocab_size`` determines the width of the tokens if nothing else does. Raises ``UserError`` for a file that is
    truncated or has another layout.
    """
    if layout == "nanogpt":
        return _read_nanogpt(path)
    if layout == "llmc":
        return _read_llmc(path)
    if layout == "datatrove":
        return _read_datatrove(path, vocab_size)
    if layout == "olmo":
        return _read_olmo(path, vocab_size)
    return _read_megatron(path)


def _read_nanogpt(path: Path) -> TokenFile:
    if _beginning(path, 4) in {struct.pack("<i", magic) for magic in LLMC_MAGICS}:
        raise UserError(f'"{path}" has the header of llm.c: use --from llmc')
    return _without_index(path, np.dtype("<u2"))


def _read_llmc(path: Path) -> TokenFile:
    header = _beginning(path, LLMC_HEADER_BYTES)
    if len(header) < LLMC_HEADER_BYTES:
        raise UserError(f'"{path}" is shorter than the header of llm.c: it is truncated or has another layout')
    magic, version, count = struct.unpack_from("<3i", header)
    if magic not in LLMC_MAGICS or LLMC_MAGICS[magic][0] != version:
        raise UserError(
            f'"{path}" does not start with a magic number and version of llm.c: does it have another layout?'
        )
    dtype = LLMC_MAGICS[magic][1]
    _check_size(path, LLMC_HEADER_BYTES + count * dtype.itemsize, f"its header says {count:,} tokens")
    return TokenFile(path, dtype, LLMC_HEADER_BYTES)


def _read_datatrove(path: Path, vocab_size: int) -> TokenFile:
    metadata, index = Path(f"{path}.metadata"), Path(f"{path}.index")
    dtype = _datatrove_dtype(metadata) if metadata.is_file() else None
    if not index.is_file():
        return _without_index(path, dtype or _unsigned(token_dtype(vocab_size)))
    content = index.read_bytes()
    if len(content) % 8:
        raise UserError(f'"{index}" has {len(content):,} bytes, which is not a multiple of 8: copy it again')
    return _with_index(path, index, np.frombuffer(content, "<u8").astype(np.int64), dtype)


def _datatrove_dtype(metadata: Path) -> np.dtype[Any]:
    first = metadata.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    sizes: dict[str, np.dtype[Any]] = {"2": np.dtype("<u2"), "4": np.dtype("<u4")}
    size = first.rpartition("|")[2].strip()
    if size not in sizes:
        raise UserError(
            f'"{metadata}" does not start with a tokenizer, | and 2 or 4 (bytes per token): fix or remove it'
        )
    return sizes[size]


def _read_olmo(path: Path, vocab_size: int) -> TokenFile:
    if _beginning(path, 6) == b"\x93NUMPY":
        raise UserError(f'"{path}" has a NumPy header; OLMo files contain bare tokens despite their name')
    index = path.with_suffix(".csv.gz")
    if not index.is_file():
        return _without_index(path, _unsigned(token_dtype(vocab_size)))
    ends = array("q")
    expected = 0
    try:
        with gzip.open(index, "rt", encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                start, end = int(row[0]), int(row[1])
                if start != expected:
                    raise UserError(f'"{index}" has a gap before token {start:,}: its documents must be adjacent')
                ends.append(end)
                expected = end
    except (OSError, EOFError, ValueError, IndexError, csv.Error):
        raise UserError(f'"{index}" is damaged, or its rows do not start with start,end: copy it again') from None
    return _with_index(path, index, np.array(ends, np.int64), None)


def _read_megatron(path: Path) -> TokenFile:
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise UserError(f'"{path}" has no index: "{index.name}" must be in the same folder')
    content = index.read_bytes()
    if len(content) < IDX_HEADER.size or content[: len(IDX_MAGIC)] != IDX_MAGIC:
        raise UserError(f'"{index}" is not a Megatron index: it does not start with the magic bytes')
    _, version, code, sequences, bounds = IDX_HEADER.unpack_from(content)
    if version != IDX_VERSION or code not in MEGATRON_DTYPES:
        raise UserError(
            f'"{index}" has version {version} and type {code}: only version 1 with integer types can be read'
        )
    # A final array of one byte per sequence, the modes, may follow.
    sizes = {IDX_HEADER.size + 12 * sequences + 8 * bounds + modes for modes in (0, sequences)}
    if bounds == 0 or len(content) not in sizes:
        raise UserError(f'"{index}" has {len(content):,} bytes, which does not match its header: copy it again')
    lengths = np.frombuffer(content, "<i4", sequences, IDX_HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, IDX_HEADER.size + 4 * sequences)
    documents = np.frombuffer(content, "<i8", bounds, IDX_HEADER.size + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    dtype = MEGATRON_DTYPES[code]
    in_order = documents[0] == 0 and documents[-1] == sequences and bool((np.diff(documents) >= 0).all())
    if not in_order or not np.array_equal(ends[:-1] * dtype.itemsize, pointers):
        raise UserError(f'"{index}" does not describe adjacent documents from the start of the file: make it again')
    return _with_index(path, index, ends[documents[1:]], dtype)


def _beginning(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"<u{dtype.itemsize}")


def _check_size(path: Path, expected: int, reason: str) -> None:
    size = path.stat().st_size
    if size != expected:
        raise UserError(f'"{path}" has {size:,} bytes, but {reason}: it is truncated or has another layout')


def _without_index(path: Path, dtype: np.dtype[Any]) -> TokenFile:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UserError(
            f'"{path}" has {size:,} bytes, which is not a multiple of {dtype.itemsize}: '
            "it is truncated or has another layout"
        )
    return TokenFile(path, dtype)


def _with_index(path: Path, index: Path, ends: np.ndarray, dtype: np.dtype[Any] | None) -> TokenFile:
    """``ends`` are the ends of documents in tokens; without a dtype, it follows from the size of the file."""
    lengths = np.diff(ends, prepend=0)
    if np.any(lengths < 0):
        raise UserError(f'"{index}" has decreasing positions: it is damaged or has another layout')
    count = int(ends[-1]) if ends.size else 0
    if dtype is None:
        dtype = np.dtype("<u4") if path.stat().st_size == 4 * count else np.dtype("<u2")
    _check_size(path, count * dtype.itemsize, f'"{index.name}" says {count:,} tokens')
    return TokenFile(path, dtype, lengths=lengths)


def check_ids(file: TokenFile, vocab_size: int) -> None:
    """Raise ``UserError`` at the first token that is not below ``vocab_size``."""
    tokens = file.tokens
    for start in range(0, tokens.size, BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            at = int(np.argmax((block >= vocab_size) | (block < 0)))
            raise UserError(
                f'token {start + at:,} of "{file.path}" is {block[at]}, but the tokenizer has {vocab_size:,} tokens: '
                "pass the --tokenizer that produced the file"
            )


def documents_of(files: Sequence[TokenFile], end_of_text_id: int) -> Iterator[np.ndarray]:
    """Yield the documents of one split in the order of the files.

    Without an index, a document ends with each end-of-text token, and may span several files. Raises ``UserError`` if
    it is then longer than a shard can be.
    """
    begun: list[np.ndarray] = []
    for file in files:
        tokens = file.tokens
        if file.lengths is not None and begun:
            yield _joined(begun, file.path)
            begun = []
        start = 0
        for end in _ends(tokens, end_of_text_id) if file.lengths is None else np.cumsum(file.lengths).tolist():
            yield _joined([*begun, tokens[start:end]], file.path)
            begun = []
            start = end
        if start < tokens.size:
            begun.append(tokens[start:])
    if begun:
        yield _joined(begun, files[-1].path)


def _joined(parts: list[np.ndarray], path: Path) -> np.ndarray:
    size = sum(part.size for part in parts)
    if size > LARGEST_SHARD_TOKENS:
        raise UserError(
            f'"{path}" has a document of {size:,} tokens, more than the {LARGEST_SHARD_TOKENS:,} of a shard: '
            "is the end-of-text token of the --tokenizer the one in the file?"
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _ends(tokens: np.ndarray, end_of_text_id: int) -> Iterator[int]:
    for start in range(0, tokens.size, BLOCK_TOKENS):
        found = np.flatnonzero(tokens[start : start + BLOCK_TOKENS] == end_of_text_id)
        yield from (found + start + 1).tolist()


def nanogpt_meta(vocab_size: int) -> bytes:
    """Return ``meta.pkl``: the dictionary ``{"vocab_size": …}`` in pickle protocol 0, which is text."""
    return f"(dVvocab_size\nI{vocab_size}\ns.".encode("ascii")


def llmc_header(tokens: int, dtype: np.dtype[Any]) -> bytes:
    """Return the header of an llm.c file with ``tokens`` tokens: 1,024 bytes."""
    magic = LLMC_MAGIC_OF_SIZE[dtype.itemsize]
    return struct.pack("<3i", magic, LLMC_MAGICS[magic][0], tokens).ljust(LLMC_HEADER_BYTES, b"\0")


def datatrove_index(lengths: np.ndarray) -> bytes:
    """Return ``.ds.index``: where each document ends, in tokens."""
    return np.cumsum(lengths, dtype=np.int64).astype("<u8").tobytes()


def datatrove_metadata(tokenizer: str, tokens: int, dtype: np.dtype[Any]) -> str:
    """Return ``.ds.metadata``: tokenizer, bytes per token, and the number of tokens, twice."""
    return f"{tokenizer}|{dtype.itemsize}\n{tokens}\n{tokens:,} tokens"


def olmo_index(lengths: np.ndarray, name: str, first_document: int) -> bytes:
    """Return ``.csv.gz``: start, end, id, source and number of each document. The bytes are reproducible."""
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as compressed,
        io.TextIOWrapper(compressed, encoding="utf-8", newline="") as text,
    ):
        writer = csv.writer(text, lineterminator="\n")
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), first_document):
            writer.writerow((start, end, f"{name}-{number}", name, number))
    return buffer.getvalue()
