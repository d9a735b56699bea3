"""Filters for repetition (table A1) and quality (section A.1.1) from the Gopher paper.

Source: Rae et al. (2021), "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
arXiv:2112.11446. The thresholds are the paper's. Details the paper leaves open are resolved as follows: words are
separated by whitespace; lines and paragraphs (separated by blank lines) are stripped, and empty ones do not count;
characters are those of words, lines or paragraphs, without the whitespace between them; a repeat is anything that
occurred earlier in the same text, so the first occurrence does not count.

Each function returns the reason to drop a text, with its value, or "" to keep it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.ngrams import Hashes, WordHashes, ngram_hashes

# Table A1: the largest fraction of repeats allowed.
MOST_REPEATED_UNITS = 0.30  # of lines, and of paragraphs
MOST_REPEATED_UNIT_CHARACTERS = 0.20  # of characters, in lines and in paragraphs
MOST_TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
MOST_REPEATED_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

# Section A.1.1.
FEWEST_WORDS = 50
MOST_WORDS = 100_000
SHORTEST_MEAN_WORD = 3.0
LONGEST_MEAN_WORD = 10.0
MOST_SYMBOLS_PER_WORD = 0.1
MOST_BULLET_LINES = 0.9
MOST_ELLIPSIS_LINES = 0.3
FEWEST_ALPHABETIC_WORDS = 0.8
FEWEST_STOP_WORDS = 2
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))

BULLETS = ("•", "‣", "◦", "▪", "*", "-")
ELLIPSES = ("...", "…")
_BLANK_LINES = re.compile(r"\n\s*\n")


def quality_problem(text: str) -> str:
    """Return why the text fails a quality filter, or "". The stop words are English, as in the paper."""
    words = text.split()
    return _words_problem(words) or _symbols_problem(text, words) or _lines_problem(_stripped(text.split("\n")))


def _words_problem(words: Sequence[str]) -> str:
    if len(words) < FEWEST_WORDS:
        return f"{len(words)} words < {FEWEST_WORDS}"
    if len(words) > MOST_WORDS:
        return f"{len(words)} words > {MOST_WORDS}"
    mean_length = sum(map(len, words)) / len(words)
    if mean_length < SHORTEST_MEAN_WORD:
        return f"mean word length {mean_length:.2f} < {SHORTEST_MEAN_WORD:g}"
    if mean_length > LONGEST_MEAN_WORD:
        return f"mean word length {mean_length:.2f} > {LONGEST_MEAN_WORD:g}"
    alphabetic = _share_of_alphabetic(words)
    if alphabetic < FEWEST_ALPHABETIC_WORDS:
        return f"alphabetic words {alphabetic:.2f} < {FEWEST_ALPHABETIC_WORDS:g}"
    stop_words = len(STOP_WORDS.intersection(map(str.lower, words)))
    if stop_words < FEWEST_STOP_WORDS:
        return f"{stop_words} different stop words < {FEWEST_STOP_WORDS}"
    return ""


def _share_of_alphabetic(words: Sequence[str]) -> float:
    return sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) / len(words)


def _symbols_problem(text: str, words: Sequence[str]) -> str:
    for name, symbols in (("hash", ("#",)), ("ellipsis", ELLIPSES)):
        ratio = sum(map(text.count, symbols)) / len(words)
        if ratio > MOST_SYMBOLS_PER_WORD:
            return f"symbol ratio {ratio:.2f} > {MOST_SYMBOLS_PER_WORD:g} ({name})"
    return ""


def _lines_problem(lines: Sequence[str]) -> str:
    bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
    if bullets > MOST_BULLET_LINES:
        return f"bullet lines {bullets:.2f} > {MOST_BULLET_LINES:g}"
    ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    if ellipses > MOST_ELLIPSIS_LINES:
        return f"lines ending in an ellipsis {ellipses:.2f} > {MOST_ELLIPSIS_LINES:g}"
    return ""


def repetition_problem(text: str, word_hashes: WordHashes) -> str:
    """Return why the text is too repetitive, or "".

    The top n-gram is the most frequent one that occurs at least twice (the earliest, in a tie). Its characters, and
    those of repeated n-grams, are those of all words covered by an occurrence, each counted once.
    """
    return (
        _units_problem("lines", _stripped(text.split("\n")))
        or _units_problem("paragraphs", _stripped(_BLANK_LINES.split(text)))
        or _ngrams_problem(text.split(), word_hashes)
    )


def _stripped(units: Sequence[str]) -> list[str]:
    return [stripped for unit in units if (stripped := unit.strip())]


def _units_problem(name: str, units: Sequence[str]) -> str:
    distinct = set(units)
    if len(distinct) == len(units):
        return ""
    share = 1 - len(distinct) / len(units)
    if share > MOST_REPEATED_UNITS:
        return f"repeated {name} {share:.2f} > {MOST_REPEATED_UNITS:g}"
    share = 1 - sum(map(len, distinct)) / sum(map(len, units))
    if share > MOST_REPEATED_UNIT_CHARACTERS:
        return f"characters in repeated {name} {share:.2f} > {MOST_REPEATED_UNIT_CHARACTERS:g}"
    return ""


def _ngrams_problem(words: Sequence[str], word_hashes: WordHashes) -> str:
    if not words:
        return ""
    hashes = word_hashes.of(words)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    characters = lengths.sum()
    occurrences = _highest_count(ngram_hashes(hashes, 2))
    for length, most in MOST_TOP_NGRAM_CHARACTERS.items():
        # No run occurs more often than the top pair of words, which rules out most texts quickly.
        if occurrences * length * lengths.max() <= most * characters:
            continue
        share = _covered_share(_top_positions(ngram_hashes(hashes, length)), length, lengths)
        if share > most:
            return f"characters in the top {length}-gram {share:.2f} > {most:g}"
    for length, most in MOST_REPEATED_NGRAM_CHARACTERS.items():
        share = _covered_share(_repeat_positions(ngram_hashes(hashes, length)), length, lengths)
        if share > most:
            return f"characters in repeated {length}-grams {share:.2f} > {most:g}"
        # A repeated run of n + 1 words contains repeated runs of n, so the share can only decrease from here.
        if share <= min(MOST_REPEATED_NGRAM_CHARACTERS.values()):
            break
    return ""


def _grouped(hashes: Hashes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Return the positions sorted by hash and then by position, and whether each one starts a new hash."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    begins = np.ones(len(hashes), np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    return order, begins


def _repeat_positions(hashes: Hashes) -> npt.NDArray[np.intp]:
    order, begins = _grouped(hashes)
    return order[~begins]


def _highest_count(hashes: Hashes) -> int:
    ordered = np.sort(hashes)
    ends = np.flatnonzero(ordered[1:] != ordered[:-1])
    return int(np.diff(ends, prepend=-1, append=len(hashes) - 1).max(initial=0))


def _top_positions(hashes: Hashes) -> npt.NDArray[np.intp]:
    """Return where the most frequent n-gram begins; empty if none occurs twice."""
    order, begins = _grouped(hashes)
    starts = np.flatnonzero(begins)
    counts = np.diff(starts, append=len(hashes))
    if len(counts) == 0 or counts.max() < 2:
        return order[:0]
    top = starts[counts == counts.max()]
    first = top[np.argmin(order[top])]
    return order[first : first + counts.max()]


def _covered_share(positions: npt.NDArray[np.intp], length: int, word_lengths: npt.NDArray[np.int64]) -> float:
    """Return the fraction of characters in words covered by runs of ``length`` words from these positions."""
    if len(positions) == 0:
        return 0.0
    covered = np.zeros(len(word_lengths), np.bool_)
    for offset in range(length):
        covered[positions + offset] = True
    return float(word_lengths[covered].sum() / word_lengths.sum())
