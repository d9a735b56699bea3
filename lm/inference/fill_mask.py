"""Reading both ways: fill the masks of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.inference.sampling import Sampling, draw, filtered, writable
from lm.kernels import masks
from lm.model.transformer import Transformer

MASK_WORD = "[MASK]"
MASKS = re.compile(r"\[MASK(?::([1-9]\d{0,6}))?\]")


@dataclass(frozen=True)
class Filled:
    """A text with its masks filled, and for each mask the likeliest tokens with their probabilities.

    ``pieces`` is the text in parts, each with whether it was filled in.
    """

    text: str
    pieces: list[tuple[str, bool]]
    candidates: list[list[tuple[str, float]]]


GREEDY = Sampling(temperature=0)


@torch.inference_mode()
def fill_masks(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    readout: str,
    context_length: int,
    *,
    top: int = 5,
    rounds: int = 0,
    sampling: Sampling = GREEDY,
) -> Filled:
    """Put a token in the place of each ``[MASK]``, reading the text both ways; ``[MASK:5]`` stands for five of them.

    In each round a token is drawn for every mask that is left, and those of them stay to which the model gives the
    highest probability, equally many in each round; the others are looked at again with these in place (Ghazvininejad
    et al. 2019, Mask-Predict; Chang et al. 2022, MaskGIT).

    Args:
        readout: "masked_next_token" (the neighbour to the left predicts) or "masked_token" (the mask's own place does).
        top: candidates to tell of each mask, as they were when it was filled, by the model's own probabilities.
        rounds: at most one for each mask; 0: that many, so that the surest one is filled at a time.
        sampling: temperature and filters of the draws, and their seed; nothing else of it counts.

    Raises:
        UserError: there is no [MASK] in the text, or the text is longer than the model's context.
    """
    tokens = _encode_with_masks(tokenizer, text)
    open_masks = [i for i, token in enumerate(tokens) if token == tokenizer.mask_id]
    if not open_masks:
        raise UserError(f"nothing to fill: write {MASK_WORD} where a word is missing")
    if len(tokens) > context_length:
        raise UserError(f"the text to fill has {len(tokens)} tokens; this model reads at most {context_length} at once")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    shift = 1 if readout == "masked_next_token" else 0
    lo, hi = masks.bidirectional(1, len(tokens), device=device)
    positions = torch.arange(len(tokens), device=device)[None]
    candidates: dict[int, list[tuple[str, float]]] = {}
    rounds = min(rounds, len(open_masks)) or len(open_masks)
    for rounds_left in range(rounds, 0, -1):
        hidden = model(torch.tensor([tokens], device=device), positions, lo, hi)[0]
        logits = writable(model.logits(hidden[[i - shift for i in open_masks]]).cpu(), tokenizer)
        logits[:, tokenizer.end_of_text_id] = float("-inf")
        uniforms = torch.rand(len(open_masks), generator=generator, dtype=torch.float64)
        drawn = draw(filtered(logits, sampling), uniforms)
        chances = logits.softmax(-1)
        sureness = chances.gather(1, drawn[:, None])[:, 0]
        stay = sureness.argsort(descending=True, stable=True)[: -(-len(open_masks) // rounds_left)]
        likeliest = chances[stay].topk(min(top, chances.shape[1]))
        for n, values, indices in zip(
            stay.tolist(), likeliest.values.tolist(), likeliest.indices.tolist(), strict=True
        ):
            tokens[open_masks[n]] = int(drawn[n])
            told = zip(indices, values, strict=True)
            candidates[open_masks[n]] = [(tokenizer.decode([token]), chance) for token, chance in told]
        open_masks = [place for place in open_masks if place not in candidates]
    places = sorted(candidates)
    pieces = [(tokenizer.decode(tokens[1 : places[0]]), False)]
    for place, following in zip(places, [*places[1:], len(tokens)], strict=True):
        pieces += [
            (tokenizer.decode([tokens[place]]), True),
            (tokenizer.decode(tokens[place + 1 : following]), False),
        ]
    return Filled(tokenizer.decode(tokens[1:]), pieces, [candidates[place] for place in places])


def _encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of ``text`` after an end-of-text token, with mask tokens for each ``[MASK]`` and ``[MASK:5]``.

    Where words carry the space before them, a mask does too, as any word in its place would.
    """
    takes_space = len(tokenizer.encode(" a")) == 1
    *parts, last = MASKS.split(text)  # texts, each with the number behind it between it and the next
    tokens = [tokenizer.end_of_text_id]
    for part, count in zip(parts[::2], parts[1::2], strict=True):
        tokens += tokenizer.encode(part.removesuffix(" ") if takes_space else part)
        tokens += [tokenizer.mask_id] * (int(count) if count else 1)
    return tokens + tokenizer.encode(last)
