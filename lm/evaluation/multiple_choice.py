"""Multiple choice: which answer the model scores highest as a continuation of the question.

Likelihood favors short answers, so each answer is also scored per token, per byte, and relative to its unconditional
likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.examples import Example
from lm.evaluation.baselines import Progress
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


class EncodedAnswer(NamedTuple):
    """A question (``cut`` if it lost its beginning) and an answer, whose tokens begin at ``tokens[first]``."""

    tokens: list[int]
    first: int
    cut: bool


def encode_answer(tokenizer: Tokenizer, question: str, answer: str, room: int) -> EncodedAnswer:
    """Encode question and answer as at most ``room`` tokens. UserError if the answer alone is longer.

    Both are tokenized together; the tokens that equal those of the question alone count as the question.
    """
    whole, alone = tokenizer.encode(question + answer), tokenizer.encode(question)
    first = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False))))
    excess = max(0, len(whole) - room)
    if excess > first:
        raise UserError(f'the answer "{answer[:40]}…" has {len(whole) - first} tokens; at most {room} can be read')
    return EncodedAnswer(whole[excess:], first - excess, excess > 0)


def likelihoods(
    model: LanguageModel, examples: Sequence[Example], readout: str, between: str = " "
) -> tuple[dict[str, list[NDArray[np.float64]]], int]:
    """Score the choices of each example, float64 (choices,), under each normalization; and count the questions cut.

    The examples are of the kind "choice" (``lm.data.examples``); ``between`` is inserted between question and answer
    unless there is white space. Raise UserError if an answer is longer than the model's context.
    """
    answers: list[EncodedAnswer] = []
    for example in examples:
        question, *choices = example.texts
        for choice in choices:
            joined = choice if question[-1:].isspace() or choice[:1].isspace() else between + choice
            try:
                answers.append(encode_answer(model.tokenizer, question, joined, model.context_length - 1))
            except UserError as problem:
                raise UserError(f"{example.place}: {problem}") from None
    tokens, firsts, cut = zip(*answers, strict=True)
    alone = [each.tokens[each.first :] for each in answers]
    sizes = [len(choice.encode("utf-8")) for example in examples for choice in example.texts[1:]]
    given = log_likelihoods(model, tokens, readout, firsts=firsts)
    by_name = {
        "sum": given,
        "token": given / np.maximum([len(each) for each in alone], 1),
        "byte": given / np.maximum(sizes, 1),
        "unconditional": given - log_likelihoods(model, alone, readout),
    }
    borders = np.cumsum([len(example.texts) - 1 for example in examples])[:-1]
    return {name: np.split(scores, borders) for name, scores in by_name.items()}, sum(cut)


def score(scores: NDArray[np.float64], right: int) -> float:
    """Return 1 if the right answer is the most likely, a share of 1 if others are equally likely, else 0."""
    best = scores.max() - scores < TIE_NATS
    return float(best[right] / best.sum())


def evaluate_choices(
    model: LanguageModel, examples: Sequence[Example], *, between: str = " ", progress: Progress = lambda text: None
) -> tuple[dict[str, dict[str, Accuracy]], int]:
    """Return the accuracy of each readout, and of chance, under each normalization; and the number of questions cut.

    Arguments and errors as of ``likelihoods``.
    """
    chance = float(np.mean([1 / (len(example.texts) - 1) for example in examples]))
    right = [example.label for example in examples]
    results, cut = {}, 0
    for readout in model.readouts:
        progress(f"{readout}: {len(examples):,} questions")
        found, cut = likelihoods(model, examples, readout, between)
        results[readout] = {
            name: Accuracy.of(np.array(list(map(score, found[name], right)))) for name in NORMALIZATIONS
        }
    results["chance (floor)"] = dict.fromkeys(NORMALIZATIONS, Accuracy(chance, 0.0))
    return results, cut
