"""How likely a model finds each token of a text, and what it would have said instead, by each readout.

``next_token`` looks at what stands to the left, a masked readout at everything but the token itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from lm.model import Transformer
from lm.scoring import logits_for, questions
from lm.text_stream import TextStream


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
        readout: as in ``lm.scoring``.
        top: how many alternatives.

    Raises:
        UserError: the text is longer than the model's context.
    """
    if len(tokens) >= context_length:
        raise UserError(f"the text has {len(tokens)} tokens; this model reads at most {context_length - 1} at once")
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
