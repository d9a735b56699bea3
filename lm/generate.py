"""Writing with a trained model: continue a prompt token by token, or fill masks."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from lm import masks
from lm.model import KVCache, Transformer

MASK_WORD = "[MASK]"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters act in this order: temperature, top-k, top-p, min-p."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 100
    seed: int = 0

    def problems(self) -> list[str]:
        limits = [
            (
                self.temperature == 0 or 0.01 <= self.temperature <= 100,
                f"--temperature must be 0, or from 0.01 to 100, not {self.temperature}",
            ),
            (self.top_k >= 0, f"--top-k must be at least 0, not {self.top_k}"),
            (0 < self.top_p <= 1, f"--top-p must be above 0 and at most 1, not {self.top_p}"),
            (0 <= self.min_p <= 1, f"--min-p must be between 0 and 1, not {self.min_p}"),
            (self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, not {self.max_new_tokens}"),
            (0 <= self.seed < 2**63, f"--seed must be at least 0 and below 2^63, not {self.seed}"),
        ]
        return [sentence for holds, sentence in limits if not holds]


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (…, vocabulary) over the temperature, with -inf for every token that the filters leave out.

    top-k keeps the k likeliest. top-p (Holtzman et al. 2020) keeps the smallest set of likeliest tokens whose
    probability reaches p. min-p (Nguyen et al. 2024) keeps what is at least p times as likely as the likeliest.
    Temperature 0 keeps only the likeliest.
    """
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= sampling.top_p).gather(-1, order.argsort(-1)), float("-inf"))
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        floor = sampling.min_p * probabilities.max(-1, keepdim=True).values
        logits = logits.masked_fill(probabilities < floor, float("-inf"))
    return logits


@torch.no_grad()
def continue_tokens(
    model: Transformer, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling, context_length: int
) -> Iterator[int]:
    """Yield new tokens after ``prompt`` until the model ends the text or ``max_new_tokens`` are made.

    The text begins, as every document did in training, after an end-of-text token. Beyond ``context_length`` tokens
    each new one sees only the last ``context_length``, the most the model has been trained to look at.
    """
    tokens = [tokenizer.end_of_text_id, *prompt]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache.empty(model.config, 1, len(tokens) + sampling.max_new_tokens, model.embedding.weight)
    fresh = tokens
    for _ in range(sampling.max_new_tokens):
        inputs = torch.tensor([fresh], device=device)
        positions = torch.arange(cache.length, cache.length + len(fresh), device=device)[None]
        lo, hi = masks.causal(1, len(fresh), past=cache.length, device=device)
        lo, hi = masks.sliding_window(lo, hi, context_length, past=cache.length)
        hidden = model(inputs, positions, lo, hi, cache)
        logits = _writable(model.logits(hidden[0, -1]).cpu(), tokenizer)
        choices = filtered(logits, sampling).softmax(-1)
        token = int(torch.multinomial(choices, 1, generator=generator))
        if token == tokenizer.end_of_text_id:
            return
        yield token
        fresh = [token]


def _writable(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Logits (…, vocabulary) without the tokens that are no text: padding, masks, rows that only fill the matrix."""
    logits[..., [tokenizer.padding_id, tokenizer.mask_id]] = float("-inf")
    logits[..., tokenizer.vocab_size :] = float("-inf")
    return logits


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Pieces of text as tokens arrive, each a whole number of characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: Sampling, context_length: int
) -> Iterator[str]:
    """The continuation of ``prompt``, piece by piece."""
    tokens = continue_tokens(model, tokenizer, tokenizer.encode(prompt), sampling, context_length)
    return stream_text(tokenizer, tokens)


@dataclass(frozen=True)
class Filled:
    """A text with its masks filled, and for each mask the likeliest tokens with their probabilities.

    ``pieces`` is the text in parts, each with whether it was filled in.
    """

    text: str
    pieces: list[tuple[str, bool]]
    candidates: list[list[tuple[str, float]]]


@torch.no_grad()
def fill_masks(
    model: Transformer, tokenizer: Tokenizer, text: str, readout: str, context_length: int, top: int = 5
) -> Filled:
    """Put a token in the place of each ``[MASK]``, reading the text both ways; the surest mask is filled first.

    Args:
        readout: "masked_next_token" (the neighbour to the left predicts) or "masked_token" (the mask's own place does).

    Raises:
        UserError: there is no [MASK] in the text, or the text is longer than the model's context.
    """
    tokens = _encode_with_masks(tokenizer, text)
    if tokenizer.mask_id not in tokens:
        raise UserError(f"nothing to fill: write {MASK_WORD} where a word is missing")
    if len(tokens) > context_length:
        raise UserError(f"the text to fill has {len(tokens)} tokens; this model reads at most {context_length} at once")
    device = next(model.parameters()).device
    shift = 1 if readout == "masked_next_token" else 0
    lo, hi = masks.bidirectional(1, len(tokens), device=device)
    positions = torch.arange(len(tokens), device=device)[None]
    open_masks = [i for i, token in enumerate(tokens) if token == tokenizer.mask_id]
    candidates: dict[int, list[tuple[str, float]]] = {}
    while open_masks:
        hidden = model(torch.tensor([tokens], device=device), positions, lo, hi)[0]
        logits = _writable(model.logits(hidden[[i - shift for i in open_masks]]).cpu(), tokenizer)
        logits[:, tokenizer.end_of_text_id] = float("-inf")
        likeliest = logits.softmax(-1).topk(min(top, logits.shape[-1]))
        surest = int(likeliest.values[:, 0].argmax())
        place = open_masks.pop(surest)
        tokens[place] = int(likeliest.indices[surest, 0])
        candidates[place] = [
            (tokenizer.decode([token]), probability)
            for token, probability in zip(
                likeliest.indices[surest].tolist(), likeliest.values[surest].tolist(), strict=True
            )
        ]
    places = sorted(candidates)
    pieces = [(tokenizer.decode(tokens[1 : places[0]]), False)]
    for place, following in zip(places, [*places[1:], len(tokens)], strict=True):
        pieces += [
            (tokenizer.decode([tokens[place]]), True),
            (tokenizer.decode(tokens[place + 1 : following]), False),
        ]
    return Filled(tokenizer.decode(tokens[1:]), pieces, [candidates[place] for place in places])


def _encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of ``text`` after an end-of-text token, with the mask token for each ``[MASK]``.

    Where words carry the space before them, a mask does too, as any word in its place would.
    """
    takes_space = len(tokenizer.encode(" a")) == 1
    parts = text.split(MASK_WORD)
    tokens = [tokenizer.end_of_text_id]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        tokens += tokenizer.encode(part.removesuffix(" ") if takes_space and not last else part)
        if not last:
            tokens.append(tokenizer.mask_id)
    return tokens
