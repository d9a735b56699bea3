"""Which tokens belong to one word."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer

# Scripts without spaces between words: Thai to Lao, Myanmar, Khmer, Chinese and Japanese.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def word_joints(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Where tokens may belong to the word of their neighbor: bool (2, vocabulary).

    A token belongs to the word of the token before it if [0] is true of it, and [1] of the one before. Of tokenizers
    that mark the pieces inside a word (WordPiece), [0] is that mark. Others have words that are runs of letters, marks
    and digits in which no token begins with a space; where a script has no spaces, each token is a word.

    Raises:
        UserError: a token is a byte, so that most letters are several.
    """
    if tokenizer.kind == "bytes":
        raise UserError("mask_whole_words: where a token is a byte, it is not known which tokens make a word")
    inside = tokenizer.description["model"].get("continuing_subword_prefix")
    found = np.zeros((2, tokenizer.vocab_size), dtype=bool)
    for token_id in set(range(tokenizer.vocab_size)) - set(tokenizer.special_tokens.values()):
        if inside:
            found[:, token_id] = tokenizer.piece(token_id).startswith(inside), True
        else:
            found[:, token_id] = _joints_of(_bytes_of(tokenizer, token_id))
    return found


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token with the space before it, which sentencepiece writes as ▁."""
    if tokenizer.has_bytes:
        return tokenizer.decode_bytes([token_id])
    return tokenizer.piece(token_id).replace("▁", " ").encode("utf-8")


def _joints_of(token: bytes) -> tuple[bool, bool]:
    """Whether a token's first, and last, character can be inside a word; a cut character counts as a letter."""
    text = token.decode("utf-8", "replace")
    return bool(text) and _goes_on(text[0]), bool(text) and _goes_on(text[-1])


def _goes_on(character: str) -> bool:
    return character == "\ufffd" or (unicodedata.category(character)[0] in "LMN" and not UNSPACED.match(character))
