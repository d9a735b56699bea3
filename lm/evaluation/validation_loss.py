"""The loss of a run on the whole validation split, next to baselines."""

from __future__ import annotations

import json
from typing import Any

from data_prep.errors import UserError
from data_prep.files import write_atomically
from lm.data.corpora import open_corpora
from lm.evaluation.baselines import dataset_baselines
from lm.model.device import choose_device
from lm.objectives.diffusion import BOUND
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import RESULT, Run, saved_evaluation
from lm.runs.run_data import open_text
from lm.training.validation import validate_readouts

# bz2 has not seen the training text: on German messages it takes 3.5 bits per byte of 20 kB, 2.8 of 100 kB, 2.3 of 500.
LITTLE_TO_COMPRESS = 500_000  # bytes
BOUND_IN_WORDS = (
    f"{BOUND} is an upper bound of the negative log-likelihood, given where documents end, measured at {{}} shares of "
    "hidden tokens for each window"
)


def evaluate(run: Run, data: str = "", checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint (None: the newest) on the validation split of ``data`` ("": the training data).

    The result on the training data is saved in ``evaluation.json`` and read from there the next time; so is that of an
    imported or merged run, which has no data of its own, on any. ``validation``
    maps each readout to its loss, ``floors`` each baseline to its own (``baseline_losses``); ``protocol`` describes the
    measurement in words; the other keys say what was evaluated, and on what. Raise UserError if the data is missing,
    was made with another tokenizer, or has no validation text.
    """
    dataset = open_corpora((data,), run.config.data.access) if data else open_text(run)
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
    readouts = validate_readouts(model, dataset, run.config.predicting(), rows=0, every_token=True)
    windows = f"whole validation split in adjacent windows of {run.config.data.context_length} tokens"
    result = {
        "step": checkpoint.step,
        "checkpoint": checkpoint.weights_sha256,
        "data": str(dataset.name),
        "data_fingerprint": dataset.fingerprint,
        "validation_tokens": validation.tokens,
        "validation_bytes": validation.counted_bytes,
        "validation": readouts,
        "floors": dataset_baselines(dataset),
        "protocol": protocol(
            f"{windows}, documents separated", run.config.objective.validation_folds, validation.lost_bytes
        )
        + (f"; {BOUND_IN_WORDS.format(run.config.objective.diffusion_passes)}" if BOUND in readouts else ""),
    }
    if not data or not checkpoint.state.get("data_fingerprint"):
        write_atomically(run.path / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def verdict(result: dict[str, Any]) -> str:
    """Whether the readouts of a result predict its text better than the baselines do, in plain sentences."""
    floors = result["floors"]
    not_beaten: dict[tuple[str, ...], list[str]] = {}
    for name, loss in result["validation"].items():
        floors_below = (floor for floor, its in floors.items() if its["bits_per_byte"] <= loss["bits_per_byte"])
        shown = name if name in ("next_token", BOUND) else f"{name} (which sees both sides)"
        not_beaten.setdefault(tuple(floors_below), []).append(shown)
    sentences = []
    for better, names in not_beaten.items() if floors else ():
        who, several = " and ".join(names), names[1:]
        if better:
            verb = "do not beat" if several else "does not beat"
            sentences.append(f"{who} {verb} {' and '.join(better)}: train longer, or on more text.")
        else:
            sentences.append(f"{who} {'beat' if several else 'beats'} {' and '.join(floors)}.")
    if floors and (size := result["validation_bytes"]) < LITTLE_TO_COMPRESS:
        return f"{' '.join(sentences)}\nbz2 -9 learns from these {size:,} bytes alone; a longer text helps it."
    return " ".join(sentences)


def protocol(windows: str, folds: int, lost_bytes: int = 0) -> str:
    """Return the description of a measurement from that of its windows; ``lost_bytes`` of the text have no tokens."""
    masks = f"masked readouts hide one token in {folds} at a time behind the mask token"
    lost = f"; {lost_bytes:,} more bytes, which the tokenizer loses, are not counted" if lost_bytes else ""
    return f"{windows}; {masks}, until every token has been hidden once{lost}"
