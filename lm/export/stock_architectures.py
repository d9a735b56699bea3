"""The stock classes of ``transformers`` that compute the same function as a Kindling model, and their weight names.

All three have the same architecture: RMSNorm before each half of a block, rotary positions that pair the halves of a
head, grouped-query attention, swiglu, no softcap, no biases. The masked class also computes masked_next_token, for
programs that look for the prediction of a masked token at the position before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.model_settings import ModelConfig
from lm.config.settings import Config


@dataclass(frozen=True)
class StockClass:
    """A model class of ``transformers``, and the readout and norm of the Kindling models that it computes."""

    name: str
    model_type: str
    readout: str
    qk_norm: bool

    def sibling(self, suffix: str) -> str:
        """The class of the same family with another head: "Model", "ForTokenClassification", …"""
        return self.name.partition("For")[0] + suffix


STOCK_CLASSES = (
    StockClass("LlamaForCausalLM", "llama", "next_token", qk_norm=False),
    StockClass("Qwen3ForCausalLM", "qwen3", "next_token", qk_norm=True),
    StockClass("EuroBertForMaskedLM", "eurobert", "masked_token", qk_norm=False),
)
# The parts of a block: the names of their weights in the stock classes, and in llama.cpp.
PARTS = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.query": ("self_attn.q_proj", "attn_q"),
    "attention.key": ("self_attn.k_proj", "attn_k"),
    "attention.value": ("self_attn.v_proj", "attn_v"),
    "attention.output": ("self_attn.o_proj", "attn_output"),
    "attention.query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention.key_norm": ("self_attn.k_norm", "attn_k_norm"),
    "feed_forward_norm": ("post_attention_layernorm", "ffn_norm"),
    "feed_forward.gate": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.up": ("mlp.up_proj", "ffn_up"),
    "feed_forward.down": ("mlp.down_proj", "ffn_down"),
}


def stock_class(model: ModelConfig, readout: str) -> StockClass:
    """The class that computes this readout of a model.

    Raises:
        UserError: there is none, for the reasons given.
    """
    obstacles = []
    at_place = "masked_token" if readout == "masked_next_token" else readout  # the same function, read elsewhere
    if model.activation != "swiglu":
        obstacles.append(f"the activation {model.activation} (only swiglu can be exported)")
    if model.logit_softcap:
        obstacles.append(f"logit_softcap {model.logit_softcap:g} (only 0 can be exported)")
    found = [stock for stock in STOCK_CLASSES if (stock.readout, stock.qk_norm) == (at_place, model.qk_norm)]
    if not found and at_place == "masked_token":
        obstacles.append("qk_norm in a masked model (only false can be exported)")
    if obstacles:
        raise UserError(f"no model class of transformers supports {'; nor '.join(obstacles)}")
    return found[0]


def reading_class(model: ModelConfig, reads: str) -> StockClass:
    """The class whose hidden states are those of a model that reads "causal" or "bidirectional".

    Raises:
        UserError: there is none, for the reasons given.
    """
    without_cap = replace(model, logit_softcap=0.0)  # it changes the logits of words only
    return stock_class(without_cap, "next_token" if reads == "causal" else "masked_token")


def auto_class(readout: str) -> str:
    """The class of transformers that loads an exported readout."""
    return "AutoModelForCausalLM" if readout == "next_token" else "AutoModelForMaskedLM"


def weight_names(model: ModelConfig) -> dict[str, str]:
    """The stock classes' name of each weight, by Kindling's name."""
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not model.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    for layer in range(model.num_layers):
        for ours, (theirs, _) in PARTS.items():
            if model.qk_norm or ours not in ("attention.query_norm", "attention.key_norm"):
                names[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return names


def stock_weights(model: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights by the stock classes' names; ``state`` is that of a ``Transformer``."""
    names = weight_names(model)
    return {names[name]: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()}


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of the special tokens, by their names in ``config.json`` and ``generation_config.json``."""
    special = tokenizer.special
    return {"bos_token_id": special.bos, "eos_token_id": special.end_of_text, "pad_token_id": special.padding}


def stock_config(config: Config, tokenizer: Tokenizer, stock: StockClass) -> dict[str, Any]:
    """The content of ``config.json``, for both transformers 4 and 5, which name the rotary base differently."""
    model = config.model
    content = {
        "architectures": [stock.name],
        "model_type": stock.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.context_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        **token_ids(tokenizer),
        "torch_dtype": "float32",
    }
    if stock.readout == "masked_token":
        content["mask_token_id"] = tokenizer.special.mask
    return content
