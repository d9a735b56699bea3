"""The scaling rule behind the recipes: batch size and learning rates from model size and length of training.

The batch grows with the compute C of the whole run, following the fit of Bi et al. 2024 (DeepSeek LLM, section 3.1):
0.292 C^0.327 tokens, where C is 6 FLOPs per weight of the blocks and token. AdamW, which updates the embedding and the
head, uses 3.2 / width, at most 0.01: one of its steps changes each logit by a sum over the width (Yang et al. 2022,
μP). Muon's update has the same norm in every matrix, so its learning rate does not depend on the width
(docs/training.md).

The fit is of runs that see each text about once. Where a run passes over its data more than ``FEW_PASSES`` times, small
steps learn more from the same text, so the batch is at most the one that makes 900 steps a pass, or 9,000 steps in all:
the best hybrid models of BabyLM with 10 million words and ten passes take 16,384 tokens a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.config.model_settings import ModelConfig
from lm.config.settings import Config

FEW_PASSES = 4
STEPS_A_PASS, MOST_STEPS = 900, 9_000  # of what the rule asks for where text repeats


@dataclass(frozen=True)
class Rule:
    """The rule's values for one run, named like the settings; ``why`` is the reason for a smaller batch, if any."""

    batch_tokens: int
    learning_rate: float
    muon_learning_rate: float
    why: str = ""

    def values(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "why"}

    def describe(self, config: Config) -> str:
        """Return one line with each value, and that of ``config`` where it differs."""
        settings = config.flat()
        return (
            ", ".join(
                f"{name} {value:,}" + ("" if settings[name] == value else f" (here {settings[name]:,})")
                for name, value in self.values().items()
            )
            + self.why
        )


def rule_for(config: Config, passes: float | None = None) -> Rule:
    """Apply the rule to the shape of ``config`` and the number of tokens it trains on.

    ``passes`` is how often the run sees each text; None: not known, as without data.
    """
    tokens = config.training.steps * config.data.batch_tokens
    compute = 6 * block_weights(config.model) * tokens
    best = 0.292 * compute**0.3271
    rows = max(0, round(math.log2(best / config.data.context_length)))
    why = ""
    if passes and passes > FEW_PASSES:
        asked = min(MOST_STEPS, STEPS_A_PASS * passes)
        most = max(0, round(math.log2(tokens / asked / config.data.context_length)))
        if most < rows:
            rows, why = (
                most,
                f"; a smaller batch than for one pass, for about {asked:,.0f} steps in {passes:.1f} passes",
            )
    return Rule(
        batch_tokens=config.data.context_length * 2**rows,  # a power of two of whole rows
        learning_rate=min(0.01, float(f"{3.2 / config.model.hidden_size:.1g}")),
        muon_learning_rate=0.02,
        why=why,
    )


def block_weights(model: ModelConfig) -> int:
    """Count the weights of the matrices inside the blocks, that is, those independent of the vocabulary."""
    heads = model.head_width * (2 * model.num_heads + 2 * model.key_value_heads)
    inner = model.feed_forward_width * {"swiglu": 3, "relu2": 2}[model.activation]
    return model.num_layers * model.hidden_size * (heads + inner)
