"""Where fine-tuning begins with other settings than pretraining (docs/finetuning.md)."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "muon_learning_rate": 0.002,
    "weight_decay": 0.01,
    "beta2": 0.98,
    "warmup_fraction": 0.1,
    "decay_fraction": 0.9,
    "dropout": 0.1,
    "checkpoint_every": 200,
    "keep_checkpoints": 1,
}
# Of AdamW, by method; of the first where a method is not named.
LEARNING_RATES = {"full": 1e-3, "lora": 5e-3, "probe": 1e-2}
# Settings that follow from epochs, batch_examples and validations_per_epoch.
DERIVED = ("steps", "validate_every", "validation_rows", "parallel", "init_from", "compile")
