"""Multiple choice: which answer the model scores highest as a continuation of the question.

Likelihood favors short answers, so each answer is also scored per token, per byte, and relative to its unconditional
likelihood.
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
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods

# What an answer's log-likelihood is divided by, or what is subtracted from it.
NORMALIZATIONS = {
    "sum": "log-likelihood of the answer",
    "token": "per token of the answer",
    "byte": "per byte of the answer",
    "unconditional": "minus the answer's unconditional log-likelihood (Brown et al. 2020)",
}


@dataclass(frozen=True)
class EncodedAnswer:
    """A question and an answer as ``tokens``; those from ``first`` on are the answer's."""

    tokens: list[int]
    first: int


def encode_answer(tokenizer: Tokenizer, question: str, answer: str, room: int) -> tuple[EncodedAnswer, bool]:
    """Encode question and answer, and return whether the question lost its beginning to fit into ``room`` tokens.

    Both are tokenized together; the tokens that equal those of the question alone count as the question.

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
    return EncodedAnswer(whole[excess:], first - excess), excess > 0


def likelihoods(
    model: LanguageModel, examples: Sequence[Example], readout: str, between: str = " "
) -> tuple[list[dict[str, NDArray[np.float64]]], int]:
    """Score the choices of each example under each normalization, float64 (choices,); and count the questions cut.

    Args:
        examples: of the kind "choice" (``lm.data.examples``).
        between: inserted between question and answer unless there is white space.

    Raises:
        UserError: an answer is longer than the model's context.
    """
    answers: list[EncodedAnswer] = []
    alone: list[list[int]] = []
    sizes: list[int] = []
    cut = 0
    for example in examples:
        question, *choices = example.texts
        for choice in choices:
            joined = choice if question[-1:].isspace() or choice[:1].isspace() else between + choice
            try:
                encoded, shortened = encode_answer(model.tokenizer, question, joined, model.context_length - 1)
            except UserError as problem:
                raise UserError(f"{example.place}: {problem}") from None
            cut += shortened
            answers.append(encoded)
            alone.append(encoded.tokens[encoded.first :])
            sizes.append(len(choice.encode("utf-8")))
    firsts = [encoded.first for encoded in answers]
    given = log_likelihoods(model, [encoded.tokens for encoded in answers], readout, firsts=firsts)
    unconditional = log_likelihoods(model, alone, readout)
    tokens = np.array([max(1, len(each)) for each in alone])
    by_name = {
        "sum": given,
        "token": given / tokens,
        "byte": given / np.maximum(sizes, 1),
        "unconditional": given - unconditional,
    }
    borders = np.cumsum([len(example.texts) - 1 for example in examples])[:-1]
    parts = {name: np.split(scores, borders) for name, scores in by_name.items()}
    return [{name: parts[name][n] for name in parts} for n in range(len(examples))], cut


def score(scores: NDArray[np.float64], right: int) -> float:
    """Return 1 if the right answer is the most likely, a share of 1 if others are equally likely, else 0."""
    best = scores.max() - scores < TIE_NATS
    return float(best[right] / best.sum())


def evaluate_choices(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    between: str = " ",
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Accuracy]], int]:
    """Return the accuracy of each readout, and of chance, under each normalization; and the number of questions cut.

    Arguments and errors as of ``likelihoods``.
    """
    chance = np.array([1 / (len(example.texts) - 1) for example in examples])
    results = {}
    cut = 0
    for readout in model.readouts:
        progress(f"{readout}: {len(examples):,} questions")
        found, cut = likelihoods(model, examples, readout, between)
        results[readout] = {
            name: Accuracy.of(
                np.array([score(scores[name], e.label) for scores, e in zip(found, examples, strict=True)])
            )
            for name in NORMALIZATIONS
        }
    results["chance (floor)"] = dict.fromkeys(NORMALIZATIONS, Accuracy(float(chance.mean()), 0.0))
    return results, cut
