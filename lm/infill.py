"""Reading both ways: fill the masks of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from lm import masks
from lm.generator import writable
from lm.model import Transformer

MASK_WORD = "[MASK]"


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
        logits = writable(model.logits(hidden[[i - shift for i in open_masks]]).cpu(), tokenizer)
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
