"""Export a model as a folder that ``transformers`` loads with its stock classes, without custom code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import save_file

from data_prep.errors import UserError
from data_prep.files import new_folder
from data_prep.tokenizers.tokenizer import Tokenizer
from lm import __version__
from lm.export.stock_architectures import StockClass, stock_class, stock_config, token_ids, weight_names
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, saved_evaluation

OUR_CONFIG = "kindling.toml"  # from which import_checkpoint restores all settings


def choose_readout(run: Run, wanted: str | None) -> str:
    """The readout to export: ``wanted``, or the run's first that a stock class can compute.

    Raises:
        UserError: the run was not trained for it, or no stock class computes it, for the reason given.
    """
    trained = run.config.readouts
    if wanted is not None:
        if wanted not in trained:
            raise UserError(f"{run.path} was trained for {' and '.join(trained)}, not for {wanted}")
        stock_class(run.config.model, wanted)
        return wanted
    problems = []
    for readout in trained:
        try:
            stock_class(run.config.model, readout)
            return readout
        except UserError as problem:
            problems.append(f"{readout}: {problem}")
    raise UserError(f"{run.path} cannot be exported: {'; '.join(problems)}")


def export_huggingface(run: Run, out: Path, checkpoint: Checkpoint, readout: str) -> None:
    """Write a checkpoint to the folder ``out``, for ``AutoModelForCausalLM`` or ``AutoModelForMaskedLM``.

    Weights are float32. The tokenizer adds the end-of-text token before each text, as in training.

    Raises:
        UserError: no stock class computes this readout, or ``out`` is not empty.
    """
    stock, config, tokenizer = stock_class(run.config.model, readout), run.config, run.tokenizer
    names = weight_names(config.model)
    state = run.load_model(torch.device("cpu"), checkpoint).state_dict()
    weights = {names[name]: tensor.detach().float().contiguous() for name, tensor in state.items()}
    suppressed = unwritable_ids(tokenizer, config.model.vocab_size)
    with new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in {
            "config.json": stock_config(config, tokenizer, stock),
            "generation_config.json": {**token_ids(tokenizer), "suppress_tokens": suppressed},
            "tokenizer.json": tokenizer_with_start(tokenizer),
            "tokenizer_config.json": _tokenizer_config(tokenizer, config.data.context_length),
        }.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        config.save(folder / OUR_CONFIG)
        (folder / "README.md").write_text(model_card(run, checkpoint, stock), encoding="utf-8")


def unwritable_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Ids that a model never generates: padding, the mask, and embedding rows without a token."""
    return [*tokenizer.unwritable_ids, *range(tokenizer.vocab_size, vocab_size)]


def tokenizer_with_start(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that adds the end-of-text token before each text, as a special token.

    An imported tokenizer adds what it added in its checkpoint.
    """
    if tokenizer.is_imported:
        return tokenizer.description
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    start = names[tokenizer.end_of_text_id]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    special = {"SpecialToken": {"id": start, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {start: {"id": start, "ids": [tokenizer.end_of_text_id], "tokens": [start]}},
    }
    before = tokenizer.description["post_processor"]
    processor = template if before is None else {"type": "Sequence", "processors": [before, template]}
    return tokenizer.description | {"post_processor": processor}


def tokenizer_without_start(description: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``tokenizer_with_start``; other descriptions are returned unchanged."""
    processor: dict[str, Any] = description.get("post_processor") or {}
    kind = processor.get("type")
    if kind == "TemplateProcessing":
        return description | {"post_processor": None}
    if kind == "Sequence" and [part["type"] for part in processor["processors"]][1:] == ["TemplateProcessing"]:
        return description | {"post_processor": processor["processors"][0]}
    return description


def _tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    special = tokenizer.special
    ids = {"bos": special.bos, "eos": special.end_of_text, "pad": special.padding, "mask": special.mask}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokenizer.decode([token]) for name, token in ids.items() if token is not None},
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }


def model_card(run: Run, checkpoint: Checkpoint, stock: StockClass) -> str:
    """README.md: the model, its training, its losses and its limits."""
    evaluation = saved_evaluation(run, checkpoint) or {}
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("model_card.md")
    return template.render(
        name=run.path.resolve().name,
        stock=stock,
        step=checkpoint.step,
        config=run.config,
        tokens=checkpoint.step * run.config.data.batch_tokens,
        losses=evaluation.get("validation", {}),
        floors=evaluation.get("floors", {}),
        protocol=evaluation.get("protocol"),
        version=__version__,
    )
