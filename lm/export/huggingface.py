"""Export a model as a folder that ``transformers`` loads with its stock classes, without custom code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import names_in, new_folder
from data_prep.tokenizers.special_tokens import with_start
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.export.model_card import NO_FACTS, OUR_CONFIG, CardFacts, language_model_card
from lm.export.stock_architectures import stock_class, stock_config, stock_weights, token_ids
from lm.inference.chat_template import PLAIN_TURNS, ChatFormat, chat_format, read_template
from lm.model.transformer import Transformer
from lm.runs.base_weights import BASE
from lm.runs.checkpoint import Checkpoint, save_tensors
from lm.runs.companions import CHAT_TEMPLATE, GENERATION, TOKENIZER_CONFIG, companion
from lm.runs.directory import ANSWERS, CHECKPOINTS, PROCESSOR, RESULT, TOKENIZER, Run, warn


def choose_readout(run: Run, wanted: str | None) -> str:
    """The readout to export: ``wanted``, or the run's first that a stock class computes at its own place.

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
        except UserError as problem:
            problems.append(f"{readout}: {problem}")
            continue
        if readout != "masked_next_token":
            return readout
        problems.append(
            "masked_next_token predicts a masked token from the position before it, where a fill-mask pipeline does "
            "not look; for programs that do (BabyLM's mntp backend, LLM2Vec) name it: --readout masked_next_token"
        )
    raise UserError(f"{run.path} cannot be exported: {'; '.join(problems)}")


def export_huggingface(
    run: Run,
    out: Path,
    checkpoint: Checkpoint,
    readout: str,
    facts: CardFacts = NO_FACTS,
    model: Transformer | None = None,
) -> None:
    """Write a checkpoint to the folder ``out``, for ``AutoModelForCausalLM`` or ``AutoModelForMaskedLM``.

    Weights are float32. The tokenizer adds the end-of-text token before each text, as in training.

    Args:
        model: of this checkpoint; None: load it.

    Raises:
        UserError: no stock class computes this readout, or ``out`` is not empty.
    """
    stock, config = stock_class(run.config.model, readout), run.config
    model = model or run.load_model(torch.device("cpu"), checkpoint)
    content, weights = stock_config(config, run.tokenizer, stock), stock_weights(config.model, model.state_dict())
    with new_folder(out) as folder:
        write_language_model(run, folder, content, weights, generates=readout == "next_token")
        write_card(run, folder, language_model_card(run, checkpoint, stock, readout, facts))


def write_language_model(
    run: Run, folder: Path, content: dict[str, Any], weights: Mapping[str, Tensor], *, generates: bool
) -> None:
    """Write the weights, ``config.json``, ``generation_config.json``, the tokenizer and the chat template.

    Args:
        content: of ``config.json``.
        generates: whether the model continues texts: a batch is then padded on the left, and a run without a chat
            template gets plain turns.
    """
    write_model(run, folder, content, weights, {"padding_side": "left" if generates else "right"})
    write_json(folder / GENERATION, generation_config(run))
    if generates or read_template(run.path) is not None:
        (folder / CHAT_TEMPLATE).write_text(template_with_start(run), encoding="utf-8", newline="\n")


def write_model(
    run: Run, folder: Path, content: dict[str, Any], weights: Mapping[str, Tensor], tokenizer: dict[str, Any]
) -> None:
    """Write the weights, ``config.json`` and the tokenizer with these settings of its own."""
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", content)
    write_json(folder / "tokenizer.json", tokenizer_with_start(run.tokenizer))
    settings = tokenizer_config(run.tokenizer, run.config.data.context_length)
    write_json(folder / TOKENIZER_CONFIG, settings | tokenizer)


