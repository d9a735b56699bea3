"""Instruction tuning: learn to answer, from prompts and responses.

The chat template formats the prompt (``chat_template``); the response and an end-of-text token follow. Only the
response and that token are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.tokenizers.loss import counted_bytes, loss_of
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.data.batch import IGNORED, Batch
from lm.data.examples import Example
from lm.data.packed_sequences import packed
from lm.finetuning.task import Task
from lm.finetuning.task_inputs import in_parts
from lm.inference.chat_template import CHAT_TEMPLATE, PLAIN_TURNS, render
from lm.model.device import autocast
from lm.model.transformer import Transformer
from lm.objectives.text import bits_per_byte, loss_on_text
from lm.training.gradients import accumulated


@dataclass(frozen=True)
class Turn:
    """A prompt and its response: ``row`` from the first end of text to the last, predicted from index ``first``."""

    row: list[int]
    first: int
    response_bytes: int
    cut: bool

    @property
    def tokens(self) -> int:
        """Input tokens: the last token of the row is only a target."""
        return len(self.row) - 1

    @property
    def predicted(self) -> int:
        return len(self.row) - self.first


def turn_of(example: Example, template: str, tokenizer: Tokenizer, context_length: int) -> Turn:
    """Format an example by the template; if too long, it loses the beginning of its prompt, then the response's end.

    Raise UserError if the template formats the prompt differently when a response follows.
    """
    prompt, response = example.texts
    messages = [{"role": "user", "content": prompt}]
    before = render(messages, template)
    whole = render([*messages, {"role": "assistant", "content": response}], template)
    if not whole.startswith(before):
        raise UserError(
            f"{example.place}: the chat template formats the prompt differently when a response follows: the prompt "
            "and the words before the response must be the same in both cases"
        )
    answer = whole[len(before) :].rstrip("\n")
    end = tokenizer.end_of_text_id
    question, answered = tokenizer.encode(before), [*tokenizer.encode(answer), end]
    kept = answered[:context_length]
    shown = question[max(0, len(question) + len(kept) - context_length) :]
    cut = len(kept) < len(answered) or len(shown) < len(question)
    size = counted_bytes(len(answer.encode()), loss_of(tokenizer, answer, answered[:-1]).lost_bytes)
    return Turn([end, *shown, *kept], 1 + len(shown), size, cut)


class InstructionTask(Task):
    """Prompts and responses; the model is the trunk, and stays a language model."""

    train: list[Turn]
    validation: list[Turn]

    def __init__(
        self, config: Config, tokenizer: Tokenizer, train: Sequence[Example], validation: Sequence[Example]
    ) -> None:
        task = config.finetune
        if "next_token" not in config.readouts:
            raise UserError(
                f"{task.base} was trained with {config.objective.objective} only: it generates no text and cannot "
                "follow instructions"
            )
        self.config, self.tokenizer = config, tokenizer
        self.template = load_template(task.chat_template)
        self.hashed_texts = (self.template,)
        self.train, self.validation = (
            [turn_of(each, self.template, tokenizer, config.data.context_length) for each in examples]
            for examples in (train, validation)
        )

    def introduction(self) -> list[str]:
        return ["only the responses are learned; the chat template is saved in the run directory"]

    def save(self, path: Path) -> None:
        write_atomically(path / CHAT_TEMPLATE, self.template)

    def batch(self, numbers: NDArray[np.int64]) -> list[Batch]:
        turns = [self.train[n] for n in numbers.tolist()]
        return list(self._batches(turns, 1 / sum(turn.predicted for turn in turns)))

    def _batches(self, turns: Sequence[Turn], weight: float) -> Iterator[Batch]:
        """Yield micro-batches in which each predicted token has this weight."""
        for first, stop in in_parts(turns, self.config.finetune.micro_batch_tokens):
            yield pack_turns(turns[first:stop], weight, self.tokenizer.end_of_text_id, self.config.data.context_length)

    def gradients(self, model: nn.Module, batch: list[Batch], step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        return {"response": accumulated(model, batch, self._loss, self.config, step)}, {"response": 1.0}

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Transformer)
        batch = batch.to(model.norm.weight.device)
        with autocast(batch.inputs.device, self.config.training.precision):
            return model.loss(model.read(batch), batch.targets, batch.loss_weights)

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        if not self.validation:
            return {"validation": {}}, None
        model.eval()
        with torch.no_grad():
            nats = sum(float(self._loss(model, batch)) for batch in self._batches(self.validation, 1.0))
        model.train()
        predicted = sum(turn.predicted for turn in self.validation)
        size = sum(turn.response_bytes for turn in self.validation)
        loss = loss_on_text(nats / predicted, predicted, bits_per_byte(nats, size))
        return {"validation": {"response": loss}}, loss["nats_per_token"]


def load_template(path: str) -> str:
    """Read a chat template from a file; "" stands for plain turns. UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8") if path else PLAIN_TURNS
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template {path} cannot be read: {error}") from None


def pack_turns(turns: Sequence[Turn], weight: float, end_of_text: int, context_length: int) -> Batch:
    """Pack conversations into rows by best fit; each is read causally and sees no other."""
    (rows,) = packed([turn.row[:-1] for turn in turns], "causal", end_of_text, context_length, len(turns))
    targets = np.full(tuple(rows.batch.inputs.shape), IGNORED, dtype=np.int64)
    for number, row, first in zip(rows.numbers.tolist(), rows.rows.tolist(), rows.first.tolist(), strict=True):
        turn = turns[number]
        targets[row, first + turn.first - 1 : first + len(turn.row) - 1] = turn.row[turn.first :]
    weights = (targets != IGNORED).astype(np.float32) * np.float32(weight)
    return replace(rows.batch, targets=torch.from_numpy(targets), loss_weights=torch.from_numpy(weights))
