"""Layer-wise learning-rate decay, and which weights fine-tuning updates."""

from __future__ import annotations

from lm.config.settings import Config


def learning_rates(config: Config, names: list[str]) -> dict[str, float]:
    """The share of the learning rate that each of these weights of the model has, by ``layer_decay``.

    The head and the last norm have all of it, the blocks below less, each by that factor, and the embedding the least
    (Clark et al. 2020, ELECTRA, section 3.1).
    """
    layers, decay = config.model.num_layers, config.finetune.layer_decay
    found = {}
    for name in names if decay < 1 else ():
        parts = name.split(".")
        if "blocks" in parts:
            found[name] = decay ** (layers - int(parts[parts.index("blocks") + 1]))
        elif "embedding" in parts:
            found[name] = decay ** (layers + 1)
    return found
