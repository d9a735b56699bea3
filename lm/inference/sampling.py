"""Choosing the next token: settings, penalties, filters and the draw, as pure functions of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import Sampling
from lm.model.device import staged

LARGEST_UNIFORM = 1 - 2.0**-52  # its product with a sum is less than the sum, however it is rounded


def penalized(logits: Tensor, sampling: Sampling, read: Tensor, written: Tensor) -> Tensor:
    """Return logits (vocabulary,) in which tokens that already occurred are less likely.

    ``read`` and ``written``, float (vocabulary,), count each token in the prompt and in the text generated after it.
    The repetition penalty (Keskar et al. 2019, CTRL, eq. 2, as in ``transformers``) divides positive logits of all
    these tokens and multiplies negative ones. Presence and frequency penalty (OpenAI's API) are subtracted from the
    logits of generated tokens, once, and once per occurrence.
    """
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        weighed = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(read + written > 0, weighed, logits)
    return logits - sampling.frequency_penalty * written - sampling.presence_penalty * (written > 0)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits (…, vocabulary) divided by the temperature, with -inf for tokens that the filters drop.

    top-k keeps the k most likely tokens. top-p (Holtzman et al. 2020) keeps the smallest set of most likely tokens
    whose probability reaches p. min-p (Nguyen et al. 2024) drops tokens whose probability is below the fraction p of
    the top token's. Typical sampling (Meister et al. 2023) keeps the smallest set, of the tokens whose information
    -log p is closest to the entropy, whose probability reaches p. If ``sampling.is_greedy``, only the most likely token
    is kept.
    """
    if sampling.is_greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        logits = _smallest_set(logits, -logits, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least_likely = sampling.min_p * probabilities.max(-1, keepdim=True).values
        logits = logits.masked_fill(probabilities < least_likely, float("-inf"))
    if sampling.typical_p < 1:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).nansum(-1, keepdim=True)  # 0 * -inf counts as 0
        logits = _smallest_set(logits, (-log_p - entropy).abs(), sampling.typical_p)
    return logits


def _smallest_set(logits: Tensor, order_by: Tensor, mass: float) -> Tensor:
    """Keep the first tokens, in order of ``order_by``, whose total probability reaches ``mass``; others get -inf."""
    order = order_by.argsort(dim=-1, stable=True)
    probabilities = logits.softmax(-1).gather(-1, order)
    dropped = probabilities.cumsum(-1) - probabilities >= mass
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token (rows,) from each row of logits (rows, vocabulary) with a number in [0, 1) of ``uniforms``, float64.

    It is the token at which the cumulative probability, in order of the ids, exceeds that number. Logits that differ
    by a rounding error shift the sums by as little, so they rarely give another token.
    A row whose logits are not numbers gives the size of the vocabulary (``require_tokens``).
    """
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniforms.clamp(max=LARGEST_UNIFORM)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, threshold, right=True)[:, 0]


def require_tokens(drawn: list[int], vocabulary: int) -> list[int]:
    """What ``draw`` gave. UserError if it is not of the ``vocabulary``, as with a model whose training has diverged."""
    if vocabulary in drawn:
        raise UserError("the model's output is not a number: its training has diverged, try a lower learning_rate")
    return drawn


def log_probabilities(logits: Tensor, top: int) -> tuple[Tensor, list[tuple[int, float]]]:
    """Return log-probabilities in nats (vocabulary,) of logits (vocabulary,), and the ``top`` tokens with theirs."""
    log_p = logits.log_softmax(-1)
    best = log_p.topk(min(top, len(log_p)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return log_p, [(token, value) for token, value in pairs if value > -math.inf]


def writable(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Set logits (…, vocabulary) of tokens that are never generated to -inf, in place.

    These are the tokenizer's ``unwritable_ids`` (padding and mask) and the rows of the embeddings without a token.
    """
    logits[..., tokenizer.vocab_size :] = float("-inf")
    unwritable = staged(torch.tensor(tokenizer.unwritable_ids, dtype=torch.int64), logits.device)
    return logits.index_fill_(-1, unwritable.to(logits.device, non_blocking=True), float("-inf"))
