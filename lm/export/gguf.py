"""Export a model as one GGUF file, with its tokenizer, for llama.cpp and programs built on it.

llama.cpp's architecture "llama" rotates pairs of adjacent dimensions, and Kindling pairs of a head's halves (both are
the rotary positions of Su et al. 2021), so the rows of the query and key matrices are reordered. "qwen3" pairs halves.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import rename, sync_directory
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import LLAMA3_WORDS, QWEN2_WORDS, QWEN35_WORDS
from lm.export.huggingface import template_with_start, text_ends
from lm.export.model_card import NO_FACTS, CardFacts
from lm.export.stock_architectures import PARTS, StockClass, stock_class
from lm.kernels.rotary import interleave_halves
from lm.model.transformer import Transformer
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, warn

PRE_TOKENIZERS = {LLAMA3_WORDS: "llama-bpe", QWEN2_WORDS: "qwen2", QWEN35_WORDS: "qwen35"}  # by their patterns
NORMAL_TOKEN, CONTROL_TOKEN, UNUSED_TOKEN = 1, 3, 5  # llama.cpp's token types
# Names of llama.cpp's converter, and the numbers of its file types and tensor types.
OUTTYPES = {"f32": (0, 0), "f16": (1, 1), "bf16": (32, 30), "q8_0": (7, 8)}


def export_gguf(
    run: Run,
    out: Path,
    checkpoint: Checkpoint,
    readout: str,
    outtype: str = "f32",
    facts: CardFacts = NO_FACTS,
    model: Transformer | None = None,
) -> None:
    """Write a checkpoint to the file ``out``, which must not exist yet.

    Args:
        outtype: the type of the matrices, one of ``OUTTYPES``; vectors stay float32.
        facts: license, languages and base model for the metadata.
        model: of this checkpoint; None: load it.

    Raises:
        UserError: llama.cpp does not support the model, readout or tokenizer, the package gguf is missing, or ``out``
            exists.
    """
    require_gguf(run, readout)
    import gguf

    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    stock, config, tokenizer = stock_class(run.config.model, readout), run.config.model, run.tokenizer
    words = pre_tokenizer_name(tokenizer)
    model = model or run.load_model(torch.device("cpu"), checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    try:
        writer = gguf.GGUFWriter(str(temporary), stock.model_type)
        writer.add_name(run.path.resolve().name)
        writer.add_context_length(run.config.data.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.feed_forward_width)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.key_value_heads)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        writer.add_vocab_size(config.vocab_size)
        file_type, tensor_type = OUTTYPES[outtype]
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if facts.license:
            writer.add_license(facts.license)
        if facts.languages:
            writer.add_languages(list(facts.languages))
        _add_tokenizer(writer, tokenizer, words, config.vocab_size)
        writer.add_chat_template(template_with_start(run))
        for turn_end in [each for each in text_ends(run) if each != tokenizer.end_of_text_id][
            :1
        ]:  # the format has room for one
            writer.add_eot_token_id(turn_end)
        for name, tensor in tensors(model, stock).items():
            stored = gguf.GGMLQuantizationType(tensor_type if tensor.ndim > 1 else 0)
            try:
                values = gguf.quants.quantize(tensor.numpy(), stored)
            except gguf.quants.QuantError:  # its rows are no multiple of a block of 32: float16, as in llama.cpp
                warn(f"{name} is written as f16: {outtype} needs rows of a multiple of 32, not {tensor.shape[-1]}")
                stored = gguf.GGMLQuantizationType.F16
                values = gguf.quants.quantize(tensor.numpy(), stored)
            writer.add_tensor(name, values, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        rename(temporary, out)
        sync_directory(out.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_gguf(run: Run, readout: str) -> None:
    """Raise UserError, without reading weights, if there cannot be a GGUF file of this readout."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError('GGUF needs the package "gguf": pip install "kindling-lm[gguf]"')
    if readout != "next_token":
        raise UserError(f"llama.cpp generates text from left to right and cannot use the readout {readout}")
    stock_class(run.config.model, readout)
    pre_tokenizer_name(run.tokenizer)


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer, which splits text into words.

    Raises:
        UserError: llama.cpp has no equivalent of this tokenizer.
    """
    description = tokenizer.description
    splitter = description["pre_tokenizer"]
    steps = [] if splitter is None else splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    plain = {"type": "ByteLevel", "add_prefix_space": False}
    # A name that is cut in memory only would be a special token there.
    stated = description["normalizer"] is None and not tokenizer.cuts_names
    if tokenizer.kind == "bpe" and stated and steps and _has(steps[-1], plain):
        by_gpt2 = steps[-1]["use_regex"]
        if by_gpt2 and len(steps) == 1:
            return "gpt-2"
        if by_gpt2 and len(steps) == 2 and _has(steps[0], {"type": "Digits", "individual_digits": True}):
            return "starcoder"
        if not by_gpt2 and len(steps) == 2 and steps[0]["type"] == "Split":
            words = steps[0]["pattern"].get("Regex")
            if words in PRE_TOKENIZERS:
                return PRE_TOKENIZERS[words]
    raise UserError(
        f"llama.cpp has no equivalent of this tokenizer (kind {tokenizer.kind}): only byte-level BPE with the split "
        "gpt2, llama3, qwen2 or qwen35 can be exported"
    )


def _has(step: dict[str, object], wanted: dict[str, object]) -> bool:
    return all(step.get(name) == value for name, value in wanted.items())


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, words: str, vocab_size: int) -> None:
    model = tokenizer.description["model"]
    texts = {token_id: text for text, token_id in model["vocab"].items()}
    special = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    tokens = [special.get(i) or texts.get(i) or f"<|unused_{i}|>" for i in range(vocab_size)]
    kinds = [CONTROL_TOKEN if i in special else NORMAL_TOKEN if i in texts else UNUSED_TOKEN for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    own = tokenizer.special
    bos = own.bos if own.begin is None else own.begin  # llama.cpp begins a text with its bos token, or with none
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_eos_token_id(own.end_of_text)
    writer.add_pad_token_id(own.padding)
    if own.mask is not None:
        writer.add_mask_token_id(own.mask)
    writer.add_add_bos_token(own.begin is not None)


def tensors(model: Transformer, stock: StockClass) -> dict[str, Tensor]:
    """The model's weights as float32 tensors, by their names in llama.cpp."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().float().contiguous()
        if name.startswith("blocks."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            if stock.model_type == "llama" and part in ("attention.query", "attention.key"):
                value = interleave_halves(value, config.head_width)
            found[f"blk.{layer}.{PARTS[part][1]}.weight"] = value
        else:
            theirs = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}[name.split(".")[0]]
            found[f"{theirs}.weight"] = value
    return found
