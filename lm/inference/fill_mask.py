"""Fill the masks of a text, using context from both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import MASKS, problem_of_fill
from lm.config.settings import Config
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling, draw, filtered, require_tokens, writable
from lm.kernels import masks


@dataclass(frozen=True)
class Filled:
    """A text with its masks filled.

    ``pieces`` is the text in parts, each with whether it was filled in; ``candidates`` holds for each mask the most
    likely tokens with their probabilities.
    """

    text: str
    pieces: list[tuple[str, bool]]
    candidates: list[list[tuple[str, float]]]


GREEDY = Sampling(temperature=0)


@torch.inference_mode()
def fill_masks(
    model: LanguageModel,
    text: str,
    *,
    top: int = 5,
    rounds: int = 0,
    order: str = "confidence",
    sampling: Sampling = GREEDY,
) -> Filled:
    """Replace each ``[MASK]`` with one token, reading the text bidirectionally; ``[MASK:5]`` stands for five masks.

    Each round draws a token for every remaining mask and keeps those with the highest probability, equally many per
    round; the other masks are predicted again with these in place (Ghazvininejad et al. 2019, Mask-Predict; Chang et
    al. 2022, MaskGIT). In the ``order`` "random", masks are kept that are drawn at random; with one mask a round that
    draws from the distribution whose likelihood masked diffusion bounds (``lm.objectives.diffusion``).

    Args:
        top: the number of candidates per mask, by the model's own probabilities when the mask was filled.
        rounds: at most one per mask; 0 means one per mask, so that the most certain mask is filled at a time.
        order: which masks a round keeps, one of ``lm.config.sampling.ORDERS``.
        sampling: temperature, filters and seed of the draws; its other settings are ignored.

    Raises:
        UserError: as of ``tokens_to_fill``.
    """
    tokenizer = model.tokenizer
    tokens = tokens_to_fill(model.tokenizer, model.config, text)
    open_masks = [i for i, token in enumerate(tokens) if token == tokenizer.mask_id]
    generator = torch.Generator().manual_seed(sampling.seed)
    candidates: dict[int, list[tuple[str, float]]] = {}
    rounds = min(rounds, len(open_masks)) or len(open_masks)
    for rounds_left in range(rounds, 0, -1):
        logits = _mask_logits(model, tokens, open_masks)
        uniforms = torch.rand(len(open_masks), generator=generator, dtype=torch.float64)
        drawn = draw(filtered(logits, sampling), uniforms)
        require_tokens(drawn.tolist(), logits.shape[-1])
        probabilities = logits.softmax(-1)
        certainty = probabilities.gather(1, drawn[:, None])[:, 0]
        if order == "random":
            certainty = torch.rand(len(open_masks), generator=generator)
        kept = certainty.argsort(descending=True, stable=True)[: -(-len(open_masks) // rounds_left)]
        best = probabilities[kept].topk(min(top, probabilities.shape[1]))
        for n, values, ids in zip(kept.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            tokens[open_masks[n]] = int(drawn[n])
            candidates[open_masks[n]] = [(tokenizer.decode([i]), p) for i, p in zip(ids, values, strict=True)]
        open_masks = [position for position in open_masks if position not in candidates]
    filled = sorted(candidates)
    return Filled(tokenizer.decode(tokens[1:]), _pieces(tokenizer, tokens, filled), [candidates[i] for i in filled])


def tokens_to_fill(tokenizer: Tokenizer, config: Config, text: str) -> list[int]:
    """The tokens of a text with masks, which ``fill_masks`` can fill with a model of these settings.

    Raises:
        UserError: the model cannot fill masks, there is no [MASK] in the text, or the text is too long.
    """
    if not set(config.readouts) - {"next_token"}:
        raise UserError("this model was not trained to fill masks")
    if problem := problem_of_fill(text):
        raise UserError(problem)
    tokens, most = _encode_with_masks(tokenizer, text), config.data.context_length
    if len(tokens) > most:
        raise UserError(f"the text to fill has {len(tokens)} tokens; this model reads at most {most} at once")
    return tokens


def masks_after(tokenizer: Tokenizer, config: Config, prompt: str, most: int) -> str:
    """The prompt followed by ``most`` masks, or by as many as the model can read; UserError if that is none."""
    room = config.data.context_length - len(tokens_to_fill(tokenizer, config, f"{prompt}[MASK]")) + 1
    return f"{prompt}[MASK:{min(most, room)}]"


def _mask_logits(model: LanguageModel, tokens: list[int], positions: list[int]) -> Tensor:
    """Return logits (masks, vocabulary) at masked ``positions``, on the CPU; -inf for tokens that fill no mask."""
    shift = 1 if model.masked_readout == "masked_next_token" else 0
    lo, hi = masks.bidirectional(1, len(tokens), device=model.device)
    inputs, numbers = torch.tensor([tokens], device=model.device), torch.arange(len(tokens), device=model.device)
    hidden = model.model(inputs, numbers[None], lo, hi)[0]
    logits = writable(model.model.logits(hidden[[i - shift for i in positions]]).cpu(), model.tokenizer)
    logits[:, model.tokenizer.end_of_text_id] = float("-inf")
    return logits


def _pieces(tokenizer: Tokenizer, tokens: list[int], filled: list[int]) -> list[tuple[str, bool]]:
    """Split the text at the ``filled`` positions; True marks a filled piece."""
    pieces = [(tokenizer.decode(tokens[1 : filled[0]]), False)]
    for position, following in zip(filled, [*filled[1:], len(tokens)], strict=True):
        pieces.append((tokenizer.decode([tokens[position]]), True))
        pieces.append((tokenizer.decode(tokens[position + 1 : following]), False))
    return pieces


def _encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of ``text`` after the one that begins it, with mask tokens for ``[MASK]`` and ``[MASK:5]``.

    If words include the space before them, so does a mask.
    """
    *parts, last = MASKS.split(text)  # text and number of masks alternate
    tokens = [tokenizer.start_id]
    for part, count in zip(parts[::2], parts[1::2], strict=True):
        tokens += tokenizer.encode(part.removesuffix(" ") if tokenizer.words_have_spaces else part)
        tokens += [tokenizer.mask_id] * (int(count) if count else 1)
    return tokens + tokenizer.encode(last)
