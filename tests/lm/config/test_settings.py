from __future__ import annotations

import dataclasses

import pytest

from lm.config.settings import Config, ModelConfig, all_settings, inconsistencies


def test_setting_names_are_unique_over_all_sections():
    names = [setting.name for setting in all_settings()]
    assert len(names) == len(set(names)) == sum(len(dataclasses.asdict(getattr(Config(), s))) for s in vars(Config()))


@pytest.mark.parametrize("setting", list(all_settings()), ids=lambda setting: setting.name)
def test_every_setting_is_explained_and_its_default_is_within_its_limits(setting):
    assert len(setting.help) > 8
    assert setting.kind in ("true|false", "integer", "number", "text", "list of texts")
    assert setting.option == "--" + setting.name.replace("_", "-")
    if setting.choices:
        defaults = setting.default if isinstance(setting.default, tuple) else (setting.default,)
        assert set(defaults) <= set(setting.choices)
    if setting.minimum is not None:
        assert setting.default >= setting.minimum
    if setting.maximum is not None:
        assert setting.default <= setting.maximum


def test_the_defaults_fit_together():
    assert inconsistencies(Config()) == []


def test_replace_finds_each_setting_in_its_section_and_leaves_the_original():
    config = Config()
    changed = config.replace(steps=10, hidden_size=64, prompts=("a",))
    assert (changed.training.steps, changed.model.hidden_size, changed.report.prompts) == (10, 64, ("a",))
    assert config == Config()
    assert changed.replace(steps=1000, hidden_size=192, prompts=()) == config
    with pytest.raises(KeyError):
        config.replace(no_such_setting=1)


def test_flat_has_every_setting_by_name():
    flat = Config().replace(mask_rate=0.3).flat()
    assert flat["mask_rate"] == 0.3
    assert list(flat) == [setting.name for setting in all_settings()]


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 192}, 512),
        ({"hidden_size": 48, "activation": "relu2"}, 192),
        ({"hidden_size": 100, "num_heads": 1}, 288),  # 266.7, up to a multiple of 32
        ({"feed_forward_size": 7}, 7),
    ],
)
def test_the_feed_forward_is_the_usual_multiple_unless_set(changes, width):
    assert ModelConfig(**changes).feed_forward_width == width


def test_head_sizes_and_counts_have_their_usual_values_unless_set():
    assert ModelConfig(hidden_size=48, num_heads=4).head_width == 12
    assert ModelConfig(head_size=10).head_width == 10
    assert ModelConfig(num_heads=6).key_value_heads == 6
    assert ModelConfig(num_heads=6, num_key_value_heads=2).key_value_heads == 2
    assert Config().replace(batch_tokens=1024, context_length=128).data.batch_rows == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 100, "num_heads": 6}, ["hidden_size 100", "num_heads 6", "head_size"]),
        ({"hidden_size": 30, "num_heads": 6}, ["head is 5 wide", "even"]),
        ({"head_size": 7}, ["head is 7 wide", "even"]),
        ({"num_heads": 6, "num_key_value_heads": 4}, ["num_heads 6", "num_key_value_heads 4"]),
        ({"batch_tokens": 1000, "context_length": 300}, ["batch_tokens 1000", "context_length 300", "nearest is 900"]),
        ({"batch_tokens": 10, "context_length": 300}, ["nearest is 300"]),
        ({"batch_tokens": 1024, "micro_batch_rows": 3}, ["micro_batch_rows 3", "4 rows"]),
        ({"keep_every": 600, "checkpoint_every": 250}, ["keep_every 600", "checkpoint_every 250"]),
        ({"mask_token_share": 0.8, "random_token_share": 0.3}, ["mask_token_share", "random_token_share"]),
        ({"warmup_fraction": 0.5, "decay_fraction": 0.6}, ["warmup_fraction", "decay_fraction"]),
        ({"task": "instruction", "method": "probe"}, ["method probe", "choose full or lora"]),
        ({"task": "instruction", "reads": "bidirectional"}, ["read causally", "leave reads out"]),
        ({"task": "tokens", "judged_by": "pearson"}, ["judged_by pearson", "accuracy"]),
        ({"task": "regression", "judged_by": "f1"}, ["judged_by f1", "regression has none"]),
        ({"task": "instruction", "judged_by": "pearson"}, ["judged_by pearson", "choose auto"]),
        ({"task": "choice", "label_smoothing": 0.1}, ["label_smoothing", "choice has none"]),
        ({"task": "regression", "class_weights": "balanced"}, ["class_weights", "regression has none"]),
        ({"task": "classification", "method": "lora", "lora_matrices": ()}, ["lora_matrices names none"]),
    ],
)
def test_what_cannot_be_together_is_told_with_its_values(changes, words):
    (problem,) = inconsistencies(Config().replace(**changes))
    assert all(word in problem for word in words), problem


def test_a_head_size_of_its_own_frees_the_width():
    assert inconsistencies(Config().replace(hidden_size=100, num_heads=6, head_size=16)) == []
