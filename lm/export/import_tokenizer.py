"""The tokenizer of a checkpoint, with the habits that its configuration files describe.

What ``transformers`` reads from several files is decided here once, in the same order:

- A text begins with what the post-processor of ``tokenizer.json`` adds. If it adds nothing, ``add_bos_token`` of
  ``tokenizer_config.json`` decides; where only a sentencepiece model exists, a text begins with the bos token unless
  that says false.
- Generation stops at ``eos_token_id``, a number or a list, of ``generation_config.json``, else of ``config.json``, else
  at the tokenizer's ``eos_token``.
- A document ends with the tokenizer's ``eos_token`` if that stops generation, else with the first end that does.
- Padding is ``pad_token``, else ``pad_token_id``, else the end of a document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.files import read_json
from data_prep.tokenizers.sentencepiece import convert_model
from data_prep.tokenizers.special_tokens import SpecialTokens, with_record
from data_prep.tokenizers.tokenizer import END_OF_TEXT_SPELLINGS, MASK_SPELLINGS, Tokenizer, find_or_add
from lm.export.huggingface import tokenizer_without_start
from lm.runs.companions import CHAT_TEMPLATE, GENERATION, TOKENIZER_CONFIG
from lm.runs.directory import TOKENIZER

SENTENCEPIECE = "tokenizer.model"


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. UserError if it cannot be read, or is no object."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object")
    return content


def read_if_there(path: Path) -> dict[str, Any]:
    """``read_object`` of a file that may be missing, which counts as {}."""
    return read_object(path) if path.is_file() else {}


def import_tokenizer(
    folder: Path, config: dict[str, Any], *, masked: bool, note: Callable[[str], None] = lambda text: None
) -> Tokenizer:
    """The tokenizer of the checkpoint in ``folder``, which records its special tokens.

    Args:
        config: the content of config.json, with the defaults of its class.
        masked: give it a mask token even if the checkpoint has none.
        note: called with what is not as the files say.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer begins texts in a way that Kindling does not know.
    """
    path, model = folder / TOKENIZER, folder / SENTENCEPIECE
    only_model = not path.is_file() and model.is_file()
    description = json.loads(convert_model(model)) if only_model else read_object(path)
    plain = Tokenizer.from_json(_text(tokenizer_without_start(description)), name=str(path))
    backend = Backend.from_str(_text(description))
    settings = read_if_there(folder / TOKENIZER_CONFIG)
    if only_model:
        settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"} | settings
    names = read_if_there(folder / "special_tokens_map.json") | {k: v for k, v in settings.items() if v is not None}
    special = _resolved(backend, names, config, read_if_there(folder / GENERATION), masked, note)
    if special == plain.special and plain.vocab_size == _size(backend):
        return plain
    tokens = {token_id: name for name, token_id in backend.get_vocab(with_added_tokens=True).items()}
    recorded = with_record(json.loads(backend.to_str()), special, tokens)
    return Tokenizer.from_json(_text(recorded), name=str(path))


def _text(description: dict[str, Any]) -> str:
    return json.dumps(description, ensure_ascii=False)


def _size(backend: Backend) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def _resolved(
    backend: Backend,
    names: dict[str, Any],
    config: dict[str, Any],
    generation: dict[str, Any],
    masked: bool,
    note: Callable[[str], None],
) -> SpecialTokens:
    """Decide by the module's rules; tokens that are named become special, and missing ones are added to ``backend``."""
    before, after = _added(backend)
    if len(before) > 1:
        raise UserError(f"the tokenizer begins a text with {len(before)} tokens: Kindling knows one or none")
    bos, eos, padding, mask = (_named(backend, names, f"{kind}_token", note) for kind in ("bos", "eos", "pad", "mask"))
    begin = before[0] if before else bos if names.get("add_bos_token") is True else None
    if after:
        note("its tokenizer ends every text with a token: here, only documents end with one, and prompts do not")
    _make_special(backend, [token for token in (begin, bos, eos, padding, mask) if token is not None])
    size, special = _size(backend), {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def id_of(field: str) -> int | None:
        value = generation.get(field, config.get(field))
        return value if isinstance(value, int) and 0 <= value < size else None

    ends = _ids(generation.get("eos_token_id"), size) or _ids(config.get("eos_token_id"), size)
    ends = ends or (() if eos is None else (eos,))
    end_of_text = eos if eos in ends else next((token for token in ends if token in special), eos)
    if end_of_text is None:
        end_of_text = find_or_add(backend, END_OF_TEXT_SPELLINGS)
        note(f"its files name no token that ends a text: it is {backend.id_to_token(end_of_text)}")
    if padding is None:
        padding = id_of("pad_token_id")
    if masked and mask is None:
        mask = id_of("mask_token_id")
        mask = find_or_add(backend, MASK_SPELLINGS) if mask is None else mask
        _make_special(backend, [mask])
    bos = id_of("bos_token_id") if bos is None else bos
    suppressed = _ids(generation.get("suppress_tokens"), size)
    return SpecialTokens(
        begin=begin,
        bos=bos,
        end_of_text=end_of_text,
        ends=ends if end_of_text in ends else (*ends, end_of_text),
        padding=end_of_text if padding is None else padding,
        mask=mask,
        unwritable=suppressed,
    )


def _added(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before and after a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    marks = [bool(mark) for mark in encoding.special_tokens_mask]
    first = marks.index(False) if False in marks else len(marks)
    last = len(marks) - (marks[::-1].index(False) if False in marks else 0)
    return encoding.ids[:first], encoding.ids[last:]


def _named(backend: Backend, names: dict[str, Any], key: str, note: Callable[[str], None]) -> int | None:
    """The id of the token that a configuration names, as a text or as an object with ``content``."""
    value = names.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if name is None:
        return None
    if not isinstance(name, str):
        raise UserError(f"the {key} of the tokenizer must be a text, not {value!r}")
    token_id = backend.token_to_id(name)
    if token_id is None:
        note(f"its {key} is {name}, which {TOKENIZER} does not have: it is left out")
    return token_id


def _ids(value: Any, size: int) -> tuple[int, ...]:
    """The ids below ``size`` of a field that holds a number, a list of numbers or nothing."""
    several = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in several if isinstance(i, int) and 0 <= i < size))


def _make_special(backend: Backend, ids: Iterable[int]) -> None:
    known = backend.get_added_tokens_decoder()
    for token_id in ids:
        if token_id not in known or not known[token_id].special:
            backend.add_special_tokens([AddedToken(backend.id_to_token(token_id), special=True, normalized=False)])


def chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint: of ``chat_template.jinja``, else ``chat_template.json``, else the tokenizer's.

    Of several named ones it is the one named default.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    found = read_if_there(folder / "chat_template.json").get("chat_template")
    found = read_if_there(folder / TOKENIZER_CONFIG).get("chat_template") if found is None else found
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None
