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
hybrid_unshifted is for models that will be exported as both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.batch import IGNORED, Batch, Rows, Vocabulary, assemble
from lm.data.keyed_random import Stream, key, uniform, uniform_at, validation_fold
from lm.data.rows import ValidationRows
from lm.model.transformer import Transformer
from lm.objectives.ahead import loss_of_next_tokens
from lm.objectives.objective import Measure


def masked_rows(numbers: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Which rows of a text are masked: of the first n rows exactly floor(n × fraction), evenly spread."""
    share = Fraction(str(fraction))
    return np.array([(n + 1) * share // 1 > n * share // 1 for n in numbers.tolist()], dtype=bool)


class TextObjective:
    """Next-token and masked-token prediction, and both: an ``lm.objectives.objective.Objective``.

    Attributes:
        readouts: what the model can be asked for afterwards.
        parts: the names of the loss's parts: the readouts, if there are several, else that of the objective.
    """

    compares, memory, comparable = False, None, True

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary, self.seed = config.objective, vocabulary, config.training.seed
        self.shape, self.data, self.total_steps = config.model, config.data, config.training.steps
        self.name, self.readouts = config.objective.objective, config.readouts
        self.parts = self.readouts if len(self.readouts) > 1 else (self.name,)
        if vocabulary.mask < 0 and self.readouts != ("next_token",):
            raise UserError(
                f"the tokenizer has no mask token, which {self.name} needs: train with --objective "
                "next_token, or import the checkpoint again with --add-mask"
            )

        hides_words = self.config.mask_whole_words and self.readouts != ("next_token",)
        self.joints = vocabulary.joints() if hides_words and vocabulary.joints else None

    def new_model(self) -> Transformer:
        return Transformer(self.shape)

    def example(self, rows: int) -> Batch:
        context = self.data.context_length
        inputs = torch.zeros(rows, context, dtype=torch.int64)
        positions = torch.zeros(rows, context, dtype=torch.int32)
        hi = torch.full_like(positions, context)
        return Batch(
            inputs, inputs, torch.zeros(rows, context), positions, positions, hi, self._parts(rows), self._ahead(0)
        )

    def _ahead(self, step: int) -> tuple[float, ...]:
        return self.config.ahead_at(step, self.total_steps) if "next_token" in self.parts else ()

    def _parts(self, rows: int) -> dict[str, int]:
        """Rows of each part in the largest micro-batch: one with both kinds of rows, if there is one."""
        if len(self.parts) == 1:
            return {self.parts[0]: rows}
        whole = self.data.batch_rows
        ends = (self.config.masking_at(step, self.total_steps)[0] for step in (0, self.total_steps - 1))
        causal = (whole - int(whole * min(ends))) % rows
        return dict(zip(self.parts, (causal, rows - causal), strict=True))

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        assert isinstance(model, Transformer)
        return model.flops_per_token(context_length)

    def prepare(self, rows: Rows) -> Batch:
        """The batch of one optimizer step, the causal rows first.

        Within each kind of row the losses are averaged over its own predicted tokens, then the kinds are mixed by
        their share of the rows: a masked row predicts fewer tokens, but counts as much as a causal one.
        """
        causal, masked_readout = "next_token" in self.readouts, self.readouts[-1]
        step = int(rows.numbers[0]) // self.data.batch_rows
        masked_fraction, mask_rate = self.config.masking_at(step, self.total_steps)
        fraction = (masked_fraction if masked_readout != "next_token" else 0.0) if causal else 1.0
        masked = masked_rows(rows.turns, fraction)
        order = np.argsort(masked, kind="stable")
        inputs, targets, starts = rows.inputs[order], rows.targets[order], rows.starts[order]
        numbers, masked, lengths = rows.numbers[order], masked[order], rows.lengths[order]
        first_masked = len(masked) - int(masked.sum())
        padded = bool((lengths < inputs.shape[1]).any())
        if padded:
            targets[np.arange(inputs.shape[1]) >= lengths[:, None]] = IGNORED
        if first_masked < len(masked):
            shifted, some = masked_readout == "masked_next_token", slice(first_masked, None)
            inputs[some], targets[some] = self._hide(
                inputs[some], starts[some], numbers[some], mask_rate, shifted=shifted
            )
        weights = np.zeros(targets.shape, dtype=np.float32)
        for some in (slice(0, first_masked), slice(first_masked, None)):
            predicted = targets[some] != IGNORED
            if predicted.any():
                weights[some] = predicted * np.float32(len(predicted) / len(masked) / np.count_nonzero(predicted))
        counts = (first_masked, len(masked) - first_masked) if len(self.parts) > 1 else (len(masked),)
        parts = dict(zip(self.parts, counts, strict=True))
        batch = assemble(inputs, targets, weights, starts, masked, lengths if padded else None, parts)
        return replace(batch, ahead=self._ahead(step))

    def _hide(
        self,
        inputs: NDArray[np.int64],
        starts: NDArray[np.bool_],
        numbers: NDArray[np.int64],
        mask_rate: float,
        *,
        shifted: bool,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hide tokens as BERT does (Devlin et al. 2019, section 3.1): (inputs with tokens hidden, targets).

        Ends of text and beginnings are never hidden, nor, when the neighbor to the left predicts, a first token that
        has none.
        """
        config = self.config
        chance = uniform(key(self.seed, Stream.HIDDEN_TOKENS), numbers, inputs.shape[1])
        if self.config.mask_whole_words:  # all tokens of a word have the number of its first
            chance = np.take_along_axis(chance, self._firsts_of_words(inputs, starts), axis=1)
        kept = self.vocabulary.borders(inputs)
        chance[kept | starts if shifted else kept] = 2.0
        # At least one token a row, so that no row is idle: the one with the smallest number.
        chosen = (chance < mask_rate) | ((chance == chance.min(axis=1, keepdims=True)) & (chance < 1))
        at = np.flatnonzero(chosen)
        row, column = np.divmod(at, inputs.shape[1])
        fate = uniform_at(key(self.seed, Stream.FATE_OF_HIDDEN_TOKENS), numbers[row], column)
        other = uniform_at(key(self.seed, Stream.RANDOM_TOKENS), numbers[row], column)
        corrupted = inputs.copy()
        shown = corrupted.ravel()[at]
        random_limit = config.mask_token_share + config.random_token_share
        shown = np.where(fate < random_limit, (other * self.vocabulary.size).astype(np.int64), shown)
        corrupted.ravel()[at] = np.where(fate < config.mask_token_share, self.vocabulary.mask, shown)
        return corrupted, targets_of_hidden(inputs, chosen, shifted=shifted)

    def _firsts_of_words(self, inputs: NDArray[np.int64], starts: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The position in its row of the first token of each token's word, int64 (rows, T)."""
        assert self.joints is not None
        begins = np.ones(inputs.shape, dtype=bool)
        begins[:, 1:] = starts[:, 1:] | ~(self.joints[0][inputs[:, 1:]] & self.joints[1][inputs[:, :-1]])
        return np.maximum.accumulate(np.where(begins, np.arange(inputs.shape[1]), 0), axis=1)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return losses(model, batch)

    def begin(self, model: nn.Module) -> None: ...

    def after_step(self, model: nn.Module, step: int) -> None: ...

    def warnings(self, rows: int) -> list[str]:
        return []

    def collapse(self, found: Mapping[str, dict[str, float]], step: int) -> str:
        return ""

    def validate(
        self, held_out: ValidationRows, measure: Measure, *, rows: int, every_token: bool
    ) -> dict[str, dict[str, float]]:
        """The loss of each readout on ``rows`` windows of the validation split.

        A masked readout hides one token in ``validation_folds`` at a time. ``every_token`` repeats it until
        every token has been hidden once; otherwise one pass predicts that share of the tokens, always the same ones.
        """
        numbers, split = held_out.choose(rows), held_out.split
        found = {}
        for readout in self.readouts:
            folds = 1 if readout == "next_token" else self.config.validation_folds

            def batch(fold: int, part: NDArray[np.int64], readout: str = readout, folds: int = folds) -> Batch:
                windows, real = held_out.windows(part)
                return validation_batch(windows, real, part, readout, self.vocabulary, fold=fold, folds=folds)

            nats, predicted = measure(numbers, [partial(batch, fold) for fold in range(folds if every_token else 1)])
            # Ends of text have no bytes; the causal readout predicts them too, the masked ones do not.
            predictable = split.tokens if readout == "next_token" else split.tokens - split.documents
            per_token = nats / max(predicted, 1)
            # Not ``bits_per_byte``: its order of divisions would change the last bit of what earlier runs have saved.
            bits = per_token * predictable / split.counted_bytes / math.log(2)
            found[readout] = loss_on_text(per_token, int(predicted), bits)
        return found | self.measured(held_out, numbers, measure, every_token=every_token)

    def measured(
        self, held_out: ValidationRows, numbers: NDArray[np.int64], measure: Measure, *, every_token: bool
    ) -> dict[str, dict[str, float]]:
        """What a validation says of the windows ``numbers`` besides the loss of each readout."""
        return {}


open_objective = TextObjective


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """The cost of a text, in nats, spread over its UTF-8 bytes, in bits: it makes tokenizers comparable.

    Bytes that the tokenizer loses are no part of ``text_bytes``, because no token predicts them.
    """
    return nats / math.log(2) / text_bytes


def loss_on_text(nats_per_token: float, predicted: int, bits: float) -> dict[str, float]:
    """A readout's loss as logs and results have it; ``bits`` per byte, and the mean cost of ``predicted`` tokens."""
    return {"nats_per_token": nats_per_token, "bits_per_byte": bits, "predicted": predicted}


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The weighted cross-entropy of each part of a batch, in one pass through the model; 0 of a part without rows."""
    assert isinstance(model, Transformer)
    hidden = model.read(batch)
    found, first, none = {}, 0, hidden.new_zeros((), dtype=torch.float32)
    for name, rows in batch.parts.items():
        some = slice(first, first + rows)
        targets, weights, predicted = batch.targets[some], batch.loss_weights[some], batch.predicted.get(name)
        if rows and batch.ahead and name == "next_token":
            found[name] = loss_of_next_tokens(model, hidden[some], batch.rows(first, first + rows), predicted)
        else:
            found[name] = model.loss(hidden[some], targets, weights, predicted) if rows else none
        first += rows
    return found


def targets_of_hidden(tokens: NDArray[np.int64], chosen: NDArray[np.bool_], *, shifted: bool) -> NDArray[np.int64]:
    """The ``chosen`` tokens, each at its own position or, ``shifted``, at the one to the left."""
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
        fold_of = validation_fold(numbers[:, None], np.arange(windows.shape[1]), folds)
        chosen = (fold_of == fold) & within & (windows != vocabulary.end_of_text)
        chosen[:, 0] = False
        inputs = np.where(chosen, vocabulary.mask, windows)
        targets = targets_of_hidden(windows, chosen, shifted=readout == "masked_next_token")
    starts = windows[:, : inputs.shape[1]] == vocabulary.end_of_text
    inputs = vocabulary.with_beginnings(inputs)
    masked = np.full(len(windows), readout != "next_token")
    weights = (targets != IGNORED).astype(np.float32)
    return assemble(inputs, targets, weights, starts, masked, parts={readout: len(windows)})
