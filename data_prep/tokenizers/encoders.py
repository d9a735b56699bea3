"""Encoders: the fastest installed one that is exact for this tokenizer, proven before it is used.

``tokenizers`` says what is right. Other libraries encode ten to forty times faster, but each is wrong for some
tokenizers, most of the time without a word. So ``choose_engine`` lets each encode ``PROBES`` and some of the corpus,
and takes the first whose ids are those of ``tokenizers``, every one; ``recheck`` looks again on the way. Special tokens
are unknown to every engine: a text that spells one stays text.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.errors import UserError
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

__all__ = ["ENGINES", "PROBES", "Chosen", "Engine", "EngineError", "choose_engine", "make_engine", "recheck"]

# Unicode's White_Space, which the engine's pattern means by \s. Python's own \s has four characters more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# GPT-2's pattern with all kinds of words taken as one: no match of the full pattern reaches over a match of this one.
RUNS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")

LARGEST_CACHE_CHARACTERS = 1 << 23  # about 100 MB with the dictionary around them


class EngineError(UserError):
    """A fast engine gave other ids than ``tokenizers``."""


class UnsuitableError(Exception):
    """This engine cannot encode with this tokenizer; the text says why."""


class Engine(Protocol):
    """Encodes texts with one tokenizer.

    Attributes:
        short_name: one of ``ENGINES``.
        name: the library with its version, as the manifest has it.
    """

    short_name: str
    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts joined, in the shards' dtype and without end-of-text, and each text's number (int64)."""
        ...


@dataclass(frozen=True)
class Chosen:
    """An engine that was proven, and what became of those tried: ``exact``, or the reason it was not taken."""

    engine: Engine
    tried: list[tuple[str, str]]


def choose_engine(tokenizer: Tokenizer, sample: Sequence[str], wanted: str = "auto") -> Chosen:
    """The first of ``ENGINES`` that encodes the probes and ``sample`` exactly, or the one ``wanted``.

    Raises ``UserError`` if the one wanted is unknown, not installed or not exact.
    """
    if wanted != "auto" and wanted not in ENGINES:
        raise UserError(f'unknown encoder "{wanted}": choose auto or one of {", ".join(ENGINES)}')
    texts = [*PROBES, *_probes_for(tokenizer), *sample]
    expected = tokenizer.encode_batch(texts)
    tried: list[tuple[str, str]] = []
    for short_name in ENGINES if wanted == "auto" else (wanted,):
        engine, outcome = _try(short_name, tokenizer, texts, expected)
        tried.append((engine.name if engine else short_name, outcome))
        if engine is not None and outcome == "exact":
            return Chosen(engine, tried)
    raise UserError(
        f'the encoder "{wanted}" cannot be used here: {tried[-1][1]}; choose auto to take the fastest that can'
    )


def make_engine(short_name: str, tokenizer: Tokenizer, threads: int = 1) -> Engine:
    """An engine that ``choose_engine`` has proven for this tokenizer, without proving it again.

    With one thread all work is done on the calling thread. With more, the engine takes as many as its library does:
    ``RAYON_NUM_THREADS``, or all cores. The ids are the same.
    """
    try:
        return ENGINES[short_name](tokenizer, threads)
    except UnsuitableError as problem:
        raise UserError(f'the encoder "{short_name}" cannot be used with this tokenizer: {problem}') from None


