"""Export a model as a folder that ``transformers`` loads with its stock classes, without custom code."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.files import new_folder, read_json
from data_prep.tokenizers.special_tokens import with_start
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.export.model_card import NO_FACTS, OUR_CONFIG, CardFacts, language_model_card
from lm.export.stock_architectures import stock_class, stock_config, token_ids, weight_names
from lm.inference.chat_template import CHAT_TEMPLATE, PLAIN_TURNS, ChatFormat, chat_format, read_template
from lm.runs.checkpoint import Checkpoint, save_tensors
from lm.runs.directory import CHECKPOINTS, RESULT, TOKENIZER, Run, warn

GENERATION = "generation_config.json"  # in the run directory of an imported checkpoint that had one
EXPORTED = {
    "config.toml",
    TOKENIZER,
    CHAT_TEMPLATE,
    CHECKPOINTS,
    RESULT,
    GENERATION,
}  # what the folder holds of a run directory


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


def export_huggingface(run: Run, out: Path, checkpoint: Checkpoint, readout: str, facts: CardFacts = NO_FACTS) -> None:
    """Write a checkpoint to the folder ``out``, for ``AutoModelForCausalLM`` or ``AutoModelForMaskedLM``.

    Weights are float32. The tokenizer adds the end-of-text token before each text, as in training.

    Raises:
        UserError: no stock class computes this readout, or ``out`` is not empty.
    """
    stock, config = stock_class(run.config.model, readout), run.config
    names = weight_names(config.model)
    state = run.load_model(torch.device("cpu"), checkpoint).state_dict()
    weights = {names[name]: tensor.detach().float().contiguous() for name, tensor in state.items()}
    with new_folder(out) as folder:
        save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", stock_config(config, run.tokenizer, stock))
        write_json(folder / GENERATION, generation_config(run))
        write_tokenizer(run, folder, generates=readout == "next_token")
        public_settings(config).save(folder / OUR_CONFIG)
        card = language_model_card(run, checkpoint, stock, readout, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_tokenizer(run: Run, folder: Path, *, generates: bool) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template for ``AutoTokenizer``.

    Args:
        generates: whether the model continues texts: a batch is then padded on the left, and a run without a chat
            template gets plain turns.
    """
    write_json(folder / "tokenizer.json", tokenizer_with_start(run.tokenizer))
    settings = tokenizer_config(run.tokenizer, run.config.data.context_length)
    write_json(folder / "tokenizer_config.json", settings | {"padding_side": "left" if generates else "right"})
    if generates or read_template(run.path) is not None:
        (folder / CHAT_TEMPLATE).write_text(template_with_start(run), encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def left_out(run: Run, checkpoint: Checkpoint, exported: set[str]) -> list[str]:
    """What is in a run directory and not in an export of this checkpoint that holds the files ``exported``."""
    files = sorted(path.name for path in run.path.iterdir() if path.name not in exported)
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
    start = "{{ bos_token }}{# begins each text, as in training #}\n"  # the line break after a comment is dropped
    return template if _writes_start(chat) else start + template


def _writes_start(chat: ChatFormat) -> bool:
    if chat.tokenizer.begin_id is None:
        return True  # nothing begins a text
    start = chat.tokenizer.token_text(chat.tokenizer.begin_id)
    system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
    for messages in ([user], [system, user]):  # a template may insist on either
        with suppress(UserError):
            return chat.render(messages).text.startswith(start)
    return "bos_token" in (chat.template or "")


def generation_config(run: Run) -> dict[str, Any]:
    """The content of ``generation_config.json``: what begins and ends a text, and what is never generated.

    An imported run keeps the other settings that its checkpoint had.
    """
    kept = read_json(run.path / GENERATION) if (run.path / GENERATION).is_file() else {}
    ids = token_ids(run.tokenizer)
    ends = list(dict.fromkeys([*run.tokenizer.end_ids, *chat_format(run.path, run.tokenizer, run.config).ends]))
    return (
        kept
        | ids
        | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
        | {"suppress_tokens": unwritable_ids(run.tokenizer, run.config.model.vocab_size)}
    )


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.named_tokens,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
