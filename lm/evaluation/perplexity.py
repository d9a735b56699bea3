"""The loss of a model on any text, in nats per token and bits per byte.

    documents → tokens between end-of-text tokens → windows → queries (``lm.inference.scoring``) → nats

In each window ``stride`` tokens are scored; the others are context. If the stride equals the context length, windows
are adjacent and the first tokens of each have little context; only a document's last window reaches back to fill the
context, as in lm-evaluation-harness. A shorter stride gives every token, except at the start of a document, at least
context - stride tokens of context (for a masked readout, half as many on either side), and reads everything
context / stride times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.errors.wording import counted
from data_prep.sources.listing import STDIN, ReadReport, ReadSettings, parse_sources, parts_of, read_part
from data_prep.tokenizers.loss import counted_bytes, loss_of
from lm.config.recipes import require_stride
from lm.data.keyed_random import validation_fold
from lm.evaluation.baselines import Progress, baseline_losses, compressed_bytes, unigram_costs
from lm.evaluation.validation_loss import protocol
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import Query, token_scores
from lm.objectives.text import bits_per_byte, loss_on_text


def documents_of(source: str, reading: ReadSettings) -> Iterator[str]:
    """Yield the texts of a source's documents. UserError if it does not exist, or is standard input."""
    if source == STDIN:
        raise UserError("a text is read once per readout, which standard input does not allow: name a file")
    sources = parse_sources((source,))
    for part in parts_of(sources, reading):
        for document in read_part(part, sources, reading, ReadReport()):
            yield document.text


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of a document are read, and those from ``first`` to ``last`` predicted."""

    begin: int
    end: int
    first: int
    last: int


def windows(length: int, context_length: int, stride: int, *, bidirectional: bool) -> Iterator[Window]:
    """Yield windows of at most ``context_length`` tokens that predict every token of a document from 1 on once.

    A document is ``length`` tokens, the first being what stands before its text. A causal window ends before the last
    token that it predicts; a bidirectional one begins with the token before the first, because a masked readout may
    predict from there.
    """
    room = context_length - stride if bidirectional else 0
    for first in range(1, length, stride):
        last = min(first + stride, length)
        begin = max(0, first - 1 - room // 2 if bidirectional else last - 1 - context_length)
        yield Window(begin, min(length, begin + context_length) if bidirectional else last - 1, first, last)


def document_queries(
    model: LanguageModel, number: int, text: Sequence[int], readout: str, stride: int, *, ends: bool = True
) -> Iterator[Query]:
    """Yield the queries that score document ``number``, their owner, from the tokens of its text.

    ``next_token`` also predicts the end of the document if it ``ends``. A masked readout hides one fold of a window's
    tokens at a time behind the mask token, until all have been hidden.
    """
    context, tokenizer, folds = model.context_length, model.tokenizer, model.config.objective.validation_folds
    row = np.array([tokenizer.start_id, *text], dtype=np.int64)
    if readout == "next_token":
        row = np.append(row, tokenizer.end_of_text_id) if ends else row
        for window in windows(len(row), context, stride, bidirectional=False):
            positions = range(window.first - 1 - window.begin, window.last - 1 - window.begin)
            targets = row[window.first : window.last].tolist()
            yield Query(number, row[window.begin : window.end].tolist(), positions, targets)
        return
    fold_of = validation_fold(np.array([number]), np.arange(len(row)), folds)
    fold_of[0] = -1  # the start is never hidden
    shift = 1 if readout == "masked_next_token" else 0
    for window in windows(len(row), context, min(stride, context - 1), bidirectional=True):
        for fold in range(folds):
            hidden = np.flatnonzero(fold_of[window.begin : window.end] == fold) + window.begin
            scored = hidden[(hidden >= window.first) & (hidden < window.last)]
            if len(scored):
                seen = row[window.begin : window.end].copy()
                seen[hidden - window.begin] = model.tokenizer.mask_id
                yield Query(number, seen.tolist(), (scored - window.begin - shift).tolist(), row[scored].tolist())


@dataclass
class _TextSize:
    """What a text consists of. ``counts`` (vocabulary,) are of its tokens and the ends of its documents.

    ``text_bytes`` are those that the tokens stand for, without the ``lost_bytes``.
    """

    counts: NDArray[np.int64]
    documents: int = 0
    text_bytes: int = 0
    lost_bytes: int = 0
    compressed: int = 0


def _measure(model: LanguageModel, documents: Iterator[str]) -> _TextSize:
    size = _TextSize(np.zeros(model.config.model.vocab_size, dtype=np.int64))

    def measured() -> Iterator[bytes]:
        for text in documents:
            tokens = model.tokenizer.encode(text)
            size.documents += 1
            size.text_bytes += len(text.encode("utf-8"))
            size.lost_bytes += loss_of(model.tokenizer, text, tokens).lost_bytes
            size.counts += np.bincount([*tokens, model.tokenizer.end_of_text_id], minlength=len(size.counts))
            yield model.tokenizer.decode_bytes(tokens)  # without what is lost

    size.compressed = compressed_bytes(measured())
    size.text_bytes = counted_bytes(size.text_bytes, size.lost_bytes)
    return size


def _loss(
    model: LanguageModel, documents: Iterator[str], readout: str, stride: int, text_bytes: int
) -> dict[str, float]:
    queries = (
        query
        for number, text in enumerate(documents)
        for query in document_queries(model, number, model.tokenizer.encode(text), readout, stride)
    )
    nats, predicted = 0.0, 0
    for scores in token_scores(model, queries, readout):
        nats -= float(scores.logprobs.sum())
        predicted += len(scores.logprobs)
    return loss_on_text(nats / predicted, predicted, bits_per_byte(nats, text_bytes))


def evaluate_text(
    model: LanguageModel, source: str, reading: ReadSettings, *, stride: int = 0, progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Return the loss of every readout on a text, scoring ``stride`` tokens per window (0: all), next to baselines.

    The result is as of ``validation_loss.evaluate``, without the unigram baseline if the training data is gone. Raise
    UserError if the source has no text, or the stride is longer than the context.
    """
    context = model.context_length
    require_stride(stride, model.config)
    stride = stride or context
    size = _measure(model, documents_of(source, reading))
    if not size.documents:
        raise UserError(f"there is no text in {source}")
    tokens = int(size.counts.sum())
    validation = {}
    for readout in model.readouts:
        progress(f"{readout}: {tokens - size.documents:,} tokens")
        validation[readout] = _loss(model, documents_of(source, reading), readout, stride, size.text_bytes)
    costs = unigram_costs(model.config, progress)
    adjacent = f"adjacent windows of {context} tokens, the last reaching back to fill the context"
    how = f"windows of {context} tokens, of which {stride} count" if stride < context else adjacent
    return {
        "data": source,
        "documents": size.documents,
        "validation_tokens": tokens,
        "validation_bytes": size.text_bytes,
        "validation": validation,
        "floors": baseline_losses(size.counts, costs, size.compressed, size.text_bytes),
        "protocol": protocol(
            f"{counted(size.documents, 'document')}, each in {how}",
            model.config.objective.validation_folds,
            size.lost_bytes,
        ),
    }
