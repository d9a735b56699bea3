"""Find exact and near duplicates across all parts of a corpus.

First, the documents of each part become records of fixed size (``signatures``), on any machine and in any order. Then
all records are compared (``find_duplicates``), without the texts. Of each group of duplicates, the first document in
the corpus is kept.

Exact: 128 bits of BLAKE2b of the UTF-8 text. Near: MinHash over runs of five words (Broder 1997, "On the resemblance
and containment of documents"), with candidates from bands of its values (Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4) and the fraction of equal values as the estimate of the Jaccard similarity. The
MinHash values come from the package rensa, whose estimates have the same variance as MinHash.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.ngrams import Hashes, WordHashes, ngram_hashes, plain_words
from data_prep.errors import UserError
from data_prep.settings import EXACT, INSTALL, NEAR, CleaningSettings

SHINGLE_WORDS = 5
MINHASH_VALUES = 128
MINHASH_SEED = 1
# A pair exactly at the threshold becomes a candidate with at least this probability, a more similar pair with more.
CANDIDATE_CHANCE = 0.94
EXACT_RECORD = np.dtype([("hash", "<u8", (2,))])
NEAR_RECORD = np.dtype([("hash", "<u8", (2,)), ("minhash", "<u4", (MINHASH_VALUES,))])
# Memory for one pass over the records; a larger corpus takes more passes.
PASS_BYTES = 512 << 20
_EXACT_BYTES_PER_DOCUMENT = 80  # measured: record, position, order and their sorted copies
_BLOCK_RECORDS = 1 << 14
_PAIRS_AT_ONCE = 1 << 12
_MOST_SHINGLES_OF_AN_ARRAY = 1 << 15
_BAND_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Positions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_word_hashes = WordHashes()


def signatures(texts: Sequence[str], how: str) -> bytes:
    """Return the concatenated records of these texts: 16 bytes each for "exact", 528 for "near".

    They do not depend on any other setting, on the machine, or on the other texts in the batch. Raises ``UserError`` if
    the package for "near" is not installed.
    """
    records = np.zeros(len(texts), _record_type(how))
    for index, text in enumerate(texts):
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        records["hash"][index] = np.frombuffer(digest, "<u8")
    if how == NEAR:
        records["minhash"] = _minhashes(texts)
    return records.tobytes()


def _record_type(how: str) -> np.dtype[np.void]:
    return EXACT_RECORD if how == EXACT else NEAR_RECORD


def _minhashes(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """Return the MinHash values of each text's shingles, shape ``(texts, MINHASH_VALUES)``."""
    values = np.empty((len(texts), MINHASH_VALUES), np.uint32)
    for row, text in zip(values, texts, strict=True):
        row[:] = _minhash(_shingles(text))
    return values


def _minhash(shingles: Hashes) -> list[int]:
    """Return the MinHash values of one set without starting threads: a worker forked after that would hang.

    rensa starts threads for arrays of 65,536 or more hashes, of one or several texts. For sets it never does, but is
    slower.
    """
    try:
        from rensa import RMinHash  # an extra
    except ImportError:
        raise UserError(f"near duplicates need the package rensa: {INSTALL}") from None
    if len(shingles) > _MOST_SHINGLES_OF_AN_ARRAY:
        matrix = RMinHash.digest_matrix_from_token_hash_sets([shingles], MINHASH_VALUES, MINHASH_SEED)
    else:
        ends = np.array((0, len(shingles)), np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, ends, MINHASH_VALUES, MINHASH_SEED)
    values: list[int] = matrix.to_rows()[0]
    return values


def _shingles(text: str) -> Hashes:
    """Return hashes of the runs of five words, or of all words of a shorter text, or of a text without words."""
    words = plain_words(text) or [text]
    return ngram_hashes(_word_hashes.of(words), min(SHINGLE_WORDS, len(words)))


def find_duplicates(files: Sequence[Path], how: str, settings: CleaningSettings) -> list[Flags]:
    """Return, for each file of records, which documents repeat an earlier one in the corpus, shape ``(documents,)``.

    Exact: uses ``PASS_BYTES`` plus 1 byte per document, in as many passes as needed. Near: a group is everything
    connected by a chain of pairs whose estimated similarity reaches ``settings.near_threshold``; uses about 70 bytes
    per document, with one pass per band. Raises ``UserError`` for a file that is not a whole number of records.
    """
    parts = [_records(file, how) for file in files]
    ends = np.cumsum([0, *map(len, parts)])
    duplicate = np.zeros(ends[-1], np.bool_)
    _mark_exact(parts, duplicate)
    if how == NEAR:
        _mark_near(parts, duplicate, settings.near_threshold)
    return [duplicate[start:end] for start, end in itertools.pairwise(ends)]


def _records(file: Path, how: str) -> npt.NDArray[np.void]:
    record = _record_type(how)
    size = file.stat().st_size
    if size % record.itemsize:
        raise UserError(f'"{file}" is truncated or not made for "{how}" duplicates: delete it and build again')
    return np.memmap(file, record, "r") if size else np.zeros(0, record)