def recheck(engine: Engine, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Encode some texts again with ``tokenizers``. Raises ``EngineError`` at the first difference."""
    difference = _first_difference(engine, texts, tokenizer.encode_batch(texts))
    if difference:
        raise EngineError(
            f"the engine {engine.name} was exact before the build and is not for a text in it: {difference}; "
            "build again with --encoder tokenizers, and please report that text to the engine's makers"
        )


def _try(
    short_name: str, tokenizer: Tokenizer, texts: Sequence[str], expected: list[list[int]]
) -> tuple[Engine | None, str]:
    engine: Engine | None = None
    try:
        engine = ENGINES[short_name](tokenizer, 1)
        return engine, _first_difference(engine, texts, expected) or "exact"
    except UnsuitableError as problem:
        return engine, str(problem)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        lines = str(error).splitlines() or [type(error).__name__]
        return engine, f"it refuses: {lines[0]}"


def _first_difference(engine: Engine, texts: Sequence[str], expected: list[list[int]]) -> str | None:
    """Where an engine's ids first differ from the expected ones, in words; None if nowhere."""
    ids, lengths = engine.encode(texts)
    if len(lengths) != len(texts) or int(lengths.sum()) != len(ids):
        return f"{len(lengths)} lengths for {len(texts)} texts"
    for found, wanted, text in zip(np.split(ids, np.cumsum(lengths))[:-1], expected, texts, strict=True):
        if found.tolist() != wanted:
            pairs = enumerate(zip(found.tolist(), wanted, strict=False))
            place = next((n for n, (a, b) in pairs if a != b), min(len(found), len(wanted)))
            got, want = (str(row[place]) if place < len(row) else "the end" for row in (found.tolist(), wanted))
            return f"token {place} of {_excerpt(text)} is {got} and should be {want}"
    return None


def _excerpt(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{text[:40]!a}... ({len(text):,} characters)"


def _probes_for(tokenizer: Tokenizer) -> list[str]:
    """Texts that spell what this tokenizer looks for before anything else."""
    names = [token["content"] for token in tokenizer.description["added_tokens"]]
    return [text for name in names for text in (name, f"a {name} b{name}{name}\n{name[:-1]}")]


class TokenizersEngine:
    """The library that says what is right."""

    short_name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self.name = f"tokenizers {importlib.metadata.version('tokenizers')}"
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._threads = threads

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Engine.encode``."""
        encoded = _encode(self._tokenizer, texts, self._threads)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.fromiter((i for ids in encoded for i in ids), self._dtype, int(lengths.sum())), lengths


class WordsEngine:
    """Every distinct word is encoded once by ``tokenizers`` and then looked up.

    For tokenizers that cut texts as GPT-2 does, and those of single bytes or characters: they never look across the
    border of a run of ``RUNS``, so a text's tokens are its runs' tokens one after the other.
    """

    short_name = "words"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        if not splits_at_words(tokenizer):
            raise UnsuitableError("this tokenizer does not cut texts at GPT-2's words")
        self.name = f"words (tokenizers {importlib.metadata.version('tokenizers')})"
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._threads = threads
        self._known: dict[str, bytes] = {}
        self._known_characters = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Engine.encode``."""
        encoded = [self._encode_text(text) for text in texts]
        lengths = np.array([len(content) // self._dtype.itemsize for content in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), self._dtype), lengths

    def _encode_text(self, text: str) -> bytes:
        words = RUNS.findall(text)
        new = list(set(words).difference(self._known))
        ids_of_new = _encode(self._tokenizer, new, self._threads)
        self._known.update(zip(new, (np.array(ids, self._dtype).tobytes() for ids in ids_of_new), strict=True))
        content = b"".join([self._known[word] for word in words])
        self._known_characters += sum(map(len, new))
        if self._known_characters > LARGEST_CACHE_CHARACTERS:
            self._known.clear()
            self._known_characters = 0
        return content


class GigatokenEngine:
    """The package ``gigatoken``: byte-level BPE with the patterns it knows, and BPE of sentencepiece."""

    short_name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self.name = _installed("gigatoken", "gigatoken")
        import gigatoken

        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = gigatoken.Tokenizer.from_json(_json_without_special_tokens(tokenizer))
        self._threads = threads

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Engine.encode``."""
        if self._threads > 1:
            rows = self._tokenizer.encode_batch(list(texts), parallel=True).layout.to_ListOffsetArray64(True)
            offsets = np.asarray(rows.offsets.data)
            return np.asarray(rows.content.data)[: offsets[-1]].astype(self._dtype), np.diff(offsets)
        # A batch would load the package awkward, which costs as much as encoding 50 MB.
        encoded = [self._tokenizer.encode(text) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.concatenate([np.empty(0, np.uint32), *encoded]).astype(self._dtype), lengths


class SplintrEngine:
    """The package ``splintr-rs``."""

    short_name = "splintr"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self.name = _installed("splintr", "splintr-rs")
        import splintr

        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = splintr.from_json_bytes(_json_without_special_tokens(tokenizer).encode("utf-8"))
        self._threads = threads

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Engine.encode``."""
        if self._threads > 1:
            content, offsets = self._tokenizer.encode_batch_flat(list(texts))
            lengths = np.diff(np.frombuffer(offsets, "<u8")).astype(np.int64)
        else:  # a batch would take all cores, a single text does not
            rows = [self._tokenizer.encode_flat(text) for text in texts]
            content = b"".join(rows)
            lengths = np.array([len(row) // 4 for row in rows], dtype=np.int64)
        return np.frombuffer(content, "<u4").astype(self._dtype), lengths


# By speed, as measured (docs/data.md): the first that is exact is taken.
ENGINES: dict[str, Callable[[Tokenizer, int], Engine]] = {
    "gigatoken": GigatokenEngine,
    "splintr": SplintrEngine,
    "words": WordsEngine,
    "tokenizers": TokenizersEngine,
}


def splits_at_words(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text are the tokens of its ``RUNS`` one after the other."""
    description = tokenizer.description
    if description["normalizer"] is not None or not all(token["special"] for token in description["added_tokens"]):
        return False
    pre_tokenizer = description["pre_tokenizer"]
    if pre_tokenizer is None:
        return tokenizer.kind == "characters"
    # What comes after the first step of a sequence sees the first step's words only.
    first = pre_tokenizer["pretokenizers"][0] if pre_tokenizer["type"] == "Sequence" else pre_tokenizer
    if first["type"] != "ByteLevel" or first["add_prefix_space"]:
        return False
    return bool(first["use_regex"]) or (first is pre_tokenizer and tokenizer.kind == "bytes")


def _encode(tokenizer: Tokenizer, texts: Sequence[str], threads: int) -> list[list[int]]:
    return tokenizer.encode_batch(texts) if threads > 1 else [tokenizer.encode(text) for text in texts]


def _installed(module: str, package: str) -> str:
    """The package with its version. Raises ``UnsuitableError`` if it is not there."""
    if importlib.util.find_spec(module) is None:
        raise UnsuitableError(f'it is not installed ("pip install {package}")')
    return f"{package} {importlib.metadata.version(package)}"


def _json_without_special_tokens(tokenizer: Tokenizer) -> str:
    """The tokenizer for engines that would turn a text that spells a special token into that token."""
    ordinary = [token for token in tokenizer.description["added_tokens"] if not token["special"]]
    return json.dumps(tokenizer.description | {"added_tokens": ordinary}, ensure_ascii=False)
