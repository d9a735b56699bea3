"""Documents that occur more than once in a corpus, exactly or nearly, found over all its parts.

First each part's documents become records of fixed size (``signatures``), anywhere and in any order. Then all records
are compared (``find_duplicates``); texts are not needed any more. In each group of duplicates the first document of the
corpus is kept.

Exact: 128 bits of BLAKE2b of the UTF-8 text. Near: MinHash over runs of five words (Broder 1997, "On the resemblance
and containment of documents"), with candidates by bands of its values (Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4) and the share of equal values as the estimate of the Jaccard similarity. The MinHash
values are those of the package rensa, whose estimates scatter no more than MinHash's.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.ngrams import Hashes, WordHashes, ngram_hashes, plain_words
from data_prep.cleaning.settings import EXACT, NEAR
from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.cleaning.settings import CleaningSettings

SHINGLE_WORDS = 5
MINHASH_VALUES = 128
MINHASH_SEED = 1
# A pair just at the threshold becomes a candidate with at least this chance, a more similar one with a higher.
CANDIDATE_CHANCE = 0.94
EXACT_RECORD = np.dtype([("hash", "<u8", (2,))])
NEAR_RECORD = np.dtype([("hash", "<u8", (2,)), ("minhash", "<u4", (MINHASH_VALUES,))])
# What one pass over the records may hold; a larger corpus takes more passes.
PASS_BYTES = 512 << 20
_EXACT_BYTES_A_DOCUMENT = 80  # measured: record, place, order and their sorted copies
_BLOCK_RECORDS = 1 << 14
_PAIRS_AT_ONCE = 1 << 12
_MOST_SHINGLES_OF_AN_ARRAY = 1 << 15
_BAND_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_word_hashes = WordHashes()


def signatures(texts: Sequence[str], how: str, settings: CleaningSettings) -> bytes:
    """The records of these texts, one after the other: 16 bytes each for "exact", 528 for "near".

    No setting changes them, ``near_threshold`` neither, so that records stay good when it changes. They are the same
    wherever and in whatever company a text is hashed. Raises ``UserError`` if "near" lacks its package.
    """
    records = np.zeros(len(texts), _record_type(how))
    for place, text in enumerate(texts):
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        records["hash"][place] = np.frombuffer(digest, "<u8")
    if how == NEAR:
        records["minhash"] = _minhashes(texts)
    return records.tobytes()


def _record_type(how: str) -> np.dtype[np.void]:
    return EXACT_RECORD if how == EXACT else NEAR_RECORD


def _minhashes(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """The MinHash values of each text's shingles, ``(texts, MINHASH_VALUES)``."""
    values = np.empty((len(texts), MINHASH_VALUES), np.uint32)
    for row, text in zip(values, texts, strict=True):
        row[:] = _minhash(_shingles(text))
    return values


def _minhash(shingles: Hashes) -> list[int]:
    """The MinHash values of one set, without a thread: a worker process forked after rensa started some would hang.

    rensa starts them for arrays of 65,536 hashes and more, of one text or of many; for sets never, but is slower then.
    """
    try:
        from rensa import RMinHash  # an extra
    except ImportError:
        raise UserError('near duplicates need the package rensa: pip install "kindling-lm[cleaning]"') from None
    if len(shingles) > _MOST_SHINGLES_OF_AN_ARRAY:
        matrix = RMinHash.digest_matrix_from_token_hash_sets([shingles], MINHASH_VALUES, MINHASH_SEED)
    else:
        ends = np.array((0, len(shingles)), np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, ends, MINHASH_VALUES, MINHASH_SEED)
    values: list[int] = matrix.to_rows()[0]
    return values


def _shingles(text: str) -> Hashes:
    """Hashes of the runs of five words; of a shorter text, of all its words; of a text without words, of the text."""
    words = plain_words(text) or [text]
    return ngram_hashes(_word_hashes.of(words), min(SHINGLE_WORDS, len(words)))