def _blocks(parts: Sequence[npt.NDArray[np.void]]) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
    """Yield all records in order, in blocks, each with the position of its first record in the corpus."""
    position = 0
    for part in parts:
        for start in range(0, len(part), _BLOCK_RECORDS):
            block = part[start : start + _BLOCK_RECORDS]
            yield position + start, block
        position += len(part)


def _mark_exact(parts: Sequence[npt.NDArray[np.void]], duplicate: Flags) -> None:
    passes = max(1, -(-len(duplicate) * _EXACT_BYTES_PER_DOCUMENT // PASS_BYTES))
    for number in range(passes):
        found = [
            (block["hash"][mine], first + np.flatnonzero(mine))
            for first, block in _blocks(parts)
            if (mine := block["hash"][:, 0] % np.uint64(passes) == number).any()
        ]
        if found:
            hashes = np.concatenate([hashes for hashes, _ in found])
            positions = np.concatenate([positions for _, positions in found])
            order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in corpus order
            ordered = hashes[order]
            repeats = (ordered[1:] == ordered[:-1]).all(axis=1)
            duplicate[positions[order[1:][repeats]]] = True


def band_rows(threshold: float) -> int:
    """Return the values per band, such that a pair at the threshold shares a band with ``CANDIDATE_CHANCE``."""
    rows = MINHASH_VALUES
    while rows > 1 and 1 - (1 - threshold**rows) ** (MINHASH_VALUES // rows) < CANDIDATE_CHANCE:
        rows //= 2
    return rows


def _mark_near(parts: Sequence[npt.NDArray[np.void]], duplicate: Flags, threshold: float) -> None:
    """Group the documents that are not exact duplicates, and mark all but the first of each group."""
    positions = np.flatnonzero(~duplicate)
    minhashes = _MinHashes(parts, positions)
    groups = _Groups(len(positions))
    rows = band_rows(threshold)
    for start in range(0, MINHASH_VALUES, rows):
        _join_band(minhashes.band_keys(start, rows), minhashes, groups, threshold)
    duplicate[positions[groups.followers()]] = True


def _join_band(keys: Hashes, minhashes: _MinHashes, groups: _Groups, threshold: float) -> None:
    """Join documents with equal keys that are similar enough.

    Each bucket is compared with its first document; those that are not similar to it form a smaller bucket, and so on.
    """
    waiting = np.argsort(keys, kind="stable")
    keys = keys[waiting]
    while len(waiting):
        begins = np.ones(len(keys), np.bool_)
        begins[1:] = keys[1:] != keys[:-1]
        leaders = waiting[begins][np.cumsum(begins) - 1][~begins]
        waiting, keys = waiting[~begins], keys[~begins]
        similar = minhashes.similar(leaders, waiting, threshold)
        groups.join(leaders[similar], waiting[similar])
        waiting, keys = waiting[~similar], keys[~similar]


class _MinHashes:
    """The MinHash values of selected documents, read from the records on demand."""

    def __init__(self, parts: Sequence[npt.NDArray[np.void]], positions: Positions) -> None:
        self._parts = parts
        self._positions = positions
        self._starts = np.cumsum([0, *map(len, parts)])

    def band_keys(self, start: int, rows: int) -> Hashes:
        """Combine ``rows`` values of each document, from ``start``, into one number; shape ``(documents,)``."""
        keys = np.empty(len(self._positions), np.uint64)
        for first, block in _blocks(self._parts):
            begin, end = np.searchsorted(self._positions, (first, first + len(block)))
            band = block["minhash"][self._positions[begin:end] - first, start : start + rows]
            keys[begin:end] = _mixed(band)
        return keys

    def similar(self, left: Positions, right: Positions, threshold: float) -> Flags:
        """Return whether the estimated similarity of each pair reaches the threshold, shape ``(pairs,)``."""
        fewest_equal = threshold * MINHASH_VALUES
        found = np.empty(len(left), np.bool_)
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            found[some] = (self._values(left[some]) == self._values(right[some])).sum(axis=1) >= fewest_equal
        return found

    def _values(self, documents: Positions) -> npt.NDArray[np.uint32]:
        positions = self._positions[documents]
        values = np.empty((len(positions), MINHASH_VALUES), np.uint32)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers):
            mine = numbers == number
            values[mine] = self._parts[number]["minhash"][positions[mine] - self._starts[number]]
        return values


def _mixed(band: npt.NDArray[np.uint32]) -> Hashes:
    """Return a polynomial in each row's values modulo 2^64. Chance collisions are resolved by the comparison."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = keys * _BAND_MULTIPLIER + column
    return keys


class _Groups:
    """Documents joined into groups (union-find); each group is represented by its first document."""

    def __init__(self, documents: int) -> None:
        self._parents = np.arange(documents)

    def join(self, left: Positions, right: Positions) -> None:
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            first, second = sorted((self._first(one), self._first(other)))
            self._parents[second] = first

    def _first(self, document: int) -> int:
        while (parent := int(self._parents[document])) != document:
            self._parents[document] = self._parents[parent]
            document = parent
        return document

    def followers(self) -> Flags:
        """Return which documents are not the first of their group; a root is its own parent."""
        return self._parents != np.arange(len(self._parents))
