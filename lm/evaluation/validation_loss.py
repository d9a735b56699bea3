"""How good a run is: the loss on the whole validation split, beside floors that anyone can reach."""

from __future__ import annotations

import json
from typing import Any

from data_prep.errors import UserError
from data_prep.files import write_atomically
from lm.data.corpora import open_corpora
from lm.evaluation.baselines import floors
from lm.model.device import choose_device
from lm.runs.checkpoint import MODEL, Checkpoint
from lm.runs.directory import RESULT, Run, saved_evaluation
from lm.training.validation import validate_readouts


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
        "validation": readouts,
        "floors": {name: {"nats_per_token": n, "bits_per_byte": b} for name, (n, b) in floors(dataset).items()},
        "protocol": "whole validation split, "
        f"windows of {run.config.data.context_length} tokens side by side, documents apart; "
        f"a masked readout hides one token in {round(1 / run.config.objective.validation_mask_rate)} at a time, "
        "each behind the mask token, until every token was hidden once",
    }
    if not data:
        write_atomically(run.path / RESULT, json.dumps(result, indent=1) + "\n")
    return result
