"""Loss and bits per byte of a run on any text: documents as ``data_prep`` reads them, in windows of the context.

    documents → tokens between ends of text → windows → questions (``lm.inference.scoring``) → nats

Each window is read for the ``stride`` tokens that count in it; the others are only seen. With a stride as long as the
context windows lie side by side, and the first tokens of each have little before them; only a document's last window
reaches back to be full (so does lm-evaluation-harness).
With a shorter one every token, but at the start of a document, has at least context - stride tokens before it (or,
for a masked readout, half as many on either side), at the price of reading everything context / stride times.
"""

from __future__ import annotations

import bz2
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.listing import STDIN, ReadReport, ReadSettings, parse_sources, parts_of, read_part
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data import keyed_random
from lm.data.keyed_random import Stream
from lm.evaluation.baselines import _unigram
from lm.inference.scoring import Question, ask
from lm.model.transformer import Transformer
from lm.objectives.text import loss_on_text
from lm.runs.directory import Run


def documents_of(source: str, reading: ReadSettings) -> Iterator[str]:
    """The texts of a source's documents; may be called again, and gives the same.

    Raises:
        UserError: the source is not there, or standard input.
    """
    if source == STDIN:
        raise UserError("a text is read once for each readout, and standard input only once: name a file")
    sources = parse_sources((source,))
    for part in parts_of(sources, reading):
        for document in read_part(part, sources, reading, ReadReport()):
            yield document.text


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of a document are seen, and those from ``first`` to ``last`` predicted."""

    begin: int
    end: int
    first: int
    last: int


def windows(length: int, context_length: int, stride: int, *, both_ways: bool) -> Iterator[Window]:
    """Windows of at most ``context_length`` tokens, in which every token of a document from 1 on is predicted once.

    A document is ``length`` tokens, of which the first is the end of text before it. What is read causally ends before
    the last token that is predicted from it; what is read both ways begins with the token before the first, from which
    a masked readout may predict.
    """
    room = context_length - stride if both_ways else 0
    for first in range(1, length, stride):
        last = min(first + stride, length)
        begin = max(0, first - 1 - room // 2 if both_ways else last - 1 - context_length)
        yield Window(begin, min(length, begin + context_length) if both_ways else last - 1, first, last)


def questions_of(
    number: int,
    tokens: list[int],
    tokenizer: Tokenizer,
    readout: str,
    context_length: int,
    stride: int,
    folds: int,
    *,
    ends: bool = True,
) -> Iterator[Question]:
    """What must be asked for the loss on document ``number``, the owner of the questions.

    ``next_token`` is asked for the document's end as well, if it ``ends``. A masked readout hides one fold of a
    window's tokens at a time, each behind the mask token, until all were hidden.
    """
    row = np.array([tokenizer.end_of_text_id, *tokens], dtype=np.int64)
    if readout == "next_token":
        row = np.append(row, tokenizer.end_of_text_id) if ends else row
        for window in windows(len(row), context_length, stride, both_ways=False):
            places = range(window.first - 1 - window.begin, window.last - 1 - window.begin)
            targets = row[window.first : window.last].tolist()
            yield Question(number, row[window.begin : window.end].tolist(), places, targets)
        return
    fold_of = keyed_random.uniform_at(
        keyed_random.key(0, Stream.VALIDATION_FOLDS), np.array([number]), np.arange(len(row))
    )
    fold_of = (fold_of * folds).astype(np.int64)
    fold_of[0] = -1  # the end of text is never hidden
    shift = 1 if readout == "masked_next_token" else 0
    for window in windows(len(row), context_length, min(stride, context_length - 1), both_ways=True):
        for fold in range(folds):
            hidden = np.flatnonzero(fold_of[window.begin : window.end] == fold) + window.begin
            asked = hidden[(hidden >= window.first) & (hidden < window.last)]
            if len(asked):
                seen = row[window.begin : window.end].copy()
                seen[hidden - window.begin] = tokenizer.mask_id
                yield Question(number, seen.tolist(), (asked - window.begin - shift).tolist(), row[asked].tolist())


def evaluate_text(
    run: Run,
    model: Transformer,
    source: str,
    reading: ReadSettings,
    *,
    stride: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The loss of every readout of a run on a text, beside the floors of ``lm.evaluation.validation_loss.floors``.

    Args:
        stride: tokens of a window that count; 0: all.

    Returns:
        A result as of ``validation_loss.evaluate``; the unigram floor is left out where the run's data is gone.

    Raises:
        UserError: there is no text in the source, or the stride is longer than the context.
    """
    context, tokenizer = run.config.data.context_length, run.tokenizer
    if not 0 <= stride <= context:
        raise UserError(f"--stride must be between 1 and the context length, {context}, or 0 for all of it")
    stride = stride or context
    documents = size = tokens = 0
    counts = np.zeros(run.config.model.vocab_size, dtype=np.int64)
    compressor, compressed = bz2.BZ2Compressor(9), 0
    for text in documents_of(source, reading):
        encoded, data = tokenizer.encode(text), text.encode("utf-8")
        documents, size, tokens = documents + 1, size + len(data), tokens + len(encoded)
        counts += np.bincount(encoded, minlength=len(counts))
        compressed += len(compressor.compress(data))
    if not documents:
        raise UserError(f"there is no text in {source}")
    counts[tokenizer.end_of_text_id] += documents
    folds = max(1, round(1 / run.config.objective.validation_mask_rate))
    validation = {}
    for readout in run.config.readouts:
        progress(f"{readout}: {tokens:,} tokens")
        asked = (
            question
            for number, text in enumerate(documents_of(source, reading))
            for question in questions_of(number, tokenizer.encode(text), tokenizer, readout, context, stride, folds)
        )
        nats, predicted = 0.0, 0
        for answers in ask(model, tokenizer, asked, readout, context):
            nats -= float(answers.nats.sum())
            predicted += len(answers.nats)
        validation[readout] = loss_on_text(nats / predicted, predicted, nats, size)
    floors: dict[str, dict[str, float | None]] = {}
    if (unigram := _unigram(run, counts, progress)) is not None:
        per_token = unigram / (tokens + documents)
        floors["unigram"] = {"nats_per_token": per_token, "bits_per_byte": unigram / math.log(2) / size}
    compressed += len(compressor.flush())
    floors["bz2 -9"] = {"nats_per_token": None, "bits_per_byte": 8 * compressed / size}
    how = f"of which {stride} count" if stride < context else "side by side, the last reaching back to be full"
    return {
        "data": source,
        "documents": documents,
        "validation_tokens": tokens + documents,
        "validation_bytes": size,
        "validation": validation,
        "floors": floors,
        "protocol": f"{documents:,} documents, each in windows of {context} tokens, {how}; a masked readout hides one "
        f"token in {folds} at a time, each behind the mask token, until every token was hidden once",
    }
