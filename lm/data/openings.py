"""Openings of held-out texts: what to try a model on, in the language and manner of its own data."""

from __future__ import annotations

import re
from typing import NamedTuple

from data_prep.shards.tokens import Split
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import MASK_WORD
from lm.data.corpora import JoinedSplit

LOOKED_THROUGH = 4096  # tokens, for the next beginning of a document
LINE_TOKENS = 256
PROMPT_WORDS, FILL_WORDS = 4, 12
# Of a text that is written without spaces.
LONG_WORD, PROMPT_CHARACTERS, FILL_CHARACTERS = 15, 8, 24


class Opening(NamedTuple):
    """The beginning of a line: ``prompt``, a few words to continue, ``text``, more words, and ``fill``, with a mask."""

    prompt: str
    text: str
    fill: str


def openings(split: Split | JoinedSplit, tokenizer: Tokenizer, count: int = 3) -> list[Opening]:
    """The openings of up to ``count`` documents, spread evenly over a split; fewer if it has fewer lines of text."""
    lines = dict.fromkeys(_line(split, tokenizer, split.tokens * n // count) for n in range(count))
    return [_opening(line) for line in lines if line]


def _line(split: Split | JoinedSplit, tokenizer: Tokenizer, start: int) -> str:
    """The first line that has several words, of the first document from ``start`` on, or of its next paragraph."""
    tokens = split.read(start, min(start + LOOKED_THROUGH, split.tokens)).tolist()
    is_inside = start > 0
    if is_inside and tokenizer.end_of_text_id in tokens[:-1]:
        tokens, is_inside = tokens[tokens.index(tokenizer.end_of_text_id) + 1 :], False
    if tokenizer.end_of_text_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.end_of_text_id)]
    text = tokenizer.decode(tokens[:LINE_TOKENS])
    if is_inside:
        text = text.partition("\n")[2]
    lines = [line.strip() for line in text.replace("\ufffd", "").splitlines() if line.strip()]
    return next((line for line in lines if len(line.split()) >= PROMPT_WORDS), lines[0] if lines else "")


def _opening(line: str) -> Opening:
    words = re.findall(r"\S+\s*", line)
    if len(line) > LONG_WORD * len(words):  # written without spaces
        words, few, many = list(line), PROMPT_CHARACTERS, FILL_CHARACTERS
    else:
        few, many = PROMPT_WORDS, FILL_WORDS
    middle = min(len(words), many) // 2
    hidden = min(range(len(words[:many])), key=lambda n: (not any(map(str.isalpha, words[n])), abs(n - middle)))
    masked = re.sub(r"[^\s.,;:!?\"'()]+", MASK_WORD, words[hidden], count=1)
    prompt, text, fill = words[:few], words[:many], [*words[:hidden], masked, *words[hidden + 1 : many]]
    return Opening(*("".join(part).rstrip() for part in (prompt, text, fill)))
