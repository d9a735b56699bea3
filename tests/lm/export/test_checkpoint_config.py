"""What a config.json of transformers says, in its older and newer spellings, and what is refused."""

from __future__ import annotations

import json

import pytest

from data_prep.errors import UserError
from lm.export.checkpoint_config import read_config, with_defaults

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def read(kind, **fields):
    return read_config(with_defaults({"model_type": kind, **SIZES, **fields}))


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10_000),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_type": "default"}}, 9),
        ({"rope_theta": 9.0, "rope_scaling": {"type": "default"}}, 9),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_the_rotary_base_is_read_in_every_spelling(kind, fields, theta):
    assert read(kind, sliding_window=None, **fields)[0].rope_theta == theta


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "eurobert"])
@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2, "head_dim": 8}])
def test_a_field_that_is_left_out_has_the_default_of_its_class(kind, fields):
    transformers = pytest.importorskip("transformers")
    (name,) = (each for each in dir(transformers) if each.lower() == f"{kind}config")
    theirs = json.loads(getattr(transformers, name)(**SIZES, **fields).to_json_string(use_diff=False))
    content = with_defaults({"model_type": kind, "sliding_window": None, **SIZES, **fields})
    model, context_length, _ = read_config(content)
    head_size = theirs.get("head_dim") or model.hidden_size // model.num_heads
    assert (model.key_value_heads, model.head_width) == (theirs["num_key_value_heads"], head_size)
    assert (model.norm_epsilon, context_length) == (theirs["rms_norm_eps"], theirs["max_position_embeddings"])
    assert model.tie_embeddings == theirs["tie_word_embeddings"]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert content.get(token) == theirs[token]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 64, "max_position_embeddings": 64}),
        ("mistral", {"max_position_embeddings": 4096}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
        ("llama", {"sliding_window": 8}),  # which LlamaForCausalLM does not read
    ],
)
def test_a_window_that_hides_nothing_is_accepted(kind, fields):
    assert read(kind, **fields)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("mistral", {"sliding_window": 63, "max_position_embeddings": 64}, "sliding_window of 63 tokens, shorter than"),
        ("mistral", {}, "sliding_window of 4,096 tokens, shorter than its context of 131,072"),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window of 8"),
        ("qwen3", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window of 8"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions .linear"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "scaled rotary positions .llama3"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias True, mlp_bias True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ("llama", {"rope_parameters": "default"}, "is damaged"),
        ("qwen2", {}, "'qwen2' cannot be imported: it has biases"),
        (["llama"], {}, "cannot be imported"),
    ],
)
def test_what_the_model_cannot_express_is_refused_by_name(kind, fields, words):
    with pytest.raises(UserError, match=words):
        read(kind, **fields)
