"""Prefix language modeling (Raffel et al. 2020, section 3.2.3): read a document's beginning in both directions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lm.data.batch import IGNORED, Batch, Rows
from lm.data.keyed_random import Stream, key, uniform_at
from lm.objectives.drawn_text import DrawnText, documents_of


class PrefixLM(DrawnText):
    """The tokens of a drawn prefix see each other; each token after it is predicted from all that are before it.

    Of a document with n positions in a row, the prefix has 0 to n - 1, evenly drawn up to a share ``longest_prefix``.
    """

    def drawn(self, rows: Rows, seed: int) -> Batch:
        row, first, stop = documents_of(rows)
        sizes = stop - first
        share = uniform_at(key(seed, Stream.PREFIXES), rows.numbers[row], first) * self.config.longest_prefix
        prefixes = np.minimum((share * sizes).astype(np.int64), sizes - 1)
        targets, seen = rows.targets.copy(), np.zeros(rows.inputs.shape, dtype=np.int32)
        for r, begin, end, size in zip(row.tolist(), first.tolist(), stop.tolist(), prefixes.tolist(), strict=True):
            targets[r, begin : begin + max(0, size - 1)] = IGNORED  # these targets are seen
            seen[r, begin:end] = begin + size
        batch = self.assembled(rows, rows.inputs, targets)
        return replace(batch, hi=torch.maximum(batch.hi, torch.from_numpy(seen)))


open_objective = PrefixLM
