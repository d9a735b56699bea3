"""Layer-wise learning-rate decay."""

from __future__ import annotations

from lm.config.settings import Config


def lr_multipliers(config: Config, names: list[str]) -> dict[str, float]:
    """Learning-rate multipliers of parameters by name, from ``layer_decay``; 1 for those left out.

    The head and the last norm get the full rate; each block gets ``layer_decay`` times the rate of the block above, and
    the embedding the lowest (Clark et al. 2020, ELECTRA, section 3.1).
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
