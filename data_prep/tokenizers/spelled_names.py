"""Keep text that spells a special token from becoming that token, in any tokenizer.

The library finds special tokens before it splits a text, which can be turned off. But many models also have the name of
a special token as an ordinary entry of their vocabulary: T5's Unigram model cuts ``</s>`` out of a text by itself. Such
an entry cannot be removed or renamed, because a special token has the id of the entry with its name. So the text is cut
instead: wherever the model would see the name, its first character becomes a piece of its own. This is the last step of
splitting, so all other texts keep their ids. It exists in memory only: the file stays as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError

# What may stand around a name: how a text is split can depend on it.
SURROUNDINGS = (("", ""), (" ", " "), ("a", "b"), ("1", "2"), ("\n", "\n"), (".", "."), ("«", "»"), ("日", "本"))


def texts_with(name: str) -> Iterator[str]:
    """Yield texts that spell a name: alone, between letters, digits, spaces and signs, repeated, and cut short."""
    yield from (before + name + after for before, after in SURROUNDINGS)
    yield f"{name}{name} {name}\n{name[:-1]}"
    if "\u2581" in name:  # how many tokenizers write a space
        yield name.replace("\u2581", " ")


def keep_spelled_names(backend: Backend, needed: set[int | None]) -> str | None:
    """Cut the names of special tokens, if the model would take them for the tokens.

    Returns the text of the ``tokenizer.json`` without the cut, or None if nothing had to change. Raises ``UserError``
    if a text becomes a special token all the same, as a name of one character does. The token for unknown text may be
    special, unless it is one of those ``needed`` in training.
    """
    names = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    taken = [name for name, token_id in names.items() if _is_taken(backend, name, token_id)]
    unchanged = str(backend.to_str(pretty=True)) if taken else None
    if taken:
        steps = backend.pre_tokenizer
        several = isinstance(steps, pre_tokenizers.Sequence)
        before = [*steps] if several else [steps] if steps else []
        cut = pre_tokenizers.Split(Regex(_first_characters(taken)), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])

    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    found = {name: {i for text in texts_with(name) for i in ids_or_none(encode, text)} for name in names}
    special = set(names.values())
    unknown = unknown_id(backend) if any(ids & special for ids in found.values()) else None
    if unknown is not None and unknown in needed and any(unknown in ids for ids in found.values()):
        raise UserError(f"it encodes unknown text as {backend.id_to_token(unknown)!r}, its special token")
    for name, ids in found.items():
        if (ids & special) - {unknown}:
            raise UserError(f"it encodes the text {name!r} as a special token, and cannot be kept from doing so")
    return unchanged


def _is_taken(backend: Backend, name: str, token_id: int) -> bool:
    """Return whether the model sees a name in one piece and makes one token of it."""

    def encode_word(word: str) -> list[int]:
        return [token.id for token in backend.model.tokenize(word)]

    in_words = (name, f"{name}a", f"a{name}a", f"{name}{name}")
    if len(name) < 2 or not any(token_id in ids_or_none(encode_word, word) for word in in_words):
        return False
    splitter = backend.pre_tokenizer
    return splitter is None or any(
        name in piece for text in texts_with(name) for piece, _ in splitter.pre_tokenize_str(text)
    )


def ids_or_none(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Return what ``encode`` gives, or nothing for a text with unknown characters if the model has no unknown token."""
    try:
        return encode(text)
    except Exception:  # the library has no class of its own for it
        return []


def _first_characters(names: list[str]) -> str:
    """Return a pattern that matches the first character of each name, where the rest of the name follows."""
    by_first = groupby(sorted(names), lambda name: name[0])
    rests = {first: "|".join(re.escape(name[1:]) for name in some) for first, some in by_first}
    return "|".join(f"{re.escape(first)}(?={rest})" for first, rest in rests.items())


def unknown_id(backend: Backend) -> int | None:
    """Return the id that stands for text outside the vocabulary, which may be a special token, or None."""
    model = json.loads(backend.to_str())["model"]
    if model["type"] == "Unigram":
        unknown: int | None = model["unk_id"]
        return unknown
    name = model.get("unk_token")
    return None if name is None else backend.token_to_id(name)
