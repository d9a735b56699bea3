"""Turn tokens into text piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from data_prep.tokenizers.tokenizer import Tokenizer

UNREADABLE = "\ufffd"
NEIGHBORS = 8  # preceding tokens on which the text of a token may depend


class Detokenizer:
    """The text of a growing list of tokens that follows the tokens ``after``.

    Text is held back while it may be the beginning of a character or of a stop string. ``stopped`` is true once a stop
    string is complete; the text returned ends before it, and no more follows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""
        self._characters = _BytesOfTokens(tokenizer) if tokenizer.has_bytes else _TextOfTokens(tokenizer, after)

    def add(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        return self._release(self._characters.add([token]))

    def finish(self) -> str:
        """Return the text held back so far; bytes of an incomplete character become U+FFFD."""
        text = self._release(self._characters.add([], final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # The stop string that is complete first, character by character; of two, the longer one.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _BytesOfTokens:
    """The characters of tokens that each stand for fixed bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: list[int], *, final: bool = False) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens), final)


class _TextOfTokens:
    """The characters of tokens whose text depends on their neighbors (above all, on spaces).

    Each new token is decoded with a few before it; the new text is released once it ends in a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(after[-NEIGHBORS:])
        self._released = len(self._tokens)  # the tokens whose text was released

    def add(self, tokens: list[int], *, final: bool = False) -> str:
        self._tokens += tokens
        before = self._decoded(self._tokens[: self._released])
        after = self._decoded(self._tokens)
        if (after.endswith(UNREADABLE) and not final) or len(after) <= len(before):
            return ""
        # The tokens released now are the neighbors of the next ones; older ones are no longer needed.
        self._tokens, self._released = self._tokens[self._released :], len(self._tokens) - self._released
        return after[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode_bytes(tokens).decode("utf-8")
