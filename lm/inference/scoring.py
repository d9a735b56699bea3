"""The log-likelihood of texts under each readout; many short texts are packed into one forward pass.

A text begins after an end-of-text token, as every document did in training; that token is not scored. In an imported
model the tokenizer's own beginning stands there; if it has none, an end-of-text token, and nothing where the first
tokens are only context (as in lm-evaluation-harness). ``next_token`` gives the log-probability of a text. The masked
readouts give its pseudo-log-likelihood (Salazar et al. 2020): each token is masked in turn, alone, and the
log-probabilities of the masked tokens are added up.
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
from lm.data.packed_sequences import fill_rows
from lm.inference.detokenizer import Detokenizer
from lm.inference.language_model import LanguageModel

ROWS = 16  # per forward pass
LOGITS_AT_ONCE = 1 << 24  # the most numbers that are held, whatever the vocabulary and the context


@dataclass(frozen=True)
class Query:
    """A sequence to read for the text number ``owner``: token ``targets[i]`` is predicted at ``positions[i]``."""

    owner: int
    tokens: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int]


def text_queries(tokens: Sequence[int], owner: int, readout: str, tokenizer: Tokenizer, first: int = 0) -> list[Query]:
    """Return the queries that score a text's tokens from number ``first`` on."""
    start = [] if tokenizer.begin_id is None and first else [tokenizer.start_id]
    row, at = [*start, *tokens], len(start)  # of the text's first token
    scored = range(first, len(tokens))
    if readout == "next_token":
        return [Query(owner, row[:-1], [at + i - 1 for i in scored], [tokens[i] for i in scored])]
    shift = 1 if readout == "masked_next_token" else 0
    return [
        Query(owner, [*row[: at + i], tokenizer.mask_id, *row[at + i + 1 :]], [at + i - shift], [tokens[i]])
        for i in scored
    ]


@dataclass(frozen=True)
class TokenScores:
    """The scores of the targets of some queries, one entry per target.

    ``owners`` are those of the queries, int64; ``logprobs`` the log-probabilities of the targets in nats, float64;
    ``greedy`` says whether a target was the most likely token, bool.
    """

    owners: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def log_likelihoods(
    model: LanguageModel, texts: Sequence[Sequence[int]], readout: str, *, firsts: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return the log-probability of each text's tokens, in nats: float64 (texts,).

    Args:
        texts: the tokens of each text, without special tokens.
        firsts: per text, the first token that is scored; those before it are context. None: all tokens are scored.

    Raises:
        UserError: a text is longer than the model's context.
    """
    totals = np.zeros(len(texts), dtype=np.float64)
    starts = [0] * len(texts) if firsts is None else firsts
    _refuse_longer(texts, model.context_length)
    queries = (
        query
        for owner, (text, first) in enumerate(zip(texts, starts, strict=True))
        for query in text_queries(text, owner, readout, model.tokenizer, first)
    )
    for scores in token_scores(model, queries, readout):
        np.add.at(totals, scores.owners, scores.logprobs)
    return totals


def _refuse_longer(texts: Sequence[Sequence[int]], context_length: int) -> None:
    """Raise UserError if a text does not fit into the context after the end-of-text token."""
    longest = max((len(text) for text in texts), default=0) + 1
    if longest > context_length:
        raise UserError(
            f"a text to score has {longest - 1} tokens; this model reads at most {context_length - 1} at once"
        )


def token_scores(model: LanguageModel, queries: Iterable[Query], readout: str) -> Iterator[TokenScores]:
    """Score queries of at most ``context_length`` tokens each, in order, part by part."""
    for owners, targets, logits in _target_logits(model, queries, readout):
        logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        greedy = logits.argmax(-1) == targets
        yield TokenScores(owners, logprobs.cpu().double().numpy(), greedy.cpu().numpy())


@torch.no_grad()
def _target_logits(
    model: LanguageModel, queries: Iterable[Query], readout: str
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Yield the owners (n,) and targets (n,) of some queries, and the logits (n, vocabulary) that predict them."""
    reads = "causal" if readout == "next_token" else "bidirectional"
    at_once = max(1, LOGITS_AT_ONCE // model.model.config.vocab_size)
    for some, rows in _in_rows((query for query in queries if query.targets), model.context_length):
        sequences = [query.tokens for query in some]
        packed = fill_rows(sequences, np.arange(len(some)), np.array(rows), reads, model.tokenizer.end_of_text_id)
        hidden = model.hidden_states(packed.batch)
        counts = [len(query.targets) for query in some]
        owners = np.repeat(np.array([query.owner for query in some], dtype=np.int64), counts)
        within = np.array([position for query in some for position in query.positions])
        row_of = torch.from_numpy(np.repeat(packed.rows, counts)).to(hidden.device)
        position_of = torch.from_numpy(np.repeat(packed.first, counts) + within).to(hidden.device)
        targets = torch.tensor([target for query in some for target in query.targets], device=hidden.device)
        for first in range(0, len(targets), at_once):
            part = slice(first, first + at_once)
            yield owners[part], targets[part], model.model.logits(hidden[row_of[part], position_of[part]])


def _in_rows(queries: Iterator[Query], context_length: int) -> Iterator[tuple[list[Query], list[int]]]:
    """Yield queries and the row of each: up to ``ROWS`` rows of at most ``context_length`` tokens, filled in order."""
    some: list[Query] = []
    rows: list[int] = []
    row = used = 0
    for query in queries:
        if used + len(query.tokens) > context_length:
            row, used = row + 1, 0
            if row == ROWS:
                yield some, rows
                some, rows, row = [], [], 0
        some.append(query)
        rows.append(row)
        used += len(query.tokens)
    if some:
        yield some, rows


@dataclass(frozen=True)
class TokenProbability:
    """A token with its log-probability in nats.

    ``rank`` is 1 for the most likely token; ``alternatives`` are the most likely tokens with their log-probabilities,
    best first.
    """

    token: int
    logprob: float
    rank: int
    alternatives: tuple[tuple[int, float], ...]


@torch.no_grad()
def token_probabilities(
    model: LanguageModel, tokens: Sequence[int], readout: str, top: int
) -> Iterator[list[TokenProbability]]:
    """Yield the probabilities of a text's tokens in order, each with ``top`` alternatives, a forward pass at a time.

    ``tokens`` are those of the text, without special tokens. Raise UserError if they exceed the model's context.
    """
    _refuse_longer([tokens], model.context_length)
    vocab_size = model.tokenizer.vocab_size
    for _, targets, logits in _target_logits(model, text_queries(tokens, 0, readout, model.tokenizer), readout):
        logprobs = logits.log_softmax(-1)[:, :vocab_size]  # without the rows that only fill up the matrix
        own = logprobs.gather(1, targets[:, None])
        ranks = 1 + (logprobs > own).sum(-1)
        best, ids = logprobs.topk(min(top, vocab_size))
        columns = (each.tolist() for each in (targets, own[:, 0], ranks, ids, best))
        yield [
            TokenProbability(token, logprob, rank, tuple(zip(others, theirs, strict=True)))
            for token, logprob, rank, others, theirs in zip(*columns, strict=True)
        ]


def texts_of_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds, in whole characters; joined, they are the whole text.

    A token that begins a character without completing it adds ""; the one that completes it adds the character.
    """
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.add(token) for token in tokens]
    if texts:
        texts[-1] += detokenizer.finish()
    return texts
