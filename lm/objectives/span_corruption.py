"""Span corruption (Raffel et al. 2020, section 3.1.4) for a model without an encoder: a text with gaps, then what fits.

    the cat sat on the mat ─► the <mask> on the <mask> END cat sat <mask> mat END

T5 numbers its sentinels. Here the mask token stands in each gap, and between the spans that fill them, which come in
the order of their gaps: so every tokenizer with a mask token will do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from lm.data.batch import IGNORED, Batch, Rows
from lm.data.keyed_random import Stream, key, uniform_at
from lm.objectives.drawn_text import DrawnText, documents_of

FEWEST = 5  # positions of a document that has a gap; the tokens of shorter ones are not predicted


class SpanCorruption(DrawnText):
    """Of each document a share ``span_corruption_rate`` of the tokens is hidden, in spans of ``mean_span_length``.

    The text with gaps is read in both directions, or causally (``span_attention``); only the spans are predicted. The
    row does not become longer: a document gives up its last tokens for those that are added, two for each span.
    """

    def drawn(self, rows: Rows, seed: int) -> Batch:
        end_of_text, mask = self.vocabulary.end_of_text, self.vocabulary.mask
        inputs, targets = rows.inputs.copy(), np.full_like(rows.targets, IGNORED)
        seen = np.zeros(rows.inputs.shape, dtype=np.int32)
        for r, begin, end in zip(*(each.tolist() for each in documents_of(rows)), strict=True):
            if end - begin < FEWEST:
                continue
            spans, hidden, text = self.sizes(end - begin)
            columns, number = begin + np.arange(text), rows.numbers[[r]]
            gaps, kept = (
                parts_of(total, spans, uniform_at(key(seed, Stream.CORRUPTED_SPANS, n), number, columns))
                for n, total in enumerate((hidden, text - hidden))
            )
            tokens = np.split(rows.targets[r, begin : begin + text], np.stack([kept, gaps], axis=1).ravel().cumsum())
            corrupted = [token for part in tokens[:-1:2] for token in (*part.tolist(), mask)]
            answers = [token for part in tokens[1::2] for token in (mask, *part.tolist())][1:]
            first = begin + len(corrupted) + 1  # the position of the end of text before the spans
            inputs[r, begin + 1 : end] = [*corrupted, end_of_text, *answers]
            targets[r, first:end] = [*answers, end_of_text]
            seen[r, begin:end] = first + 1
        batch = self.assembled(rows, inputs, targets)
        if self.config.span_attention == "causal":
            return batch
        return replace(batch, hi=torch.maximum(batch.hi, torch.from_numpy(seen)))

    def sizes(self, positions: int) -> tuple[int, int, int]:
        """How many spans, hidden tokens and tokens of text fill a document's positions.

        Text, a mask in each gap and between the spans, and two ends of text are text + 2 · spans + 1 positions.
        """
        rate, length = self.config.span_corruption_rate, self.config.mean_span_length
        most = (positions - 1) // 4
        spans = min(max(1, round(rate * (positions - 1) / (length + 2 * rate))), most)
        text = positions - 1 - 2 * spans
        return spans, min(max(spans, round(rate * text)), text - spans), text


def parts_of(total: int, parts: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """``total`` as a sum of ``parts`` numbers above 0, all such sums being equally likely for random ``draws``."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


open_objective = SpanCorruption
