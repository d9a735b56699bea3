from __future__ import annotations

import pytest

from lm.config.consistency import inconsistencies
from lm.config.settings import Config


def test_the_defaults_fit_together():
    assert not list(inconsistencies(Config()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 100, "num_heads": 6}, ["hidden_size 100", "num_heads 6", "head_size"]),
        ({"hidden_size": 30, "num_heads": 6}, ["head size is 5", "even"]),
        ({"head_size": 7}, ["head size is 7", "even"]),
        ({"hidden_size": 1024, "num_heads": 2}, ["head size is 512", "at most 256"]),
        ({"num_layers": 10**9}, ["parameters", "num_layers"]),
        ({"hidden_size": 6 * 10**6, "head_size": 64}, ["parameters", "hidden_size"]),
        ({"feed_forward_size": 2**53}, ["parameters", "feed_forward_size"]),
        ({"vocab_size": 2**53}, ["parameters", "vocab_size"]),
        ({"num_heads": 2**50, "head_size": 64}, ["parameters", "num_heads"]),
        ({"num_heads": 6, "num_key_value_heads": 4}, ["num_heads 6", "num_key_value_heads 4"]),
        ({"batch_tokens": 1000, "context_length": 300}, ["batch_tokens 1000", "context_length 300", "nearest is 900"]),
        ({"batch_tokens": 10, "context_length": 300}, ["nearest is 300"]),
        ({"batch_tokens": 1024, "micro_batch_rows": 3}, ["micro_batch_rows 3", "4 rows"]),
        ({"keep_every": 600, "checkpoint_every": 250}, ["keep_every 600", "checkpoint_every 250"]),
        ({"mask_token_share": 0.8, "random_token_share": 0.3}, ["mask_token_share", "random_token_share"]),
        ({"warmup_fraction": 0.5, "decay_fraction": 0.6}, ["warmup_fraction", "decay_fraction"]),
        ({"task": "instruction", "method": "probe"}, ["method probe", "choose full or lora"]),
        ({"task": "instruction", "reads": "bidirectional"}, ["causal attention", "leave reads out"]),
        ({"task": "tokens", "judged_by": "pearson"}, ["judged_by pearson", "accuracy"]),
        ({"task": "regression", "judged_by": "f1"}, ["judged_by f1", "regression has none"]),
        ({"task": "instruction", "judged_by": "pearson"}, ["judged_by pearson", "choose auto"]),
        ({"task": "choice", "label_smoothing": 0.1}, ["label_smoothing", "choice has none"]),
        ({"task": "regression", "class_weights": "balanced"}, ["class_weights", "regression has none"]),
        ({"task": "classification", "method": "lora", "lora_matrices": ()}, ["lora_matrices is empty"]),
        ({"final_masked_fraction": -0.5}, ["final_masked_fraction -0.5", "-1", "at least 0"]),
        ({"final_mask_rate": 0.0}, ["final_mask_rate 0", "-1", "at least 0.01"]),
    ],
)
def test_what_cannot_be_together_is_told_with_its_values(changes, words):
    (problem,) = inconsistencies(Config().replace(**changes))
    assert all(word in problem for word in words), problem


def test_a_head_size_of_its_own_frees_the_width():
    assert not list(inconsistencies(Config().replace(hidden_size=100, num_heads=6, head_size=16)))
