"""What the model learns to predict: an objective turns windows of tokens into a batch.

A row is T targets and the tokens before them: a window of T + 1 tokens of the stream, or whole documents. Each document
in the stream ends with the end-of-text token, which also stands at the start of the next document's text, so that its
first word is predicted too.

====================  ==============================  ======================  =======================================
objective             inputs                          keys a query sees       target at position i
====================  ==============================  ======================  =======================================
next_token            the window                      its document, up to i   token i + 1
masked_token          the window, some tokens hidden  its whole document      token i, where it is hidden
masked_next_token     the window, some tokens hidden  its whole document      token i + 1, where that one is hidden
hybrid                an exact share of the rows is masked_next_token, the others are next_token
hybrid_unshifted      the same with masked_token
====================  ==============================  ======================  =======================================

masked_next_token shifts BERT's targets by one (BehnamGhader et al. 2024, LLM2Vec; Charpentier and Samuel 2024,
GPT-BERT), so that one head serves both readings. No stock class of other libraries reads masked text like that:
hybrid_unshifted is for models that are to be exported both ways.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import READOUTS, ObjectiveConfig
from lm.data import keyed_random
from lm.data.batch import IGNORED, Batch, Rows, Vocabulary, assemble
from lm.data.keyed_random import Stream
from lm.model.transformer import Transformer


def masked_rows(numbers: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Which rows of a text are masked: of the first n rows exactly floor(n × fraction), evenly spread."""
    if fraction in (0, 1):
        return np.full(len(numbers), bool(fraction))
    share = Fraction(str(fraction))
    before = [n * share.numerator // share.denominator for n in numbers.tolist()]
    after = [(n + 1) * share.numerator // share.denominator for n in numbers.tolist()]
    return np.array([a > b for a, b in zip(after, before, strict=True)], dtype=bool)


def make_batch(
    rows: Rows,
    numbers: NDArray[np.int64],
    turns: NDArray[np.int64],
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    seed: int,
) -> Batch:
    """The batch of one optimizer step.

    Args:
        numbers: (rows,) the rows' numbers in the whole run; with ``seed`` they decide what is hidden.
        turns: (rows,) the rows' numbers among those of their own text; they decide which rows are masked, so that each
            text has the same share of masked rows.

    Within each kind of row the losses are averaged over its own predicted tokens, then the kinds are mixed by their
    share of the rows: a masked row predicts fewer tokens, but counts as much as a causal one.
    """
    causal, masked_readout = "next_token" in READOUTS[config.objective], READOUTS[config.objective][-1]
    fraction = (config.masked_fraction if masked_readout != "next_token" else 0.0) if causal else 1.0
    masked = masked_rows(turns, fraction)
    order = np.argsort(masked, kind="stable")
    numbers, masked = numbers[order], masked[order]
    inputs, targets, starts, lengths = rows.inputs[order], rows.targets[order], rows.starts[order], rows.lengths[order]
    first_masked = len(masked) - int(masked.sum())
    padded = bool((lengths < inputs.shape[1]).any())
    if padded:
        targets[np.arange(inputs.shape[1]) >= lengths[:, None]] = IGNORED

    if first_masked < len(masked):
        shifted = masked_readout == "masked_next_token"
        inputs[first_masked:], targets[first_masked:] = _hide(
            inputs[first_masked:],
            starts[first_masked:],
            numbers[first_masked:],
            config,
            vocabulary,
            seed,
            shifted=shifted,
        )
    weights = np.zeros(targets.shape, dtype=np.float32)
    for some in (slice(0, first_masked), slice(first_masked, None)):
        predicted = targets[some] != IGNORED
        if predicted.any():
            weights[some] = predicted * np.float32(len(predicted) / len(masked) / np.count_nonzero(predicted))
    return assemble(inputs, targets, weights, starts, masked, lengths if padded else None)


def _hide(
    inputs: NDArray[np.int64],
    starts: NDArray[np.bool_],
    numbers: NDArray[np.int64],
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    seed: int,
    *,
    shifted: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hide tokens as BERT does (Devlin et al. 2019, section 3.1): (inputs with tokens hidden, targets).

    Ends of text are never hidden, nor, when the neighbour to the left predicts, a first token that has none.
    """
    chance = keyed_random.uniform(keyed_random.key(seed, Stream.HIDDEN_TOKENS), numbers, inputs.shape[1])
    kept = inputs == vocabulary.end_of_text
    chance[kept | starts if shifted else kept] = 2.0
    # At least one token a row, so that no row is idle: the one with the smallest number.
    chosen = (chance < config.mask_rate) | ((chance == chance.min(axis=1, keepdims=True)) & (chance < 1))
    at = np.flatnonzero(chosen)
    row, column = np.divmod(at, inputs.shape[1])
    fate, other = (
        keyed_random.uniform_at(keyed_random.key(seed, stream), numbers[row], column)
        for stream in (Stream.FATE_OF_HIDDEN_TOKENS, Stream.RANDOM_TOKENS)
    )
    corrupted = inputs.copy()
    shown = corrupted.ravel()[at]
    random_limit = config.mask_token_share + config.random_token_share
    shown = np.where(fate < random_limit, (other * vocabulary.size).astype(np.int64), shown)
    corrupted.ravel()[at] = np.where(fate < config.mask_token_share, vocabulary.mask, shown)
    return corrupted, _targets_of_hidden(inputs, chosen, shifted=shifted)


def _targets_of_hidden(tokens: NDArray[np.int64], chosen: NDArray[np.bool_], *, shifted: bool) -> NDArray[np.int64]:
    targets = np.where(chosen, tokens, IGNORED)
    if shifted:
        targets = np.concatenate([targets[:, 1:], np.full_like(targets[:, :1], IGNORED)], axis=1)
    return targets


def validation_batch(
    windows: NDArray[np.int64],
    real_tokens: NDArray[np.int64],
    numbers: NDArray[np.int64],
    readout: str,
    vocabulary: Vocabulary,
    *,
    fold: int = 0,
    folds: int = 1,
) -> Batch:
    """A batch that measures one readout; each predicted token weighs 1.

    ``real_tokens`` (rows,) of each window's T targets are text, the rest is filling. A masked readout hides one fold of
    the tokens, each always behind the mask token: over all ``folds`` every token but the ends of text is predicted
    exactly once. The rows of a masked readout are T + 1 long, so that it predicts the same tokens as the causal one.
    """
    within = np.arange(windows.shape[1])[None] <= real_tokens[:, None]
    if readout == "next_token":
        inputs, targets = windows[:, :-1], np.where(within[:, 1:], windows[:, 1:], IGNORED)
    else:
        fold_of = keyed_random.validation_fold(numbers[:, None], np.arange(windows.shape[1]), folds)
        chosen = (fold_of == fold) & within & (windows != vocabulary.end_of_text)
        chosen[:, 0] = False
        inputs = np.where(chosen, vocabulary.mask, windows)
        targets = _targets_of_hidden(windows, chosen, shifted=readout == "masked_next_token")
    starts = windows[:, : inputs.shape[1]] == vocabulary.end_of_text
    masked = np.full(len(windows), readout != "next_token")
    return assemble(inputs, targets, (targets != IGNORED).astype(np.float32), starts, masked)


class Losses(nn.Module):
    """Forward pass and head in one call, since that is what DDP and FSDP can wrap."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, causal: int) -> Tensor:
        """Weighted loss of the first ``causal`` rows and of the others, (2,)."""
        hidden = self.model(batch.inputs, batch.positions, batch.lo, batch.hi)
        parts = [
            self.model.loss(hidden[rows], batch.targets[rows], batch.loss_weights[rows])
            if rows.start < rows.stop
            else hidden.new_zeros((), dtype=torch.float32)
            for rows in (slice(0, causal), slice(causal, len(hidden)))
        ]
        return torch.stack(parts)
