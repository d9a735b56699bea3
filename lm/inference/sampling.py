"""How the next token is chosen: settings, penalties, filters and the draw. Pure functions of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer

MOST_LOGPROBS = 20
LARGEST_UNIFORM = 1 - 2.0**-52  # times a sum it is below the sum, however the product is rounded


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always, whatever the filters say.
        top_k, top_p, min_p, typical_p: filters, in this order and after the temperature (see ``filtered``).
        repetition_penalty: makes every token of the prompt and the text less likely (see ``penalised``); 1: off.
        presence_penalty, frequency_penalty: the same by a fixed amount of each token written so far, and by that amount
            for each time it was; 0: off.
        max_new_tokens: tokens to write at most.
        stop: texts at which to stop; what is written ends before the first of them.
        seed: of the draws; the same seed writes the same text.
        logprobs: tell the log-probability of each token, and of this many likeliest ones; None: not at all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 100
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None

    def problems(self) -> list[str]:
        """What cannot be, one sentence each; empty if all is well."""
        s = self
        limits = [
            (s.temperature == 0 or 0.01 <= s.temperature <= 100, "temperature", "must be 0, or from 0.01 to 100"),
            (s.top_k >= 0, "top_k", "must be at least 0"),
            (0 < s.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (0 <= s.min_p <= 1, "min_p", "must be between 0 and 1"),
            (0 < s.typical_p <= 1, "typical_p", "must be above 0 and at most 1"),
            (0.01 <= s.repetition_penalty <= 100, "repetition_penalty", "must be from 0.01 to 100"),
            (-100 <= s.presence_penalty <= 100, "presence_penalty", "must be from -100 to 100"),
            (-100 <= s.frequency_penalty <= 100, "frequency_penalty", "must be from -100 to 100"),
            (s.max_new_tokens >= 1, "max_new_tokens", "must be at least 1"),
            (all(s.stop), "stop", "must hold no empty text"),
            (0 <= s.seed < 2**63, "seed", "must be at least 0 and below 2^63"),
            (s.logprobs is None or 0 <= s.logprobs <= MOST_LOGPROBS, "logprobs", f"must be from 0 to {MOST_LOGPROBS}"),
        ]
        return [f"{name} {rule}, not {getattr(self, name)}" for holds, name, rule in limits if not holds]

    @property
    def filters(self) -> tuple[float, int, float, float, float]:
        """All that ``filtered`` looks at: rows in which it is equal can be filtered together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


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
