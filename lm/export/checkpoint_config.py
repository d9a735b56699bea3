"""Read the ``config.json`` of a checkpoint: which model it describes, or why Kindling's model cannot compute it.

A field that is left out has the default of its class in ``transformers``. Fields that the class itself ignores, and
those that change nothing of what it computes (``use_cache``, ``attention_dropout``), are ignored here as well.
"""

from __future__ import annotations

from typing import Any

from data_prep.errors import UserError
from lm.config.model_settings import ModelConfig
from lm.export.stock_architectures import STOCK_CLASSES, StockClass

# Each model_type that can be imported, with the one whose function it computes.
KINDS = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3", "eurobert": "eurobert"}
# What transformers assumes where a config.json is silent, as far as the model types differ.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "eurobert": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_001,
        "mask_token_id": 128_002,
    },
}
# Relatives that people try, and what makes them another model.
OTHERS = {
    "qwen2": "it has biases in its query, key and value projections",
    "gemma": "it scales its embeddings and has norms and an activation of its own",
    "gemma2": "it has norms after its layers and bounds its attention scores",
    "gemma3_text": "it has norms after its layers and sliding windows",
    "mixtral": "it is a mixture of experts",
    "gpt2": "it has learned positions and biases",
    "pixtral": "it reads images",
}


def with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json`` with what its class assumes for fields that are left out.

    Raises:
        UserError: its ``model_type`` cannot be imported.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        *most, last = KINDS
        reason = OTHERS.get(str(kind))
        raise UserError(
            f"model_type {kind!r} cannot be imported: {f'{reason}; ' if reason else ''}"
            f"only {', '.join(most)} and {last} are supported"
        )
    return DEFAULTS[kind] | content


def read_config(content: dict[str, Any]) -> tuple[ModelConfig, int, StockClass]:
    """The model settings of a config ``with_defaults``, its context length, and the stock class of its model.

    Raises:
        UserError: a field is damaged, or the model has a feature that Kindling's lacks; all such features are named.
    """
    kind = content["model_type"]
    stock = next(stock for stock in STOCK_CLASSES if stock.model_type == KINDS[kind])
    try:
        heads = _size(content["num_attention_heads"])
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        config = ModelConfig(
            num_layers=_size(content["num_hidden_layers"]),
            hidden_size=_size(content["hidden_size"]),
            num_heads=heads,
            num_key_value_heads=_size(content.get("num_key_value_heads") or heads),
            head_size=_size(content.get("head_dim") or int(content["hidden_size"]) // heads),
            feed_forward_size=_size(content["intermediate_size"]),
            activation="swiglu",
            qk_norm=stock.qk_norm,
            tie_embeddings=bool(content.get("tie_word_embeddings", False)),
            rope_theta=float(rope.get("rope_theta") or content.get("rope_theta") or 10_000.0),
            norm_epsilon=float(content.get("rms_norm_eps", 1e-6)),
            vocab_size=_size(content["vocab_size"]),
        )
        context_length = _size(content["max_position_embeddings"])
        obstacles = [*_obstacles(content, rope), *_window(content, context_length)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json of this {kind} is damaged: {error}") from None
    if obstacles:
        raise UserError(f"this {kind} cannot be imported: it has {', '.join(obstacles)}")
    return config, context_length, stock


def _obstacles(content: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """The features that Kindling's model lacks, without sliding windows."""
    found = [f"{name} {content[name]!r}" for name in ("attention_bias", "mlp_bias") if content.get(name)]
    if (activation := content.get("hidden_act", "silu")) not in ("silu", "swish"):
        found.append(f"hidden_act {activation!r}")
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        found.append(f"rotary positions that differ between layers ({', '.join(nested)})")
    elif (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        found.append(f"scaled rotary positions ({scaling})")
    for at in (rope, content):
        if (share := at.get("partial_rotary_factor")) not in (None, 1):
            found.append(f"partial_rotary_factor {share!r}")
    if content.get("quantization_config"):
        found.append("quantized weights (quantization_config)")
    return found


def _window(content: dict[str, Any], context_length: int) -> list[str]:
    """What is to be said about a sliding window that is shorter than the context, in any layer."""
    window = content.get("sliding_window")
    if window is None:
        return []
    if content["model_type"] == "qwen3":
        layers = content.get("layer_types")
        slides = (
            bool(content.get("use_sliding_window")) and int(content["max_window_layers"]) < content["num_hidden_layers"]
            if layers is None
            else "sliding_attention" in layers
        )
    else:
        slides = content["model_type"] == "mistral"  # the other classes have no sliding window
    if slides and _size(window) < context_length:
        return [f"a sliding_window of {window:,} tokens, shorter than its context of {context_length:,}"]
    return []


def _size(value: Any) -> int:
    """The value as a size. Raises ValueError if it is not one, or is larger than that of any model."""
    size = int(value)
    if not 1 <= size <= 1 << 24:
        raise ValueError(f"a size of {size}")
    return size