def write_card(run: Run, folder: Path, card: str) -> None:
    """Write the model card and the run's settings."""
    public_settings(run.config).save(folder / OUR_CONFIG)
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def left_out(run: Run, checkpoint: Checkpoint, out: Path) -> list[str]:
    """What is in a run directory and not in ``out``, its exported folder or GGUF file of this checkpoint."""
    exported = {CHECKPOINTS, TOKENIZER, PROCESSOR}
    if out.is_file():
        exported |= {CHAT_TEMPLATE}
    else:  # its settings and measures are in other files, and that of an adapter has a folder for its base
        exported |= {"config.toml", RESULT, ANSWERS, *([BASE] if (out / "base").is_dir() else [])}
        exported |= {name for name in (CHAT_TEMPLATE, GENERATION) if any(out.rglob(name))}
    files = sorted(names_in(run.path) - exported)
    return [f"{CHECKPOINTS} (all but the weights of step {checkpoint.step:,})", *files]


def public_settings(config: Config) -> Config:
    """The settings with only the last name of each absolute path, which says something of this machine."""

    def public(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(public, value))
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return config.replace(**{name: public(value) for name, value in config.flat().items() if public(value) != value})


def unwritable_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Ids that a model never generates: padding and the mask, or what an import names, and rows without a token."""
    return [*tokenizer.unwritable_ids, *range(tokenizer.vocab_size, vocab_size)]


def tokenizer_with_start(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that adds the end-of-text token before each text, as a special token.

    The tokenizer of an imported checkpoint adds what it always added.
    """
    if tokenizer.is_imported:
        return tokenizer.description
    start = tokenizer.token_text(tokenizer.end_of_text_id)
    table = {start: {"id": start, "ids": [tokenizer.end_of_text_id], "tokens": [start]}}
    return with_start(tokenizer.description, start, table)


def tokenizer_without_start(description: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``tokenizer_with_start``; other descriptions are returned unchanged."""
    processor: dict[str, Any] = description.get("post_processor") or {}
    kind = processor.get("type")
    if kind == "TemplateProcessing":
        return description | {"post_processor": None}
    if kind == "Sequence" and [part["type"] for part in processor["processors"]][1:] == ["TemplateProcessing"]:
        return description | {"post_processor": processor["processors"][0]}
    return description


def template_with_start(run: Run) -> str:
    """A run's chat template, or plain turns, for programs that do not add the start token to a rendered text.

    A template that writes the start token itself is unchanged.
    """
    trained = chat_format(run.path, run.tokenizer, run.config)
    chat = replace(trained, special=True)
    if not trained.special and chat.writes_special_tokens:
        warn(
            f"{run.path} was fine-tuned with the special tokens of its chat template as plain characters, but other "
            "programs read them as special tokens: its answers there will be worse; fine-tune again for the export"
        )
    template = PLAIN_TURNS if chat.template is None else chat.template
    begin, bos = run.tokenizer.begin_id, run.tokenizer.special.bos
    if begin is None or _writes_start(chat, run.tokenizer.token_text(begin)):
        return template
    start = "bos_token" if begin == bos else json.dumps(run.tokenizer.token_text(begin))
    return f"{{{{ {start} }}}}{{# begins each text, as in training #}}\n{template}"  # Jinja drops this line break


def _writes_start(chat: ChatFormat, start: str) -> bool:
    system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
    for messages in ([user], [system, user]):  # a template may insist on either
        with suppress(UserError):
            return chat.render(messages).text.startswith(start)
    return "bos_token" in (chat.template or "")


def generation_config(run: Run) -> dict[str, Any]:
    """The content of ``generation_config.json``: what begins and ends a text, and what is never generated.

    An imported run keeps the other settings that its checkpoint had.
    """
    ends = text_ends(run)
    return {
        **companion(run.path, GENERATION),
        **token_ids(run.tokenizer),
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "suppress_tokens": unwritable_ids(run.tokenizer, run.config.model.vocab_size),
    }


def text_ends(run: Run) -> list[int]:
    """The tokens that end a text, and after them that which ends a turn of the chat template."""
    return list(dict.fromkeys([*run.tokenizer.end_ids, *chat_format(run.path, run.tokenizer, run.config).ends]))


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.named_tokens,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
