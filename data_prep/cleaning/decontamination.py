"""Find evaluation texts in training text, by the runs of words they share.

After Brown et al. (2020), "Language Models are Few-Shot Learners", appendix C, arXiv:2005.14165: a document is
contaminated if it shares a run of 13 words with an evaluation text, ignoring case and punctuation. Here the whole
document is dropped, not only the part around the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.ngrams import Hashes, WordHashes, ngram_hashes, ngram_hashes_of_lengths, plain_words
from data_prep.errors import UserError
from data_prep.files import parse_json
from data_prep.sources.formats import JSON, JSON_LINES, PARQUET, TABLES, kind_of, what_it_is
from data_prep.sources.records import first_line
from data_prep.sources.storage import UnreadableError, open_raw, open_stream
from data_prep.sources.tables import BadRow, fields_of_table
from data_prep.sources.text_files import normalize_newlines

FEWEST_WORDS = 5  # shorter texts occur everywhere by chance
SHOWN_WORDS = 10
_TABLE_SLOTS_PER_HASH = 16
_BLANK_LINES = re.compile(r"\n\s*\n")


class EvaluationTexts:
    """An index of the runs of ``ngram`` words in all texts of the files.

    A shorter text with at least ``FEWEST_WORDS`` words is matched as a whole. Uses about 40 bytes per run. Raises
    ``UserError`` for a file that cannot be read as text or has no text that is long enough.
    """

    def __init__(self, files: Sequence[Path], ngram: int, word_hashes: WordHashes) -> None:
        self._word_hashes = word_hashes
        self._labels: list[str] = []
        self._lengths: set[int] = set()
        runs: list[Hashes] = []
        owners: list[npt.NDArray[np.int32]] = []
        for path in files:
            before = len(runs)
            for text in evaluation_texts(path):
                found = self._runs_of(text, ngram)
                if len(found):
                    runs.append(found)
                    owners.append(np.full(len(found), len(self._labels), np.int32))
                    self._labels.append(f'"{" ".join(text.split()[:SHOWN_WORDS])}" of {path.name}')
            if len(runs) == before:
                raise UserError(
                    f'"{path}" has no text of {FEWEST_WORDS} words or more to look for in the training text'
                )
        self._make_table(np.concatenate(runs), np.concatenate(owners))

    def _runs_of(self, text: str, ngram: int) -> Hashes:
        words = self._word_hashes.of(plain_words(text))
        length = min(ngram, len(words))
        if length < ngram and length < FEWEST_WORDS:
            return words[:0]
        self._lengths.add(length)
        return ngram_hashes(words, length)

    def _make_table(self, hashes: Hashes, owners: npt.NDArray[np.int32]) -> None:
        """Sort the hashes, and make a table of their leading bits that rules out most other hashes quickly."""
        self._hashes, first = np.unique(hashes, return_index=True)
        self._owners = owners[first]
        bits = max(16, (_TABLE_SLOTS_PER_HASH * len(self._hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[self._hashes >> self._shift] = True

    def match(self, text: str) -> str:
        """Return the first words and the file of an evaluation text that shares a run of words with this one, or ""."""
        words = self._word_hashes.of(plain_words(text))
        runs = np.concatenate(list(ngram_hashes_of_lengths(words, self._lengths)))
        likely = runs[self._table[runs >> self._shift]]
        positions = np.minimum(np.searchsorted(self._hashes, likely), len(self._hashes) - 1)
        found = positions[self._hashes[positions] == likely]
        return self._labels[self._owners[found[0]]] if len(found) else ""


def evaluation_texts(path: Path) -> Iterator[str]:
    """Yield the texts of an evaluation file, which may be compressed.

    Every string of a record counts, however deeply nested, and every field of a table. Any other file is read as text:
    by paragraphs, or by lines if it has no blank line. Raises ``UserError`` if it cannot be read to the end.
    """
    kind = kind_of(str(path))
    try:
        if kind == PARQUET:
            with open_raw(str(path)) as file:
                yield from _texts_of_parquet(path, file)
            return
        with open_stream(str(path)) as stream:
            if other := what_it_is(kind, stream.peek()):
                raise UserError(f'the evaluation file "{path}" {other}')
            rows = list(fields_of_table(stream, kind)) if kind in TABLES else []
            content = b"".join(stream.blocks())
            if stream.damage:  # which may look like a broken record
                raise UserError(f'"{path}" is damaged ({stream.damage}): get an intact copy, or exclude it')
    except UnreadableError as error:
        raise UserError(f'the evaluation file "{path}" {error}: choose one that can be read') from None
    if kind in TABLES:
        yield from _texts_of_table(path, rows)
    elif kind == JSON:
        yield from _texts_of_json(path, _decoded(path, content))
    elif kind == JSON_LINES:
        yield from _texts_of_records(path, _decoded(path, content))
    else:
        yield from _texts_of_prose(_decoded(path, content))


def _texts_of_prose(content: str) -> Iterable[str]:
    return _BLANK_LINES.split(content) if _BLANK_LINES.search(content.strip()) else content.split("\n")


def _decoded(path: Path, content: bytes) -> str:
    try:
        return normalize_newlines(content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f'"{path}" is not UTF-8 text ({error.reason}): convert it, or exclude it') from None


def _texts_of_json(path: Path, content: str) -> Iterable[str]:
    try:
        return _strings_in(parse_json(content))
    except ValueError:
        return _texts_of_records(path, content)  # JSON lines have this name, too


def _texts_of_records(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise UserError(f'"{path}", line {number} is not JSON ({error}): fix or remove the line') from None
        yield from _strings_in(record)


def _texts_of_table(path: Path, rows: Iterable[tuple[int, list[str] | BadRow]]) -> Iterator[str]:
    for number, row in rows:
        if isinstance(row, BadRow):
            raise UserError(f'"{path}", line {number} cannot be read ({row.why}): fix or remove it')
        yield from row


def _texts_of_parquet(path: Path, file: IO[bytes]) -> Iterator[str]:
    import pyarrow  # slow to import
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            yield from _strings_in(batch.to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f'"{path}" is not a complete parquet file ({first_line(error)}): get an intact copy') from None


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        values: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for inner in values:
            yield from _strings_in(inner)
