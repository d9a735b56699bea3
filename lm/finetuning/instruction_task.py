"""Instruction tuning: learn to answer, from prompts and responses or whole conversations.

The chat template formats a conversation (``chat_template``). Only what the assistant says is predicted, and the token
that ends its turn: the template's own, or else the end-of-text token, which the answer would end with in use.
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
from lm.inference.chat_template import CHAT_TEMPLATE, PLAIN_TURNS, ChatFormat, load_template
from lm.model.device import autocast
from lm.model.transformer import Transformer
from lm.objectives.text import bits_per_byte, loss_on_text
from lm.training.gradients import accumulated


@dataclass(frozen=True)
class Turn:
    """A conversation as tokens, from the one that starts every text to the end of the assistant's last turn.

    ``labels`` has what is to be predicted in each place of ``row``, or IGNORED. It differs from the row's token where
    a turn of the assistant ends without a token of its own and another turn follows: there the end of text is learned.
    """

    row: list[int]
    labels: list[int]
    response_bytes: int
    cut: bool

    @property
    def tokens(self) -> int:
        """Input tokens: the last token of the row is only a target."""
        return len(self.row) - 1

    @property
    def predicted(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def turn_of(example: Example, template: str, tokenizer: Tokenizer, context_length: int) -> Turn:
    """Format an example by the template; if too long, it loses its beginning, then the end of the last response.

    Raise UserError if the template fails, or formats messages differently when others follow.
    """
    return _turn(example, ChatFormat(template, tokenizer), context_length)


def _turn(example: Example, chat: ChatFormat, context_length: int) -> Turn:
    roles = example.label or ("user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, example.texts, strict=True)]
    while messages[-1]["role"] != "assistant":  # without an answer
        messages.pop()
    try:
        rendered, spans = chat.answers(messages)
    except UserError as problem:
        raise UserError(f"{example.place}: {problem}") from None
    if not spans:
        raise UserError(f"{example.place}: the chat template leaves out what the assistant says")
    pieces = chat.pieces_of(rendered, [at for span in spans for at in span])
    end = chat.tokenizer.end_of_text_id
    names = {token_id: name for name, token_id in chat.tokenizer.special_tokens.items()}
    body: list[int] = []
    labels: list[int] = []
    size = lost = 0
    for number, (start, stop) in enumerate(spans):
        asked, said = pieces[2 * number : 2 * number + 2]
        body += asked
        labels = labels[: len(body)] + [IGNORED] * (len(body) - len(labels))
        last, after = len(body), pieces[2 * number + 2]
        body += said
        labels += said
        text = rendered.text[start:stop]
        size += len(text.encode())
        lost += max(  # names of special tokens count as lost, too
            sum(len(names[token].encode()) for token in said if token in names),
            loss_of(chat.tokenizer, text, said).lost_bytes,
        )
        if said[-1:] and said[-1] in names:
            continue
        labels.append(after[0] if after[:1] and after[0] in (*chat.tokenizer.end_ids, *chat.ends) else end)
    if len(labels) > len(body):
        body.append(labels[-1])
    first = max(0, min(len(body) - context_length, last))
    kept = slice(first, first + context_length)
    cut = len(body) > context_length
    row = chat.tokenizer.begun(body[kept])
    labels = ([IGNORED] * (len(row) - len(body[kept])) + labels[kept])[-len(row) :]
    return Turn(row, [IGNORED, *labels[1:]], counted_bytes(size, lost), cut)


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
        self.template = template_of(config)
        self.hashed_texts = (self.template,)
        chat = ChatFormat(self.template, tokenizer, task.template_tokens == "special")
        self.train, self.validation = (
            [_turn(each, chat, config.data.context_length) for each in examples] for examples in (train, validation)
        )

    def introduction(self) -> list[str]:
        return ["only what the assistant says is learned; the chat template is saved in the run directory"]

    def save(self, path: Path) -> None:
        write_atomically(path / CHAT_TEMPLATE, self.template)

    def batch(self, numbers: NDArray[np.int64], epochs: NDArray[np.int64]) -> list[Batch]:
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
        with autocast(batch.inputs.device, self.config.training.precision, training=torch.is_grad_enabled()):
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


def settle_template(config: Config, tokenizer: Tokenizer) -> Config:
    """Replace "auto" in ``template_tokens``: "special" if it makes a difference, else "characters"."""
    task = config.finetune
    if task.template_tokens != "auto":
        return config
    special = task.task == "instruction" and ChatFormat(template_of(config), tokenizer).writes_special_tokens
    return config.replace(template_tokens="special" if special else "characters")


def template_of(config: Config) -> str:
    """The chat template that the settings name. UserError if it cannot be read."""
    return load_template(config.finetune.chat_template) if config.finetune.chat_template else PLAIN_TURNS


def pack_turns(turns: Sequence[Turn], weight: float, end_of_text: int, context_length: int) -> Batch:
    """Pack conversations into rows by best fit; each is read causally and sees no other."""
    (rows,) = packed([turn.row[:-1] for turn in turns], "causal", end_of_text, context_length, len(turns))
    targets = np.full(tuple(rows.batch.inputs.shape), IGNORED, dtype=np.int64)
    for number, row, first in zip(rows.numbers.tolist(), rows.rows.tolist(), rows.first.tolist(), strict=True):
        turn = turns[number]
        targets[row, first : first + turn.tokens] = turn.labels[1:]
    weights = (targets != IGNORED).astype(np.float32) * np.float32(weight)
    return replace(rows.batch, targets=torch.from_numpy(targets), loss_weights=torch.from_numpy(weights))
