from __future__ import annotations

from pathlib import Path

import pytest

from lm.config.model_settings import ModelConfig
from lm.config.recipes import load_config
from lm.config.scaling import block_weights, rule_for
from lm.config.settings import Config
from lm.model.transformer import Transformer

RECIPES = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["tiny", "small", "30m", "110m", "350m"])
def test_the_recipes_follow_the_rule(name):
    config = load_config(RECIPES / f"{name}.toml")
    settings = config.flat()
    assert {key: settings[key] for key in rule_for(config).values()} == rule_for(config).values()


def test_the_batch_is_what_deepseek_measured_for_its_compute():
    # 12 blocks of 768: 85M weights; 2.1 billion tokens: 1.07e18 FLOPs; 0.292 * (1.07e18)**0.3271 = 2.3e5, near 2**18.
    config = Config().replace(
        num_layers=12, hidden_size=768, num_heads=12, context_length=1024, batch_tokens=1 << 18, steps=8000
    )
    assert rule_for(config).batch_tokens == 1 << 18
    # 1,000 times the compute wants 1,000 ** 0.3271 = 9.6 times the batch: 8 times, as powers of two go.
    assert rule_for(config.replace(steps=8_000_000)).batch_tokens in (1 << 21, 1 << 22)


@pytest.mark.parametrize(
    "shape",
    [
        ModelConfig(num_layers=2, hidden_size=64, num_heads=4, vocab_size=50),
        ModelConfig(
            num_layers=3,
            hidden_size=48,
            num_heads=6,
            num_key_value_heads=2,
            head_size=10,
            activation="relu2",
            vocab_size=50,
        ),
    ],
)
def test_the_weights_of_the_blocks_are_counted_as_the_model_has_them(shape):
    assert block_weights(shape) == sum(p.numel() for p in Transformer(shape).blocks.parameters() if p.ndim == 2)


def test_a_rule_is_described_with_the_values_that_differ():
    config = Config().replace(learning_rate=0.5)
    assert "learning_rate 0.01 (here 0.5), muon_learning_rate 0.02" in rule_for(config).describe(config)


def test_ten_passes_take_small_steps_and_the_plan_says_why():
    """65,536 tokens x 2,100 steps are ten passes over BabyLM's 10 million words: about 9,000 steps of 16,384 tokens."""
    config = load_config(RECIPES / "30m.toml")
    assert rule_for(config, 4.0) == rule_for(config) == rule_for(config, 0.3)
    rule = rule_for(config, 10.0)
    assert rule.batch_tokens == 16_384
    assert 8_000 <= config.training.steps * config.data.batch_tokens / rule.batch_tokens <= 9_000
    expected = "batch_tokens 16,384 (here 65,536)"
    assert rule.describe(config).startswith(expected)
    assert rule.describe(config).endswith("for about 9,000 steps in 10.0 passes")
    assert rule_for(config, 100.0).batch_tokens == 16_384  # no more steps than that


def test_a_batch_that_is_small_already_stays_however_often_text_repeats():
    config = Config().replace(batch_tokens=2_048, context_length=256, steps=200_000)
    assert rule_for(config, 20.0) == rule_for(config)
