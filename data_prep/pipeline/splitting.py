"""Which documents are kept for validation, and the checksum of a part of the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data_prep.errors import UserError
from data_prep.sources.documents import SMALLEST_MAX_DOCUMENT_BYTES

HASH_RANGE = 2**64


def hash_of(content: bytes) -> int:
    """The 64-bit hash that decides a document's split; equal texts fall on the same side."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


class PartDigest:
    """SHA-256 over the documents of a part in order: of each, its length in bytes and its 64-bit hash (8 bytes each,
    little-endian)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, contents: Sequence[bytes], hashes: Sequence[int]) -> None:
        """Add documents, each with its ``hash_of``."""
        for content, document_hash in zip(contents, hashes, strict=True):
            self._hash.update(len(content).to_bytes(8, "little") + document_hash.to_bytes(8, "little"))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class SplitRule:
    """Chooses the hash below which documents are validation, once all hashes have been seen.

    It is the fraction of the hash range. Small corpora get a border that leaves at least one document on each side.
    ``settled`` says that further hashes can change nothing.
    """

    def __init__(self, validation_fraction: float) -> None:
        self._border = int(validation_fraction * HASH_RANGE)
        self._documents = 0
        self._below = 0
        self._smallest = HASH_RANGE
        self._largest = -1

    @property
    def settled(self) -> bool:
        return self._border == 0 or 0 < self._below < self._documents

    def add(self, document_hash: int) -> None:
        self._documents += 1
        self._below += document_hash < self._border
        self._smallest = min(self._smallest, document_hash)
        self._largest = max(self._largest, document_hash)

    def threshold(self, text_bytes: int) -> int:
        """The border. ``text_bytes``, the size of all text, is for advice when there is but one document."""
        if self._border == 0:
            return 0
        if self._smallest == self._largest:
            one = "there is only one document" if self._documents == 1 else "all documents are the same text"
            piece = text_bytes // 20
            cut = f"cut it with --max-document-bytes {piece}" if piece >= SMALLEST_MAX_DOCUMENT_BYTES else "add text"
            raise UserError(
                f"{one}, too little for a validation split: {cut}, or do without with --validation-fraction 0"
            )
        if self._below == 0:
            return self._smallest + 1
        return self._largest if self._below == self._documents else self._border
