"""How the next token is chosen: settings, penalties, filters and the draw. Pure functions of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import Sampling

LARGEST_UNIFORM = 1 - 2.0**-52  # times a sum it is below the sum, however the product is rounded


def penalised(logits: Tensor, sampling: Sampling, read: Tensor, written: Tensor) -> Tensor:
    """Logits (vocabulary,) with the tokens that were there made less likely.

    ``read`` and ``written`` are float (vocabulary,): how often each token is in the prompt, and in what was written
    after it. The repetition penalty (Keskar et al. 2019, CTRL, eq. 2, as ``transformers`` has it) divides the positive
    logits of all of them and multiplies the negative ones. Presence and frequency penalty (OpenAI's API) are taken off
    the logits of the written ones, once, and once for each time.
    """
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        weighed = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(read + written > 0, weighed, logits)
    return logits - sampling.frequency_penalty * written - sampling.presence_penalty * (written > 0)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (…, vocabulary) over the temperature, with -inf for every token that the filters leave out.

    top-k keeps the k likeliest. top-p (Holtzman et al. 2020) keeps the smallest set of likeliest tokens whose
    probability reaches p. min-p (Nguyen et al. 2024) keeps what is at least p times as likely as the likeliest.
    Typical sampling (Meister et al. 2023) keeps the smallest set whose probability reaches p of the tokens whose
    information, -log p, is nearest to the entropy. Temperature 0 keeps only the likeliest.
    """
    if sampling.temperature == 0:
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
        floor = sampling.min_p * probabilities.max(-1, keepdim=True).values
        logits = logits.masked_fill(probabilities < floor, float("-inf"))
    if sampling.typical_p < 1:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).nansum(-1, keepdim=True)  # 0 * -inf counts nothing
        logits = _smallest_set(logits, (-log_p - entropy).abs(), sampling.typical_p)
    return logits


def _smallest_set(logits: Tensor, order_by: Tensor, mass: float) -> Tensor:
    """Logits with -inf for all but the first tokens, by ``order_by``, whose probability together reaches ``mass``."""
    order = order_by.argsort(dim=-1, stable=True)
    probabilities = logits.softmax(-1).gather(-1, order)
    left_out = probabilities.cumsum(-1) - probabilities >= mass
    return logits.masked_fill(left_out.scatter(-1, order, left_out), float("-inf"))


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token (rows,) for each row of logits (rows, vocabulary), by its number in [0, 1) of ``uniforms``, float64.

    The token at which the sum of the probabilities, in the order of the ids, passes that number. Logits that differ by
    a rounding error move the sums by as little, and give another token about as seldom.
    """
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    place = uniforms.clamp(max=LARGEST_UNIFORM)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, place, right=True)[:, 0]


def log_probabilities(logits: Tensor, top: int) -> tuple[Tensor, list[tuple[int, float]]]:
    """Natural log-probabilities (vocabulary,) of logits (vocabulary,), and the ``top`` likeliest tokens with theirs."""
    log_p = logits.log_softmax(-1)
    likeliest = log_p.topk(min(top, len(log_p)))
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return log_p, [(token, value) for token, value in pairs if value > -math.inf]


def writable(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Logits (…, vocabulary), changed in place: -inf for what is no text, that is padding, masks, and rows that only
    fill the matrix."""
    logits[..., tokenizer.vocab_size :] = float("-inf")
    return logits.index_fill_(-1, torch.tensor([tokenizer.padding_id, tokenizer.mask_id]), float("-inf"))
