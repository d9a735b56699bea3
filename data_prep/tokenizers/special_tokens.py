"""The special tokens of an imported checkpoint, and how its ``tokenizer.json`` keeps them.

With a tokenizer trained here, a text begins and ends with one token, the end of text. A checkpoint of ``transformers``
has its own habits, which are spread over several files. An imported tokenizer records them in its ``tokenizer.json``,
so that every copy of this one file keeps them: the post-processor is a TemplateProcessing, as in the tokenizers of
Llama and Gemma, whose template adds what begins a text, and whose table of special tokens also has the entries of
``NAMES``. Other programs use the template and ignore entries that it does not mention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

# The post-processors that add tokens; ByteLevel, the other kind, only corrects offsets.
ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens of a tokenizer.

    Attributes:
        begin: what the tokenizer adds before a text; None if it adds nothing.
        bos: the token that the configuration names ``bos_token``, whether or not it is added.
        end_of_text: what ends a document.
        ends: the tokens that end a generated text; ``end_of_text`` is one of them.
        padding: what fills up a batch; may be ``end_of_text``.
        mask: what hides a token; None if the tokenizer has no such token.
        unwritable: tokens that are never generated.
    """

    begin: int | None
    bos: int | None
    end_of_text: int
    ends: tuple[int, ...]
    padding: int
    mask: int | None
    unwritable: tuple[int, ...]


# The entries of the post-processor's table, with the field that each holds.
NAMES = {
    "bos_token": "bos",
    "eos_token": "end_of_text",
    "stop_tokens": "ends",
    "pad_token": "padding",
    "mask_token": "mask",
    "suppress_tokens": "unwritable",
}


def recorded(backend: Backend) -> SpecialTokens | None:
    """The special tokens that an imported tokenizer records, or None for any other tokenizer."""
    processor = None if backend.post_processor is None else json.loads(backend.post_processor.__getstate__())
    last = (_parts(processor) or [{}])[-1]
    table = last.get("special_tokens", {})
    if last.get("type") != "TemplateProcessing" or "stop_tokens" not in table:
        return None
    ids = {field: tuple(table.get(name, {}).get("ids", ())) for name, field in NAMES.items()}
    begin = last["single"][0].get("SpecialToken")
    return SpecialTokens(
        begin=table[begin["id"]]["ids"][0] if begin else None,
        bos=next(iter(ids["bos"]), None),
        end_of_text=ids["end_of_text"][0],
        ends=ids["ends"],
        padding=ids["padding"][0],
        mask=next(iter(ids["mask"]), None),
        unwritable=ids["unwritable"],
    )


def with_record(description: dict[str, Any], special: SpecialTokens, names: dict[int, str]) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` with these special tokens recorded; ``names`` are all tokens by id."""

    def entry(key: str, ids: tuple[int, ...]) -> dict[str, Any]:
        return {"id": key, "ids": list(ids), "tokens": [names[i] for i in ids]}

    table = {}
    for name, field in NAMES.items():
        value = getattr(special, field)
        if value not in (None, ()):
            table[name] = entry(name, value if isinstance(value, tuple) else (value,))
    start = None
    if special.begin is not None:
        start = names[special.begin]
        table[start] = entry(start, (special.begin,))
    return with_start(description, start, table)


def with_start(description: dict[str, Any], start: str | None, table: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that adds only the special token ``start``, or nothing, before each text.

    ``table`` has the entries of the special tokens of its template.
    """
    begin = [] if start is None else [{"SpecialToken": {"id": start, "type_id": 0}}]
    first, second = ({"Sequence": {"id": each, "type_id": 0}} for each in ("A", "B"))
    template = {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, *begin, second],
        "special_tokens": table,
    }
    kept = [part for part in _parts(description["post_processor"]) if part["type"] not in ADDING]
    return description | {"post_processor": {"type": "Sequence", "processors": [*kept, template]} if kept else template}


def _parts(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The post-processors of a sequence in order, or the one that is no sequence."""
    if processor is None:
        return []
    return list(processor["processors"]) if processor["type"] == "Sequence" else [processor]
