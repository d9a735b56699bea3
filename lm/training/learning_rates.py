"""Learning rates that differ between the weights of a model."""

from __future__ import annotations

from collections.abc import Iterable

from lm.config.settings import Config


def lr_multipliers(config: Config, names: Iterable[str]) -> dict[str, float]:
    """Learning-rate multipliers of parameters by name; 1 for those left out.

    With ``layer_decay`` each block gets that share of the rate of the block above it, and the embedding the lowest
    (Clark et al. 2020, ELECTRA, section 3.1); ``stem_learning_rate`` and ``head_learning_rate`` are of the embedding
    and of the head alone.
    """
    layers, rates, found = config.model.num_layers, config.optimizer, {}
    heads = {"head", "hidden", "projector"}  # a task's head may have a hidden layer
    for name in names:
        parts = name.split(".")
        if "blocks" in parts and not heads & set(parts):
            found[name] = rates.layer_decay ** (layers - int(parts[parts.index("blocks") + 1]))
        elif heads & set(parts):
            found[name] = rates.head_learning_rate
        elif "embedding" in parts:
            found[name] = rates.layer_decay ** (layers + 1) * rates.stem_learning_rate
    return {name: rate for name, rate in found.items() if rate != 1}
