"""Minimal pairs: does a model find the acceptable sentence likelier than the unacceptable one beside it?

BLiMP (Warstadt et al. 2020) and whatever has its form. A pair scores 1, 0, or 1/2 where both sentences are equally
likely; the common way, to take the first of two equals, credits a model with every pair that it cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards.tokens import token_counts
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.corpora import open_corpora
from lm.data.example_files import SUFFIXES, rows_of
from lm.evaluation.baselines import unigram_likelihoods
from lm.evaluation.bootstrap import TIE_NATS, Accuracy, resampled_means, standard_error
from lm.inference.scoring import log_likelihoods
from lm.model.transformer import Transformer
from lm.runs.directory import Run

COLUMNS = ("sentence_good", "sentence_bad")
TIES = ("half", "first")


@dataclass(frozen=True)
class Pairs:
    """The pairs of one paradigm: equally many good and bad sentences."""

    paradigm: str
    group: str
    good: list[str]
    bad: list[str]


@dataclass(frozen=True)
class PairsAccuracy(Accuracy):
    """Mean score of ``pairs`` pairs, of which ``ties`` were equally likely."""

    pairs: int
    ties: int


def read_pairs(path: Path, columns: tuple[str, str] = COLUMNS) -> list[Pairs]:
    """Pairs of a .jsonl, .csv, .tsv or .parquet file, or of all such files of a folder, a paradigm each.

    ``columns`` name the acceptable and the unacceptable sentence. Of BLiMP's other fields ``UID`` names the paradigm
    (else the file does) and ``linguistics_term`` its group.

    Raises:
        UserError: nothing is there, or a line is not a pair; the message has file and line.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"there are no pairs at {path}: name a .jsonl, .csv, .tsv or .parquet file, or a folder of them"
        )
    return [_read_file(file, columns) for file in files]


def _read_file(file: Path, columns: tuple[str, str]) -> Pairs:
    good: list[str] = []
    bad: list[str] = []
    paradigm, group = file.stem, ""
    for place, row in rows_of(file):
        for name, sentences in zip(columns, (good, bad), strict=True):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f'{place}: "{name}" is missing or holds no text')
            sentences.append(value)
        paradigm, group = str(row.get("UID") or paradigm), str(row.get("linguistics_term") or group)
    if not good:
        raise UserError(f"{file} holds no pairs")
    return Pairs(paradigm, group, good, bad)


def scores(good: NDArray[np.float64], bad: NDArray[np.float64], ties: str) -> NDArray[np.float64]:
    """The score of each pair from the log-likelihoods of its sentences."""
    of_tie = {"half": 0.5, "first": 1.0}[ties]
    return np.where(are_ties(good, bad), of_tie, (good > bad).astype(np.float64))


def are_ties(good: NDArray[np.float64], bad: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(good - bad) < TIE_NATS


def evaluate_pairs(
    paradigms: Sequence[Pairs],
    tokenizer: Tokenizer,
    likelihoods: Callable[[list[list[int]]], NDArray[np.float64]],
    *,
    ties: str = "half",
) -> dict[str, PairsAccuracy]:
    """The accuracy on each paradigm, and on ``"all"``, the mean over paradigms.

    Args:
        likelihoods: log-likelihoods of texts, given as tokens (``lm.inference.scoring.log_likelihoods``, or a floor's).
    """
    results: dict[str, PairsAccuracy] = {}
    resampled = []
    for number, pairs in enumerate(paradigms):
        found = likelihoods([tokenizer.encode(sentence) for sentence in pairs.good + pairs.bad])
        good, bad = found[: len(pairs.good)], found[len(pairs.good) :]
        score = scores(good, bad, ties)
        means = resampled_means(score, number)
        resampled.append(means)
        results[pairs.paradigm] = PairsAccuracy(
            float(score.mean()), standard_error(means), len(score), int(are_ties(good, bad).sum())
        )
    over_all = np.stack(resampled).mean(0)
    results["all"] = PairsAccuracy(
        float(np.mean([result.mean for result in results.values()])),
        standard_error(over_all),
        sum(result.pairs for result in results.values()),
        sum(result.ties for result in results.values()),
    )
    return results


def evaluate_run(
    run: Run,
    model: Transformer,
    paradigms: Sequence[Pairs],
    *,
    ties: str = "half",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, PairsAccuracy]]:
    """``evaluate_pairs`` for every readout of a run, and for the unigram floor if the run's data is still there.

    Raises:
        UserError: a sentence is longer than the model's context.
    """
    results = {}
    for readout in run.config.readouts:
        progress(f"{readout}: {sum(len(pairs.good) for pairs in paradigms):,} pairs")

        def likelihoods(texts: list[list[int]], readout: str = readout) -> NDArray[np.float64]:
            return log_likelihoods(model, run.tokenizer, texts, readout, run.config.data.context_length)

        results[readout] = evaluate_pairs(paradigms, run.tokenizer, likelihoods, ties=ties)
    try:
        corpora = open_corpora(run.config.data.data)
    except UserError as missing:
        progress(f"no unigram floor: {missing}")
        return results
    counts = token_counts(corpora.split("train"), run.config.model.vocab_size)
    results["unigram (floor)"] = evaluate_pairs(paradigms, run.tokenizer, unigram_likelihoods(counts), ties=ties)
    return results
