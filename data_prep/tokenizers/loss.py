"""How much of a text its tokens lose: unknown characters, collapsed spaces, capitals, accents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from data_prep.tokenizers.tokenizer import Tokenizer


class Loss(NamedTuple):
    """What tokens do not give back of a text, in UTF-8 bytes, and how many of them are the unknown token."""

    lost_bytes: int = 0
    unknown_tokens: int = 0


NO_LOSS = Loss()


def counted_bytes(text_bytes: int, lost_bytes: int) -> int:
    """Return the bytes of a text that its tokens stand for: at least 1 if the whole text is lost."""
    return max(text_bytes - lost_bytes, 1) if lost_bytes else text_bytes


def loss_of(tokenizer: Tokenizer, text: str, ids: Iterable[int]) -> Loss:
    """Return what a text loses when it becomes ``ids``.

    A character is lost if decoding restores it fewer times than it occurred. Order is ignored, so the result is a lower
    bound. Unknown tokens stand for nothing.
    """
    if tokenizer.is_lossless:
        return NO_LOSS
    given = [int(i) for i in ids]
    known = [i for i in given if i != tokenizer.unknown_id]
    back = tokenizer.decode_bytes(known)
    if back == text.encode("utf-8"):
        return NO_LOSS
    missing = Counter(text) - Counter(back.decode("utf-8", "replace"))
    lost = sum(len(character.encode("utf-8")) * count for character, count in missing.items())
    return Loss(lost, len(given) - len(known))
