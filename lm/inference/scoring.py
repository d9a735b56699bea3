"""How likely a model finds a text, by each readout; many short texts are packed into each forward pass.

A text begins, as every document did in training, after an end-of-text token, which is not scored. ``next_token`` gives
the log-probability of a text. The masked readouts give its pseudo-log-likelihood (Salazar et al. 2020): every token is
hidden once, alone, and the log-probabilities of the hidden tokens are added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.batch import assemble
from lm.inference.detokenizer import TextStream
from lm.model.transformer import Transformer

ROWS = 16  # of one forward pass
LOGITS_AT_ONCE = 1 << 24  # at most so many numbers are held, whatever the vocabulary and the context


@dataclass(frozen=True)
class Question:
    """One sequence to read: of the text ``owner``, asked for ``targets`` at the ``places`` that predict them."""

    owner: int
    tokens: Sequence[int]
    places: Sequence[int]
    targets: Sequence[int]


def questions(tokens: Sequence[int], owner: int, readout: str, tokenizer: Tokenizer, first: int = 0) -> list[Question]:
    """What must be asked to score a text's tokens from ``first`` on."""
    row = [tokenizer.end_of_text_id, *tokens]
    scored = range(first, len(tokens))
    if readout == "next_token":
        return [Question(owner, row[:-1], list(scored), [tokens[i] for i in scored])]
    shift = 1 if readout == "masked_next_token" else 0
    return [
        Question(owner, [*row[: i + 1], tokenizer.mask_id, *row[i + 2 :]], [i + 1 - shift], [tokens[i]]) for i in scored
    ]


@dataclass(frozen=True)
class Answers:
    """What a model said to some questions, target by target, all (targets,).

    ``owners`` are those of the questions, int64; ``nats`` the log-probabilities of the targets, float64; ``likeliest``
    whether a target was the likeliest token, bool.
    """

    owners: NDArray[np.int64]
    nats: NDArray[np.float64]
    likeliest: NDArray[np.bool_]


