"""What the exports of fine-tuned models and of sentence vectors share: a trunk without the vocabulary's head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from torch import Tensor

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.packed_sequences import sequence_of
from lm.export.huggingface import tokenizer_with_start, write_model
from lm.export.stock_architectures import StockClass, stock_config, stock_weights
from lm.runs.directory import Run


def trunk_weights(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of a trunk by the stock classes' names; ``state`` is that of a ``Transformer``."""
    weights = stock_weights(config.model, state)
    weights.pop("lm_head.weight", None)
    return weights


def trunk_config(run: Run, stock: StockClass, architecture: str) -> dict[str, Any]:
    """The content of ``config.json`` for a class such as ``LlamaForSequenceClassification`` or ``LlamaModel``."""
    content = stock_config(run.config, run.tokenizer, stock) | {"architectures": [architecture]}
    if content.get("mask_token_id", 0) is None:
        del content["mask_token_id"]  # the classes take no null, and do not use it
    return content


def write_trunk(run: Run, folder: Path, content: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the weights, ``config.json`` and the tokenizer to ``folder``.

    A text that spells a special token is read as text, as Kindling reads it.
    """
    settings = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": True}
    write_model(run, folder, content, weights, settings)


def refuse_other_tokens(run: Run, texts: int) -> None:
    """Raise UserError if the exported tokenizer adds other special tokens to a text than we do, or to a pair of texts.

    That of an imported checkpoint adds what it always added. ``texts`` is how many are read together, 1 or 2.
    """
    tokenizer = run.tokenizer
    theirs = Backend.from_str(json.dumps(tokenizer_with_start(tokenizer)))
    words = ["a", "b"][:texts]
    ours, _ = sequence_of(
        [theirs.encode(word, add_special_tokens=False).ids for word in words],
        tokenizer.begin_id,
        tokenizer.end_of_text_id,
        run.config.data.context_length,
    )
    found = theirs.encode("a", "b") if texts == 2 else theirs.encode("a")
    if found.ids != ours:
        what = "a pair of texts" if texts == 2 else "a text"
        raise UserError(
            f"{run.path} cannot be exported: its imported tokenizer adds other special tokens to {what} than it was "
            "read with here"
        )
