"""Questions with several answers to choose from, decided by which answer the model finds likeliest behind the question.

Likelihood favours short answers, so each is also judged per token, per byte, and beside how likely the answer is behind
nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.examples import Example
from lm.evaluation.bootstrap import TIE_NATS, Accuracy
from lm.inference.scoring import log_likelihoods
from lm.model.transformer import Transformer
from lm.runs.directory import Run

# What an answer's log-likelihood is divided by, or what is subtracted from it.
NORMALISATIONS = {
    "sum": "log-likelihood of the answer",
    "token": "per token of the answer",
    "byte": "per byte of the answer",
    "unconditional": "less that of the answer behind nothing (Brown et al. 2020)",
}


@dataclass(frozen=True)
class Encoded:
    """One answer behind its question: ``tokens``, of which those from ``first`` on are the answer's."""

    tokens: list[int]
    first: int


def encode_behind(tokenizer: Tokenizer, question: str, answer: str, room: int) -> tuple[Encoded, bool]:
    """An answer behind its question, and whether the question lost its beginning to fit into ``room`` tokens.

    Both are tokenized together; what the question alone has in common with that is the question.

    Raises:
        UserError: the answer alone is too long.
    """
    whole, alone = tokenizer.encode(question + answer), tokenizer.encode(question)
    first = next(
        (n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(map(len, (whole, alone)))
    )
    excess = max(0, len(whole) - room)
    if excess > first:
        raise UserError(f'the answer "{answer[:40]}…" has {len(whole) - first} tokens; at most {room} can be read')
    return Encoded(whole[excess:], first - excess), excess > 0


def likelihoods(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    readout: str,
    context_length: int,
    between: str = " ",
) -> tuple[list[dict[str, NDArray[np.float64]]], int]:
    """For each example the score of its choices by each normalisation, float64 (choices,); and the questions cut.

    Args:
        examples: of the kind "choice" (``lm.data.examples``).
        between: what stands between question and answer, unless there is space already.

    Raises:
        UserError: an answer is longer than the model's context.
    """
    behind: list[Encoded] = []
    alone: list[list[int]] = []
    sizes: list[int] = []
    cut = 0
    for example in examples:
        question, *choices = example.texts
        for choice in choices:
            joined = choice if question[-1:].isspace() or choice[:1].isspace() else between + choice
            try:
                encoded, shortened = encode_behind(tokenizer, question, joined, context_length - 1)
            except UserError as problem:
                raise UserError(f"{example.place}: {problem}") from None
            cut += shortened
            behind.append(encoded)
            alone.append(encoded.tokens[encoded.first :])
            sizes.append(len(choice.encode("utf-8")))
    firsts = [encoded.first for encoded in behind]
    given = log_likelihoods(model, tokenizer, [each.tokens for each in behind], readout, context_length, firsts=firsts)
    free = log_likelihoods(model, tokenizer, alone, readout, context_length)
    tokens = np.array([max(1, len(each)) for each in alone])
    by_name = {
        "sum": given,
        "token": given / tokens,
        "byte": given / np.maximum(sizes, 1),
        "unconditional": given - free,
    }
    borders = np.cumsum([len(example.texts) - 1 for example in examples])[:-1]
    parts = {name: np.split(scores, borders) for name, scores in by_name.items()}
    return [{name: parts[name][n] for name in parts} for n in range(len(examples))], cut


def score(scores: NDArray[np.float64], right: int) -> float:
    """1 if the right answer is the likeliest, a share of it if others are as likely, else 0."""
    best = scores.max() - scores < TIE_NATS
    return float(best[right] / best.sum())


def evaluate_choices(
    run: Run,
    model: Transformer,
    examples: Sequence[Example],
    *,
    between: str = " ",
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Accuracy]], int]:
    """For each readout of a run the accuracy by each normalisation, and "chance"; and how many questions were cut.

    Arguments and errors as of ``likelihoods``.
    """
    chance = np.array([1 / (len(example.texts) - 1) for example in examples])
    results = {}
    cut = 0
    for readout in run.config.readouts:
        progress(f"{readout}: {len(examples):,} questions")
        context = run.config.data.context_length
        found, cut = likelihoods(model, run.tokenizer, examples, readout, context, between)
        results[readout] = {
            name: Accuracy.of(
                np.array([score(scores[name], e.label) for scores, e in zip(found, examples, strict=True)])
            )
            for name in NORMALISATIONS
        }
    results["chance (floor)"] = dict.fromkeys(NORMALISATIONS, Accuracy(float(chance.mean()), 0.0))
    return results, cut
