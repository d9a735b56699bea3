"""Contrastive training of sentence vectors: the lesson of ``lm.finetuning.finetune`` that needs no labels.

    sentences → two views of each → vectors → InfoNCE: each first view must find its second among those of the batch

The views of a single text are two passes with different dropout (SimCSE, Gao, Yao and Chen 2021, section 3); those of a
pair are its two texts. The loss needs the vectors of a whole batch, but not their graphs: they are computed, the loss's
gradient with respect to each is found, and each part is computed again, with the same dropout, to carry it back
(Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"). So a batch of any size is
exact in the memory of one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.data import keyed_random
from lm.data.examples import Columns, Example, columns_of, content_hash, read_examples, read_similar
from lm.data.keyed_random import Stream
from lm.data.packed_sequences import PackedSequences, packed, pooled, sequence_of
from lm.finetuning.metrics import regression_metrics
from lm.inference.embedding import Reading, all_vectors
from lm.inference.language_model import LanguageModel
from lm.model.device import autocast
from lm.model.transformer import Transformer
from lm.objectives.contrastive import info_nce


def similarity(model: LanguageModel, pairs: Sequence[Example], reading: Reading) -> dict[str, float]:
    """How well the cosine of two texts' vectors ranks how alike they are: ``spearman`` and ``pearson`` correlation.

    ``pairs`` are of the kind "regression", two texts each with a number.
    """
    vectors = [
        all_vectors(model, [(text,) for text in texts], reading)[0].astype(np.float64)
        for texts in zip(*(pair.texts for pair in pairs), strict=True)
    ]
    first, second = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in vectors)
    return regression_metrics(np.array([pair.label for pair in pairs]), (first * second).sum(1))


@dataclass(frozen=True)
class Views:
    """Views of a batch's examples, in parts for one forward pass each: (which view, from 0; its sequences)."""

    examples: int
    parts: list[tuple[int, PackedSequences]]


class ContrastiveTask:
    """Texts, or pairs of texts that belong together; the model is the trunk itself, and embeds."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        task, columns = config.finetune, columns_of(config.finetune)
        self.config, self.tokenizer = config, tokenizer
        examples = read_examples(task.train, "contrastive", columns)
        pair = columns.text_pair or None  # "": of the texts that are learned from
        similar = Columns(text=columns.text, text_pair=pair, label=columns.label)
        self.validation = read_similar(task.validation, similar) if task.validation else []
        self.fingerprint = content_hash(examples)
        self.pairs = len(examples[0].texts) == 2
        if not self.pairs and not config.model.dropout:
            raise UserError("the two views of a text differ by dropout, and there is none: set dropout, to 0.1 say")
        found = [
            [sequence_of([tokens], tokenizer.end_of_text_id, config.data.context_length) for tokens in texts]
            for texts in (
                tokenizer.encode_batch(list(column)) for column in zip(*(e.texts for e in examples), strict=True)
            )
        ]
        self.cut = sum(cut for column in found for _, cut in column)
        self.views = [[tokens for tokens, _ in column] for column in found]

    @property
    def examples(self) -> int:
        return len(self.views[0])

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for column in self.views for tokens in column) * (1 if self.pairs else 2)

    def introduction(self) -> list[str]:
        kind = "pairs of texts" if self.pairs else "texts, each read twice with other dropout"
        cut = f", {self.cut:,} texts longer than the context and truncated" if self.cut else ""
        return [f"{self.examples:,} {kind}{cut}", f"{len(self.validation):,} pairs to validate by"]

    def save(self, path: Path) -> None:
        """There is nothing to keep but the weights."""

    def model(self, trunk: Transformer) -> Transformer:
        return trunk

    def batch(self, numbers: NDArray[np.int64]) -> Views:
        parts = []
        for view in (0, 1):
            sequences = [self.views[view if self.pairs else 0][n] for n in numbers.tolist()]
            parts += [(view, part) for part in self._packed(sequences)]
        return Views(len(numbers), parts)

    def _packed(self, sequences: Sequence[Sequence[int]]) -> Iterator[PackedSequences]:
        context = self.config.data.context_length
        rows = max(1, self.config.finetune.micro_batch_tokens // context)
        return packed(sequences, self.config.finetune.reads, self.tokenizer.end_of_text_id, context, rows)

    def gradients(self, model: nn.Module, batch: Views, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        assert isinstance(model, Transformer)
        model.zero_grad()
        vectors = torch.zeros(2, batch.examples, model.config.hidden_size, device=model.norm.weight.device)
        with torch.no_grad():
            for number, (view, part) in enumerate(batch.parts):
                vectors[view, part.numbers] = self._vectors(model, part, step, number)
        vectors.requires_grad_()
        loss = info_nce(vectors[0], vectors[1], self.config.finetune.temperature)
        (of_vectors,) = torch.autograd.grad(loss, vectors)
        for number, (view, part) in enumerate(batch.parts):
            self._vectors(model, part, step, number).backward(of_vectors[view, part.numbers])
        return {"contrastive": loss.detach()}, {"contrastive": 1.0}

    def _vectors(self, model: Transformer, part: PackedSequences, step: int, number: int) -> Tensor:
        """Vectors of a part, float32 (sequences, hidden); its dropout, drawn from its number, is the same each time."""
        torch.manual_seed(keyed_random.key(self.config.training.seed, Stream.FINETUNING_DROPOUT, step, number) >> 1)
        batch = part.batch.to(model.norm.weight.device)
        with autocast(batch.inputs.device, self.config.training.precision):
            hidden = model(batch.inputs, batch.positions, batch.lo, batch.hi)
        return pooled(hidden.float(), part, self.config.finetune.pooling)

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        assert isinstance(model, Transformer)
        if not self.validation:
            return {"metrics": {}}, None
        task = self.config.finetune
        model.eval()
        reading = Reading(task.reads, task.pooling)
        found = similarity(LanguageModel(model, self.tokenizer, self.config), self.validation, reading)
        model.train()
        return {"metrics": found, "examples": len(self.validation)}, -found[task.judged_by]
