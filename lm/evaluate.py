"""How good a run is: the loss on the whole validation split, beside floors that anyone can reach."""

from __future__ import annotations

import bz2
import json
import math
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from data_prep.shards import Dataset, Split
from lm.checkpoint import MODEL, Checkpoint
from lm.corpora import Corpora, JoinedSplit, open_corpora
from lm.run_directory import Run, choose_device
from lm.validation import validate_readouts

RESULT = "evaluation.json"
READ_AT_ONCE = 1 << 22


def evaluate(run: Run, data: str = "", checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint (None: the newest) on the validation split of ``data`` ("": the data it was trained on).

    On its own data the result is kept in ``evaluation.json``, and read from there when the same is asked again.

    Returns:
        ``validation`` maps each readout to its loss, ``floors`` each floor to nats per token (None: it is not a model
        of tokens) and bits per byte; ``protocol`` says in words what was measured, the rest on what.

    Raises:
        UserError: the data is missing, was made with another tokenizer, or has no validation text.
    """
    dataset = open_corpora((data,) if data else run.config.data.data)
    validation = dataset.split("validation")
    if dataset.tokenizer.sha256 != run.tokenizer.sha256:
        raise UserError(
            f"{dataset.name} was made with another tokenizer than {run.path}: "
            f"prepare it with --tokenizer {run.path}/tokenizer.json"
        )
    if not validation.tokens:
        raise UserError(f"{dataset.name} has no validation text: build it with --validation-fraction above 0")
    checkpoint = checkpoint or run.newest()
    known = saved_evaluation(run, checkpoint)
    if known and known["data_fingerprint"] == dataset.fingerprint:
        return known
    model = run.load_model(choose_device("auto"), checkpoint)
    readouts = validate_readouts(model, dataset, run.config, rows=0, every_token=True)
    result = {
        "step": checkpoint.step,
        "checkpoint": checkpoint.state["sha256"][MODEL],
        "data": str(dataset.name),
        "data_fingerprint": dataset.fingerprint,
        "validation_tokens": validation.tokens,
        "validation_bytes": validation.text_bytes,
        "validation": {name: loss.as_dict() for name, loss in readouts.items()},
        "floors": {name: {"nats_per_token": n, "bits_per_byte": b} for name, (n, b) in floors(dataset).items()},
        "protocol": "whole validation split, "
        f"windows of {run.config.data.context_length} tokens side by side, documents apart; "
        f"a masked readout hides one token in {round(1 / run.config.objective.validation_mask_rate)} at a time, "
        "each behind the mask token, until every token was hidden once",
    }
    if not data:
        write_atomically(run.path / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def saved_evaluation(run: Run, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What ``evaluate`` found, if this checkpoint is what it was last asked for and the file is whole."""
    try:
        known: dict[str, Any] = read_json(run.path / RESULT)
        return known if known["checkpoint"] == checkpoint.state["sha256"][MODEL] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def floors(dataset: Dataset | Corpora) -> dict[str, tuple[float | None, float]]:
    """Losses on the validation split that need no neural network: (nats per token, bits per byte).

    ``unigram`` knows how often each token occurs in the training split (plus one). ``bz2 -9`` compresses the
    validation text by itself.
    """
    validation = dataset.split("validation")
    counts = token_counts(dataset.split("train"), dataset.vocab_size) + 1
    costs = math.log(counts.sum()) - np.log(counts)
    nats = float(token_counts(validation, dataset.vocab_size) @ costs)
    return {
        "unigram": (nats / validation.tokens, nats / math.log(2) / validation.text_bytes),
        "bz2 -9": (None, 8 * compressed_bytes(dataset, validation) / validation.text_bytes),
    }


def token_counts(split: Split | JoinedSplit, vocab_size: int) -> np.ndarray:
    """How often each token occurs, int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, split.tokens, READ_AT_ONCE):
        counts += np.bincount(split.read(start, min(start + READ_AT_ONCE, split.tokens)), minlength=vocab_size)
    return counts


def compressed_bytes(dataset: Dataset | Corpora, split: Split | JoinedSplit) -> int:
    """Size of the split's text after ``bz2 -9``, its documents one after another."""
    compressor, size = bz2.BZ2Compressor(9), 0
    for start in range(0, split.tokens, READ_AT_ONCE):
        tokens = split.read(start, min(start + READ_AT_ONCE, split.tokens)).tolist()
        size += len(compressor.compress(dataset.tokenizer.decode_bytes(tokens)))
    return size + len(compressor.flush())
