"""Contrastive training of sentence vectors, which needs no labels.

    sentences → two views of each → vectors → InfoNCE: each first view must find its second among those of the batch

The views of a single text are two passes with different dropout (SimCSE, Gao, Yao and Chen 2021, section 3); those of a
pair are its two texts. The loss compares all vectors of a batch, yet its gradient is exact with the memory of one part
(``lm.training.gradients.accumulated_over_vectors``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.data.examples import Example
from lm.data.packed_sequences import PackedSequences, packed, pooled
from lm.finetuning.metrics import regression_metrics
from lm.finetuning.task import Task
from lm.finetuning.task_inputs import EncodedExample, Encoder
from lm.inference.embedding import Reading, all_vectors, reading_of
from lm.inference.language_model import LanguageModel
from lm.model.device import autocast
from lm.model.transformer import Transformer
from lm.objectives.contrastive import info_nce
from lm.training.gradients import accumulated_over_vectors


def similarity(model: LanguageModel, pairs: Sequence[Example], reading: Reading) -> dict[str, float]:
    """Correlation (``spearman``, ``pearson``) of the cosine of two texts' vectors with how similar they are.

    ``pairs`` are examples of a regression: two texts and a number each.
    """
    vectors = [
        all_vectors(model, [(text,) for text in texts], reading)[0].astype(np.float64)
        for texts in zip(*(pair.texts for pair in pairs), strict=True)
    ]
    first, second = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in vectors)
    return regression_metrics(np.array([pair.label for pair in pairs]), (first * second).sum(1))


class ContrastiveTask(Task):
    """Texts, or pairs of texts that belong together; the model is the trunk, and embeds."""

    train: list[EncodedExample]

    def __init__(
        self, config: Config, tokenizer: Tokenizer, train: Sequence[Example], validation: Sequence[Example]
    ) -> None:
        self.config, self.tokenizer, self.judging = config, tokenizer, validation
        self.pairs = len(train[0].texts) == 2
        if not self.pairs and not config.model.dropout:
            raise UserError("the two views of a text differ by dropout, but dropout is 0: set it, for example to 0.1")
        encoder = Encoder(tokenizer, config.finetune.task, config.data.context_length, "mean", apart=True)
        self.train, self.validation = encoder.encode(train), encoder.encode(validation)
        if not self.pairs:
            self.train = [replace(each, sequences=each.sequences * 2) for each in self.train]

    def introduction(self) -> list[str]:
        return [] if self.pairs else ["each text is read twice, with different dropout"]

    def batch(self, numbers: NDArray[np.int64], epochs: NDArray[np.int64]) -> list[tuple[int, PackedSequences]]:
        """The views of the examples, in parts for one forward pass each: (which view, from 0; its sequences)."""
        context = self.config.data.context_length
        rows = max(1, self.config.finetune.micro_batch_tokens // context)
        views = zip(*(self.train[n].sequences for n in numbers.tolist()), strict=True)
        return [
            (number, part)
            for number, view in enumerate(views)
            for part in packed(view, self.config.finetune.reads, self.tokenizer.end_of_text_id, context, rows)
        ]

    def gradients(
        self, model: nn.Module, batch: list[tuple[int, PackedSequences]], step: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        def loss(vectors: Sequence[Tensor]) -> Tensor:
            examples = sum(len(part.numbers) for view, part in batch if view == 0)
            views = vectors[0].new_zeros(2, examples, vectors[0].shape[1])
            for (view, part), found in zip(batch, vectors, strict=True):
                views[view, part.numbers] = found
            return info_nce(views[0], views[1], self.config.finetune.temperature)

        found = accumulated_over_vectors(model, batch, self._vectors, loss, self.config, step)
        return {"contrastive": found}, {"contrastive": 1.0}

    def _vectors(self, model: nn.Module, view: tuple[int, PackedSequences]) -> Tensor:
        """The vectors of a part, float32 (sequences, hidden)."""
        assert isinstance(model, Transformer)
        batch = view[1].batch.to(next(model.parameters()).device)
        with autocast(batch.inputs.device, self.config.training.precision, training=True):
            hidden = model.read(batch)
        return pooled(hidden.float(), view[1], self.config.finetune.pooling)

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        assert isinstance(model, Transformer)
        if not self.judging:
            return {"metrics": {}}, None
        model.eval()
        found = similarity(LanguageModel(model, self.tokenizer, self.config), self.judging, reading_of(self.config))
        model.train()
        return {"metrics": found, "examples": len(self.validation)}, -found[self.config.finetune.judged_by]
