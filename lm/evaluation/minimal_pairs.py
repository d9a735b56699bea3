"""Minimal pairs: does a model prefer the acceptable sentence to the unacceptable one?

For BLiMP (Warstadt et al. 2020), Zorro (Huebner et al. 2021) and data in their formats. A pair scores 1, 0, or 1/2 if
both sentences are equally likely; the common rule, the first of two equals wins, gives a model credit for every pair
that it cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.formats import PACKED_SUFFIXES
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.example_files import TEXT, holds_rows, kind_of, rows_of
from lm.evaluation.baselines import Progress, unigram_costs, unigram_likelihoods
from lm.evaluation.bootstrap import TIE_NATS, Accuracy, resampled_means, standard_error
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods

COLUMNS = ("sentence_good", "sentence_bad")
TIES = ("half", "first")


@dataclass(frozen=True)
class Pairs:
    """The pairs of a paradigm: equally many good and bad sentences."""

    paradigm: str
    group: str
    good: list[str]
    bad: list[str]


@dataclass(frozen=True)
class PairsAccuracy(Accuracy):
    """The mean score of ``pairs`` pairs, of which ``ties`` were equally likely."""

    pairs: int
    ties: int


def read_pairs(path: Path, columns: tuple[str, str] = COLUMNS) -> list[Pairs]:
    """Read the pairs of a file, or of all such files in a folder, one paradigm per file.

    ``columns`` name the acceptable and the unacceptable sentence. As in BLiMP, ``UID`` names the paradigm (default:
    the name of the file) and ``linguistics_term`` its group. A .txt file has a sentence per line, as in Zorro: each
    unacceptable one is followed by its acceptable one, and the name is ``GROUP-PARADIGM.txt``. Next to files with
    columns in a folder, .txt files are left out.

    Raise UserError if there are no files, or a line is not a pair; the message gives file and line.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.iterdir())
        files = [file for file in files if holds_rows(file)] or [file for file in files if _holds_lines(file)]
    if not files or not all(file.is_file() for file in files):
        kinds = ".jsonl, .json, .csv, .tsv, .parquet or .txt"
        raise UserError(f"there are no pairs at {path}: name a {kinds} file, or a folder of them")
    return [_read_lines(file) if _holds_lines(file) else _read_file(file, columns) for file in files]


def _read_file(file: Path, columns: tuple[str, str]) -> Pairs:
    good: list[str] = []
    bad: list[str] = []
    paradigm, group = _name(file), ""
    for where, row in rows_of(file):
        for name, sentences in zip(columns, (good, bad), strict=True):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f'{where}: "{name}" is missing or contains no text')
            sentences.append(value)
        paradigm, group = str(row.get("UID") or paradigm), str(row.get("linguistics_term") or group)
    if not good:
        raise UserError(f"{file} contains no pairs")
    return Pairs(paradigm, group, good, bad)


def _holds_lines(file: Path) -> bool:
    return kind_of(str(file)) == TEXT and ".txt" in file.suffixes


def _read_lines(file: Path) -> Pairs:
    lines = [row["sentence"] for _, row in rows_of(file, lines_as="sentence") if row["sentence"].strip()]
    if not lines or len(lines) % 2:
        raise UserError(
            f"{file} has {len(lines):,} sentences: a .txt file of pairs has an even number, each unacceptable sentence "
            "followed by its acceptable one"
        )
    name = _name(file)
    return Pairs(name, name.partition("-")[0] if "-" in name else "", lines[1::2], lines[0::2])


def _name(file: Path) -> str:
    """The name of a file without its kind, compressed or not."""
    return Path(file.stem).stem if file.suffix in PACKED_SUFFIXES else file.stem


def scores(good: NDArray[np.float64], bad: NDArray[np.float64], ties: str) -> NDArray[np.float64]:
    """Return the score of each pair from the log-likelihoods of its sentences."""
    of_tie = {"half": 0.5, "first": 1.0}[ties]
    return np.where(are_ties(good, bad), of_tie, (good > bad).astype(np.float64))


def are_ties(good: NDArray[np.float64], bad: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which pairs are equally likely, up to rounding."""
    return np.abs(good - bad) < TIE_NATS


def evaluate_pairs(
    paradigms: Sequence[Pairs],
    tokenizer: Tokenizer,
    likelihoods: Callable[[list[list[int]]], NDArray[np.float64]],
    *,
    ties: str = "half",
) -> dict[str, PairsAccuracy]:
    """Return the accuracy on each paradigm, and on ``"all"``, the mean over paradigms.

    ``likelihoods`` returns the log-likelihoods of texts, given as tokens.
    """
    results: dict[str, PairsAccuracy] = {}
    resampled = []
    for number, pairs in enumerate(paradigms):
        good, bad = np.split(likelihoods([tokenizer.encode(text) for text in pairs.good + pairs.bad]), 2)
        score = scores(good, bad, ties)
        resampled.append(resampled_means(score, number))
        error, tied = standard_error(resampled[-1]), int(are_ties(good, bad).sum())
        results[pairs.paradigm] = PairsAccuracy(float(score.mean()), error, len(score), tied)
    every = list(results.values())
    mean, error = float(np.mean([each.mean for each in every])), standard_error(np.stack(resampled).mean(0))
    results["all"] = PairsAccuracy(mean, error, sum(each.pairs for each in every), sum(each.ties for each in every))
    return results


def evaluate_model(
    model: LanguageModel, paradigms: Sequence[Pairs], *, ties: str = "half", progress: Progress = lambda text: None
) -> dict[str, dict[str, PairsAccuracy]]:
    """Return ``evaluate_pairs`` for every readout, and for the unigram baseline if the training data still exists.

    Raise UserError if a sentence is longer than the model's context.
    """
    results = {}
    for readout in model.readouts:
        progress(f"{readout}: {sum(len(pairs.good) for pairs in paradigms):,} pairs")
        likelihoods = partial(log_likelihoods, model, readout=readout)
        results[readout] = evaluate_pairs(paradigms, model.tokenizer, likelihoods, ties=ties)
    if (costs := unigram_costs(model.config, progress)) is not None:
        likelihoods = partial(unigram_likelihoods, costs)
        results["unigram (floor)"] = evaluate_pairs(paradigms, model.tokenizer, likelihoods, ties=ties)
    return results
