"""Decide which documents are held out for validation, and compute the checksum of a part of the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data_prep.errors import UserError
from data_prep.settings import SMALLEST_MAX_DOCUMENT_BYTES

HASH_RANGE = 2**64


def hash_of(content: bytes) -> int:
    """Return the 64-bit hash that determines a document's split; equal texts are in the same split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


class PartDigest:
    """SHA-256 over the lengths in bytes and 64-bit hashes (8 bytes each, little-endian) of a part's documents."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, contents: Sequence[bytes], hashes: Sequence[int]) -> None:
        """Add documents with their ``hash_of``."""
        for content, document_hash in zip(contents, hashes, strict=True):
            self._hash.update(len(content).to_bytes(8, "little") + document_hash.to_bytes(8, "little"))

    def hexdigest(self) -> str:
        """Return the checksum of all documents added so far."""
        return self._hash.hexdigest()


class SplitRule:
    """Choose the hash below which documents are validation, from the hashes of the corpus.

    It is the given fraction of the hash range. For small corpora, it leaves at least one document on each side.
    """

    def __init__(self, validation_fraction: float) -> None:
        self._threshold = int(validation_fraction * HASH_RANGE)
        self._documents = 0
        self._below = 0
        self._smallest = HASH_RANGE
        self._largest = -1

    @property
    def settled(self) -> bool:
        """Whether further hashes cannot change the threshold."""
        return self._threshold == 0 or 0 < self._below < self._documents

    @property
    def all_equal(self) -> bool:
        """Whether a split is wanted but there is nothing to divide: no hashes yet, or all are the same."""
        return self._threshold > 0 and self._smallest >= self._largest

    def add(self, document_hash: int) -> None:
        """Take the hash of one document into account."""
        self._documents += 1
        self._below += document_hash < self._threshold
        self._smallest = min(self._smallest, document_hash)
        self._largest = max(self._largest, document_hash)

    def threshold(self, text_bytes: int, removed: str = "") -> int:
        """Return the threshold.

        If there is only one document, ``text_bytes``, the size of all text, is for advice, and ``removed`` says what
        cleaning did.
        """
        if self._threshold == 0:
            return 0
        if self.all_equal:
            one = "there is only one document" if self._documents == 1 else "all documents are identical"
            one += f" ({removed})" if removed else ""
            piece = text_bytes // 20
            cut = f"cut it with --max-document-bytes {piece}" if piece >= SMALLEST_MAX_DOCUMENT_BYTES else "add text"
            raise UserError(
                f"{one}, too few for a validation split: {cut}, or skip validation with --validation-fraction 0"
            )
        if self._below == 0:
            return self._smallest + 1
        return self._largest if self._below == self._documents else self._threshold
