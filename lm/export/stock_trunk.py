"""What the exports of fine-tuned models and of sentence vectors share: a trunk without the vocabulary's head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from torch import Tensor

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.packed_sequences import sequence_of
from lm.export.huggingface import tokenizer_config, tokenizer_with_start, write_json
from lm.export.stock_architectures import StockClass, stock_config, weight_names
from lm.runs.checkpoint import save_tensors
from lm.runs.directory import Run


def trunk_weights(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of a trunk by the stock classes' names; ``state`` is that of a ``Transformer``."""
    names = weight_names(config.model)
    return {names[name]: state[name].detach().float().contiguous() for name in names if name != "head.weight"}


def trunk_config(run: Run, stock: StockClass, architecture: str) -> dict[str, Any]:
    """The content of ``config.json`` for a class such as ``LlamaForSequenceClassification`` or ``LlamaModel``."""
    content = stock_config(run.config, run.tokenizer, stock) | {"architectures": [architecture]}
    if content.get("mask_token_id", 0) is None:
        del content["mask_token_id"]  # the classes take no null, and do not use it
    return content


def write_trunk(run: Run, folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the weights, ``config.json`` and the tokenizer to ``folder``.

    A text that spells a special token is read as text, as Kindling reads it.
    """
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_with_start(run.tokenizer))
    settings = tokenizer_config(run.tokenizer, run.config.data.context_length)
    settings |= {"padding_side": "right", "truncation_side": "right", "split_special_tokens": True}
    write_json(folder / "tokenizer_config.json", settings)


def refuse_other_tokens(run: Run, texts: int) -> None:
    """Raise UserError if the exported tokenizer adds other special tokens to ``texts`` texts read together than we do.

    That of an imported checkpoint adds what it always added.
    """
    tokenizer = run.tokenizer
    words = ["a", "b"][:texts]
    begin, end_of_text = tokenizer.begin_id, tokenizer.end_of_text_id
    ours, _ = sequence_of(tokenizer.encode_batch(words), begin, end_of_text, run.config.data.context_length)
    theirs = Backend.from_str(tokenizer.to_json()) if tokenizer.is_imported else None
    if theirs is not None and theirs.encode(*words).ids != ours:
        what = "a pair of texts" if texts == 2 else "a text"
        raise UserError(
            f"{run.path} cannot be exported: its imported tokenizer marks {what} with other special tokens than "
            "Kindling's fine-tuning and embedding do"
        )
