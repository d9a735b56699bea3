"""The scaling rule behind the recipes: batch size and learning rates from model size and length of training.

The batch grows with the compute C of the whole run, following the fit of Bi et al. 2024 (DeepSeek LLM, section 3.1):
0.292 C^0.327 tokens, where C is 6 FLOPs per weight of the blocks and token. AdamW, which updates the embedding and the
head, uses 3.2 / width, at most 0.01: one of its steps changes each logit by a sum over the width (Yang et al. 2022,
μP). Muon's update has the same norm in every matrix, so its learning rate does not depend on the width
(docs/training.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.config.model_settings import ModelConfig
from lm.config.settings import Config


@dataclass(frozen=True)
class Rule:
    """The rule's values for one run, named like the settings."""

    batch_tokens: int
    learning_rate: float
    muon_learning_rate: float

    def describe(self, config: Config) -> str:
        """Return one line with each value, and that of ``config`` where it differs."""
        settings = config.flat()
        return ", ".join(
            f"{name} {value:,}" + ("" if settings[name] == value else f" (here {settings[name]:,})")
            for name, value in vars(self).items()
        )


def rule_for(config: Config) -> Rule:
    """Apply the rule to the shape of ``config`` and the number of tokens it trains on."""
    tokens = config.training.steps * config.data.batch_tokens
    compute = 6 * block_weights(config.model) * tokens
    best = 0.292 * compute**0.3271
    return Rule(
        # A power of two of whole rows.
        batch_tokens=config.data.context_length * 2 ** max(0, round(math.log2(best / config.data.context_length))),
        learning_rate=min(0.01, float(f"{3.2 / config.model.hidden_size:.1g}")),
        muon_learning_rate=0.02,
    )


def block_weights(model: ModelConfig) -> int:
    """Count the weights of the matrices inside the blocks, that is, those independent of the vocabulary."""
    heads = model.head_width * (2 * model.num_heads + 2 * model.key_value_heads)
    inner = model.feed_forward_width * {"swiglu": 3, "relu2": 2}[model.activation]
    return model.num_layers * model.hidden_size * (heads + inner)
