"""Tokens in, pieces of text out: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from data_prep.tokenizers.tokenizer import Tokenizer

UNREADABLE = "\ufffd"
NEIGHBOURS = 8  # tokens before a text on which the first one's text may depend


class TextStream:
    """The text of one growing list of tokens, which follows the tokens ``after``.

    Text is held back while it may be the beginning of a character or of a stop string. ``stopped`` says that a stop
    string was complete; what was given out ends before it, and nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""
        self._characters = _BytesOfTokens(tokenizer) if tokenizer.has_bytes else _TextOfTokens(tokenizer, after)

    def add(self, token: int) -> str:
        """What can be given out with one more token."""
        return self._pass_on(self._characters.add(token))

    def finish(self) -> str:
        """What was held back, at the end; bytes of an unfinished character become U+FFFD."""
        text = self._pass_on(self._characters.finish()) + self._held
        self._held = ""
        return text

    def _pass_on(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # The one that is complete first, as if the text came character by character; of two, the longer one.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _BytesOfTokens:
    """Characters of tokens that each stand for some bytes, exact for any cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TextOfTokens:
    """Characters of tokens whose text depends on their neighbours (spaces, above all): a few are decoded again with
    each new one, and what is new at the end is passed on once it ends in a whole character."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(after[-NEIGHBOURS:])
        self._told = len(self._tokens)  # of ``_tokens``, those whose text was passed on

    def add(self, token: int) -> str:
        self._tokens.append(token)
        return self._new_text(final=False)

    def finish(self) -> str:
        return self._new_text(final=True)

    def _new_text(self, *, final: bool) -> str:
        before = self._decoded(self._tokens[: self._told])
        after = self._decoded(self._tokens)
        if (after.endswith(UNREADABLE) and not final) or len(after) <= len(before):
            return ""
        # The tokens passed on now are the neighbours of those to come; older ones are not needed again.
        self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
        return after[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode_bytes(tokens).decode("utf-8")