def log_likelihoods(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    readout: str,
    context_length: int,
    *,
    firsts: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Log-probability, in nats, of each text's tokens: float64 (texts,).

    Args:
        texts: the tokens of each text, without special tokens.
        firsts: of each text, the first token that counts; those before it are only seen. None: all count.

    Raises:
        UserError: a text is longer than the model's context.
    """
    totals = np.zeros(len(texts), dtype=np.float64)
    starts = [0] * len(texts) if firsts is None else firsts
    refuse_longer(texts, context_length)
    asked = (
        question
        for owner, (text, first) in enumerate(zip(texts, starts, strict=True))
        for question in questions(text, owner, readout, tokenizer, first)
    )
    for answers in ask(model, tokenizer, asked, readout, context_length):
        np.add.at(totals, answers.owners, answers.nats)
    return totals


def refuse_longer(texts: Sequence[Sequence[int]], context_length: int) -> None:
    """UserError if one of the texts does not fit behind the end-of-text token."""
    longest = max((len(text) for text in texts), default=0) + 1
    if longest > context_length:
        raise UserError(
            f"a text to score has {longest - 1} tokens; this model reads at most {context_length - 1} at once"
        )


def ask(
    model: Transformer, tokenizer: Tokenizer, asked: Iterable[Question], readout: str, context_length: int
) -> Iterator[Answers]:
    """Answer questions, some at a time, in their order, each of at most ``context_length`` tokens."""
    for owners, targets, logits in logits_for(model, tokenizer, asked, readout, context_length):
        nats = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        likeliest = logits.argmax(-1) == targets
        yield Answers(owners, nats.double().cpu().numpy(), likeliest.cpu().numpy())


@torch.no_grad()
def logits_for(
    model: Transformer, tokenizer: Tokenizer, asked: Iterable[Question], readout: str, context_length: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """What the model says to questions, some targets at a time, in their order: the owners of the questions (n,), the
    targets (n,), and the logits (n, vocabulary) at the places that predict them."""
    device = next(model.parameters()).device
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for rows in _packed((question for question in asked if question.targets), context_length):
        inputs = np.full((len(rows), context_length), tokenizer.end_of_text_id, dtype=np.int64)
        begins = np.zeros(inputs.shape, dtype=bool)
        lengths = np.empty(len(rows), dtype=np.int64)
        where: list[tuple[int, int]] = []
        for number, row in enumerate(rows):
            at = 0
            for question in row:
                begins[number, at] = True
                inputs[number, at : at + len(question.tokens)] = question.tokens
                where += [(number, at + place) for place in question.places]
                at += len(question.tokens)
            lengths[number] = at
        width = int(lengths.max())
        both_ways = np.full(len(rows), readout != "next_token")
        cut, unused = inputs[:, :width], np.zeros((len(rows), width), dtype=np.float32)
        batch = assemble(cut, cut, unused, begins[:, :width], both_ways, lengths).to(device)
        hidden = model(batch.inputs, batch.positions, batch.lo, batch.hi)
        row_of, place_of = torch.tensor(where, device=device).T
        answered = [question for row in rows for question in row]
        owners = np.array([question.owner for question in answered for _ in question.targets], dtype=np.int64)
        targets = torch.tensor([target for question in answered for target in question.targets], device=device)
        for first in range(0, len(targets), at_once):
            part = slice(first, first + at_once)
            yield owners[part], targets[part], model.logits(hidden[row_of[part], place_of[part]])


def _packed(asked: Iterator[Question], context_length: int) -> Iterator[list[list[Question]]]:
    """Questions in rows of at most ``context_length`` tokens, ``ROWS`` rows at a time."""
    rows: list[list[Question]] = [[]]
    used = 0
    for question in asked:
        if used + len(question.tokens) > context_length:
            if len(rows) == ROWS:
                yield rows
                rows = []
            rows.append([])
            used = 0
        rows[-1].append(question)
        used += len(question.tokens)
    if rows[-1]:
        yield rows


@dataclass(frozen=True)
class TokenProbability:
    """One token as the model sees it.

    ``rank`` is 1 for the token that the model finds likeliest; ``alternatives`` are the likeliest tokens with their
    log-probabilities (in nats), the best first.
    """

    token: int
    logprob: float
    rank: int
    alternatives: tuple[tuple[int, float], ...]


@torch.no_grad()
def token_probabilities(
    model: Transformer, tokenizer: Tokenizer, tokens: Sequence[int], readout: str, context_length: int, top: int
) -> Iterator[list[TokenProbability]]:
    """The tokens of a text in their order, those of one forward pass at a time.

    Args:
        tokens: of the text, without special tokens.
        readout: as of ``log_likelihoods``.
        top: how many alternatives.

    Raises:
        UserError: the text is longer than the model's context.
    """
    refuse_longer([tokens], context_length)
    asked = questions(tokens, 0, readout, tokenizer)
    for _, targets, logits in logits_for(model, tokenizer, asked, readout, context_length):
        logprobs = logits.log_softmax(-1)[:, : tokenizer.vocab_size]  # without rows that only fill the matrix
        own = logprobs.gather(1, targets[:, None])
        ranks = 1 + (logprobs > own).sum(-1)
        best, ids = logprobs.topk(min(top, tokenizer.vocab_size))
        yield [
            TokenProbability(token, logprob, rank, tuple(zip(others, theirs, strict=True)))
            for token, logprob, rank, others, theirs in zip(
                targets.tolist(),
                own[:, 0].tolist(),
                ranks.tolist(),
                ids.tolist(),
                best.tolist(),
                strict=True,
            )
        ]


def texts_of_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The part of the text that each token adds: whole characters, so that all together are the text.

    A token that begins a character and does not end it adds ""; the one that ends it adds the character.
    """
    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in tokens]
    if texts:
        texts[-1] += stream.finish()
    return texts