def find_duplicates(files: Sequence[Path], how: str, settings: CleaningSettings) -> list[Flags]:
    """For each file of records, which of its documents repeat an earlier one of the corpus, ``(documents,)``.

    The order is that of the files and of the records in them. Exact: memory is ``PASS_BYTES`` and 1 byte a document,
    in as many passes as that takes. Near: a group is all that a chain of pairs joins whose estimated similarity
    reaches ``settings.near_threshold``; memory is about 70 bytes a document, and each band is a pass of its own.
    Raises ``UserError`` for a file that is no whole number of records.
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
        raise UserError(f'"{file}" is cut off or not made for "{how}" duplicates: delete it and build again')
    return np.memmap(file, record, "r") if size else np.zeros(0, record)


def _blocks(parts: Sequence[npt.NDArray[np.void]]) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
    """All records in order, some at a time, each time with the place of the first in the corpus."""
    place = 0
    for part in parts:
        for start in range(0, len(part), _BLOCK_RECORDS):
            block = part[start : start + _BLOCK_RECORDS]
            yield place + start, block
        place += len(part)


def _mark_exact(parts: Sequence[npt.NDArray[np.void]], duplicate: Flags) -> None:
    passes = max(1, -(-len(duplicate) * _EXACT_BYTES_A_DOCUMENT // PASS_BYTES))
    for number in range(passes):
        found = [
            (block["hash"][mine], first + np.flatnonzero(mine))
            for first, block in _blocks(parts)
            if (mine := block["hash"][:, 0] % np.uint64(passes) == number).any()
        ]
        if found:
            hashes = np.concatenate([hashes for hashes, _ in found])
            places = np.concatenate([places for _, places in found])
            order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in the corpus's order
            ordered = hashes[order]
            repeats = (ordered[1:] == ordered[:-1]).all(axis=1)
            duplicate[places[order[1:][repeats]]] = True


def band_rows(threshold: float) -> int:
    """Values in a band: as many as leave a pair at the threshold ``CANDIDATE_CHANCE`` to agree in a whole band."""
    rows = MINHASH_VALUES
    while rows > 1 and 1 - (1 - threshold**rows) ** (MINHASH_VALUES // rows) < CANDIDATE_CHANCE:
        rows //= 2
    return rows


def _mark_near(parts: Sequence[npt.NDArray[np.void]], duplicate: Flags, threshold: float) -> None:
    """Join the documents that are no exact repeats into groups, and mark all but the first of each."""
    places = np.flatnonzero(~duplicate)
    minhashes = _MinHashes(parts, places)
    groups = _Groups(len(places))
    rows = band_rows(threshold)
    for start in range(0, MINHASH_VALUES, rows):
        _join_band(minhashes.band_keys(start, rows), minhashes, groups, threshold)
    duplicate[places[groups.followers()]] = True


def _join_band(keys: Hashes, minhashes: _MinHashes, groups: _Groups, threshold: float) -> None:
    """Join the documents of equal keys that are similar enough.

    All of a bucket are compared with its first; those that are not like it form a smaller bucket, and so on.
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
    """The MinHash values of chosen documents, read from the records when they are needed."""

    def __init__(self, parts: Sequence[npt.NDArray[np.void]], places: Places) -> None:
        self._parts = parts
        self._places = places
        self._starts = np.cumsum([0, *map(len, parts)])

    def band_keys(self, start: int, rows: int) -> Hashes:
        """One number for the ``rows`` values from ``start`` on of each document, ``(documents,)``."""
        keys = np.empty(len(self._places), np.uint64)
        for first, block in _blocks(self._parts):
            begin, end = np.searchsorted(self._places, (first, first + len(block)))
            band = block["minhash"][self._places[begin:end] - first, start : start + rows]
            keys[begin:end] = _mixed(band)
        return keys

    def similar(self, left: Places, right: Places, threshold: float) -> Flags:
        """Whether the estimated similarity of each pair of documents reaches the threshold, ``(pairs,)``."""
        fewest_equal = threshold * MINHASH_VALUES
        found = np.empty(len(left), np.bool_)
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            found[some] = (self._values(left[some]) == self._values(right[some])).sum(axis=1) >= fewest_equal
        return found

    def _values(self, documents: Places) -> npt.NDArray[np.uint32]:
        places = self._places[documents]
        values = np.empty((len(places), MINHASH_VALUES), np.uint32)
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(numbers):
            mine = numbers == number
            values[mine] = self._parts[number]["minhash"][places[mine] - self._starts[number]]
        return values


def _mixed(band: npt.NDArray[np.uint32]) -> Hashes:
    """A polynomial in each row's values modulo 2^64. Rows that agree by chance are told apart when compared."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = keys * _BAND_MULTIPLIER + column
    return keys


class _Groups:
    """Documents joined into groups (union-find); each group goes by its first document."""

    def __init__(self, documents: int) -> None:
        self._parents = np.arange(documents)

    def join(self, left: Places, right: Places) -> None:
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            first, second = sorted((self._first(one), self._first(other)))
            self._parents[second] = first

    def _first(self, document: int) -> int:
        while (parent := int(self._parents[document])) != document:
            self._parents[document] = self._parents[parent]
            document = parent
        return document

    def followers(self) -> Flags:
        """Which documents are not the first of their group; a root is its own parent."""
        return self._parents != np.arange(len(self._parents))
