"""The rule from which the recipes take what depends on a model's size and on how long it is trained.

The batch grows with the compute C of the whole run as Bi et al. 2024 (DeepSeek LLM, section 3.1) measured it: 0.292
C^0.327 tokens, where C counts 6 FLOPs for each weight of the blocks and each token. AdamW, which moves the embedding
and the head, takes 3.2 over the width, and no more than 0.01: a step of it moves each score by a sum over the width
(Yang et al. 2022, μP). Muon's step has the same norm in every matrix, so its learning rate does not depend on the
width (docs/training.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.config.settings import Config, ModelConfig


@dataclass(frozen=True)
class Rule:
    """What the rule says for one run, by the names of the settings."""

    batch_tokens: int
    learning_rate: float
    muon_learning_rate: float

    def told(self, config: Config) -> str:
        """One line: each value, and that of ``config`` where it is another."""
        settings = config.flat()
        return ", ".join(
            f"{name} {value:,}" + ("" if settings[name] == value else f" (here {settings[name]:,})")
            for name, value in vars(self).items()
        )


def rule_for(config: Config) -> Rule:
    """The rule for the shape of ``config`` and for as many tokens as it trains on."""
    tokens = config.training.steps * config.data.batch_tokens
    compute = 6 * block_weights(config.model) * tokens
    best = 0.292 * compute**0.3271
    return Rule(
        # Whole rows, and a power of two of them.
        batch_tokens=config.data.context_length * 2 ** max(0, round(math.log2(best / config.data.context_length))),
        learning_rate=min(0.01, float(f"{3.2 / config.model.hidden_size:.1g}")),
        muon_learning_rate=0.02,
    )


def block_weights(model: ModelConfig) -> int:
    """Weights of the matrices inside the blocks: all that does not depend on the vocabulary."""
    heads = model.head_width * (2 * model.num_heads + 2 * model.key_value_heads)
    inner = model.feed_forward_width * {"swiglu": 3, "relu2": 2}[model.activation]
    return model.num_layers * model.hidden_size * (heads + inner)
