"""Words and runs of words as 64-bit hashes, so that a few array operations can compare long texts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

MOST_WORDS_KEPT = 200_000  # about 30 MB per process
LONGEST_WORD_KEPT = 64
# Any odd number works: the hashes of words are already random, and its powers only distinguish positions.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORD = re.compile(r"\w+")
_ASCII_OTHERS_AS_SPACE = {code: " " for code in range(128) if not _WORD.match(chr(code))}


def plain_words(text: str) -> list[str]:
    """Return the runs of letters, digits and underscores, lowercase and composed (NFC)."""
    if text.isascii():  # the same words, three times as fast
        return text.lower().translate(_ASCII_OTHERS_AS_SPACE).split()
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


class WordHashes(dict[str, int]):
    """Map words to 64-bit BLAKE2b hashes, the same in every process; recent words are cached."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
        if len(word) <= LONGEST_WORD_KEPT:
            if len(self) >= MOST_WORDS_KEPT:
                self.clear()
            self[word] = value
        return value

    def of(self, words: Sequence[str]) -> Hashes:
        """Return the hashes of the words in order, shape ``(words,)``."""
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """Return one hash per run of ``length`` words, shape ``(words - length + 1,)``; empty if there are fewer words.

    It is a polynomial in the hashes of the words modulo 2^64; different runs collide with probability about 2^-64.
    """
    return next(ngram_hashes_of_lengths(words, (length,)))


def ngram_hashes_of_lengths(words: Hashes, lengths: Collection[int]) -> Iterator[Hashes]:
    """Yield ``ngram_hashes`` for each length, shortest first, each computed from the previous one."""
    hashes = words
    for length in range(1, max(lengths) + 1):
        if length > 1:
            hashes = hashes[:-1] * _MULTIPLIER
            hashes += words[length - 1 :]
        if length in lengths:
            yield hashes
