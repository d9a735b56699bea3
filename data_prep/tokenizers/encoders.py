"""Choose the fastest installed encoder that is exact for a tokenizer, and prove it before use.

The ``tokenizers`` library is the reference. Other libraries encode ten to forty times faster, but each is wrong for
some tokenizers, usually silently. ``choose_encoder`` therefore lets each one encode ``PROBES`` and some of the corpus,
and takes the first whose ids all equal those of ``tokenizers``; ``recheck`` repeats the comparison during the build. No
encoder knows special tokens: a text that spells one remains text.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from data_prep.errors import UserError
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.spelled_names import texts_with
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype
from data_prep.tokenizers.training import PATTERNS

# Unicode's White_Space, which is \s in the library's pattern. Python's \s has four more characters.
OTHER_SPACE = r"\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # than \r and \n
SPACE = rf"\r\n{OTHER_SPACE}"

# GPT-2's pattern with all kinds of words merged into one: no match of the full pattern crosses a match of this one.
RUNS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")

# Where a text can be cut without cutting a word of llama.cpp's patterns: inside a word, a line break follows only
# punctuation or space, and any other space follows only space.
ENDS_OF_RUNS = re.compile(rf"(?<=[^{SPACE}])(?=[{OTHER_SPACE}])|(?<=[0-9A-Za-z])(?=[\r\n])")

LARGEST_CACHE_CHARACTERS = 1 << 23  # about 100 MB including the dictionary


class EncoderError(UserError):
    """A fast encoder failed, or gave other ids than ``tokenizers``."""


class UnsuitableError(Exception):
    """This encoder does not support this tokenizer; the message says why."""


class Encoder(ABC):
    """Encodes texts with one tokenizer.

    Attributes:
        short_name: one of ``ENCODERS``.
        name: the library with its version, as in the manifest.
    """

    short_name: str
    name: str

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._threads = threads

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts and the number of ids per text (int64).

        The ids have the dtype of shards and no end-of-text tokens.
        """

    def _reference(self, texts: Sequence[str]) -> list[list[int]]:
        if self._threads > 1:
            return self._tokenizer.encode_batch(texts)
        return [self._tokenizer.encode(text) for text in texts]


@dataclass(frozen=True)
class Chosen:
    """A proven encoder, and the outcome for each one tried: ``exact``, or why it was rejected."""

    encoder: Encoder
    tried: list[tuple[str, str]]


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str], wanted: str = "auto") -> Chosen:
    """Return the first of ``ENCODERS`` that encodes the probes and ``sample`` exactly, or the ``wanted`` one.

    Raises ``UserError`` if the wanted encoder is unknown, not installed or not exact.
    """
    if wanted != "auto" and wanted not in ENCODERS:
        raise UserError(f'unknown encoder "{wanted}": choose auto or one of {", ".join(ENCODERS)}')
    texts = [*PROBES, *_probes_for(tokenizer), *sample]
    expected = tokenizer.encode_batch(texts)
    tried: list[tuple[str, str]] = []
    for short_name in ENCODERS if wanted == "auto" else (wanted,):
        encoder, outcome = _try(short_name, tokenizer, texts, expected)
        tried.append((encoder.name if encoder else short_name, outcome))
        if encoder is not None and outcome == "exact":
            return Chosen(encoder, tried)
    raise UserError(
        f'the encoder "{wanted}" cannot be used here: {tried[-1][1]}; choose auto to use the fastest one that can'
    )


def make_encoder(short_name: str, tokenizer: Tokenizer, threads: int = 1) -> Encoder:
    """Make an encoder that ``choose_encoder`` has already proven for this tokenizer.

    With one thread, all work happens on the calling thread. With more, the library decides how many to use:
    ``RAYON_NUM_THREADS``, or all cores. The ids are the same.
    """
    try:
        return ENCODERS[short_name](tokenizer, threads)
    except UnsuitableError as problem:
        raise UserError(f'the encoder "{short_name}" cannot be used with this tokenizer: {problem}') from None


def recheck(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Encode some texts again with ``tokenizers``, and raise ``EncoderError`` at the first difference."""
    difference = _first_difference(encoder, texts, tokenizer.encode_batch(texts))
    if difference:
        raise EncoderError(
            f"the encoder {encoder.name} passed all checks before the build but fails for a text: {difference}; "
            "build again with --encoder tokenizers, and please report that text to the developers of the encoder"
        )


def _try(
    short_name: str, tokenizer: Tokenizer, texts: Sequence[str], expected: list[list[int]]
) -> tuple[Encoder | None, str]:
    encoder: Encoder | None = None
    try:
        encoder = ENCODERS[short_name](tokenizer, 1)
        return encoder, _first_difference(encoder, texts, expected) or "exact"
    except UnsuitableError as problem:
        return encoder, str(problem)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        lines = str(error).splitlines() or [type(error).__name__]
        return encoder, f"it refuses: {lines[0]}"


def _first_difference(encoder: Encoder, texts: Sequence[str], expected: list[list[int]]) -> str | None:
    """Describe where an encoder's ids first differ from the expected ones, or return None."""
    ids, lengths = encoder.encode(texts)
    if len(lengths) != len(texts) or int(lengths.sum()) != len(ids):
        return f"{len(lengths)} lengths for {len(texts)} texts"
    for found, wanted, text in zip(np.split(ids, np.cumsum(lengths))[:-1], expected, texts, strict=True):
        if found.tolist() != wanted:
            pairs = enumerate(zip(found.tolist(), wanted, strict=False))
            index = next((n for n, (a, b) in pairs if a != b), min(len(found), len(wanted)))
            got, want = (str(row[index]) if index < len(row) else "the end" for row in (found.tolist(), wanted))
            return f"token {index} of {_excerpt(text)} is {got} and should be {want}"
    return None


def _excerpt(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{text[:40]!a}... ({len(text):,} characters)"


def _probes_for(tokenizer: Tokenizer) -> list[str]:
    """Return texts that contain the tokens this tokenizer searches for first."""
    return [text for token in tokenizer.description["added_tokens"] for text in texts_with(token["content"])]


class TokenizersEncoder(Encoder):
    """The reference library."""

    short_name = "tokenizers"
    name = f"tokenizers {version('tokenizers')}"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._reference(texts)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.fromiter((i for ids in encoded for i in ids), self._dtype, int(lengths.sum())), lengths


class WordsEncoder(Encoder):
    """Encode every distinct word once with ``tokenizers``, then look it up.

    This works for tokenizers that split texts like GPT-2 or by a pattern of llama.cpp, and for single bytes or
    characters: no token crosses the boundary of a run, so the tokens of a text are the concatenated tokens of its runs.
    """

    short_name = "words"
    name = f"words (tokenizers {version('tokenizers')})"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        runs = runs_of(tokenizer)
        if runs is None:
            raise UnsuitableError("this tokenizer does not cut texts at the words of a known pattern")
        super().__init__(tokenizer, threads)
        self._runs = runs
        self._known: dict[str, bytes] = {}
        self._known_characters = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [self._encode_text(text) for text in texts]
        lengths = np.array([len(content) // self._dtype.itemsize for content in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), self._dtype), lengths

    def _encode_text(self, text: str) -> bytes:
        words = self._runs(text)
        new = list(set(words).difference(self._known))
        ids_of_new = self._reference(new)
        self._known.update(zip(new, (np.array(ids, self._dtype).tobytes() for ids in ids_of_new), strict=True))
        content = b"".join([self._known[word] for word in words])
        self._known_characters += sum(map(len, new))
        if self._known_characters > LARGEST_CACHE_CHARACTERS:
            self._known.clear()
            self._known_characters = 0
        return content


class GigatokenEncoder(Encoder):
    """The package ``gigatoken``: byte-level BPE with known patterns, and sentencepiece BPE."""

    short_name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        super().__init__(tokenizer, threads)
        self.name = _installed("gigatoken", "gigatoken")
        import gigatoken

        self._fast = gigatoken.Tokenizer.from_json(_json_without_special_tokens(tokenizer))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._threads > 1:
            rows = self._fast.encode_batch(list(texts), parallel=True).layout.to_ListOffsetArray64(True)
            offsets = np.asarray(rows.offsets.data)
            return np.asarray(rows.content.data)[: offsets[-1]].astype(self._dtype), np.diff(offsets)
        # A batch would import the package awkward, which costs as much as encoding 50 MB.
        encoded = [self._fast.encode(text) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.concatenate([np.empty(0, np.uint32), *encoded]).astype(self._dtype), lengths


class SplintrEncoder(Encoder):
    """The package ``splintr-rs``."""

    short_name = "splintr"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        super().__init__(tokenizer, threads)
        self.name = _installed("splintr", "splintr-rs")
        import splintr

        self._fast = splintr.from_json_bytes(_json_without_special_tokens(tokenizer).encode("utf-8"))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._threads > 1:
            content, offsets = self._fast.encode_batch_flat(list(texts))
            lengths = np.diff(np.frombuffer(offsets, "<u8")).astype(np.int64)
        else:  # a batch would use all cores, a single text does not
            rows = [self._fast.encode_flat(text) for text in texts]
            content = b"".join(rows)
            lengths = np.array([len(row) // 4 for row in rows], dtype=np.int64)
        return np.frombuffer(content, "<u4").astype(self._dtype), lengths


# By measured speed (docs/data.md): the first exact one is used.
ENCODERS = {kind.short_name: kind for kind in (GigatokenEncoder, SplintrEncoder, WordsEncoder, TokenizersEncoder)}


def runs_of(tokenizer: Tokenizer) -> Callable[[str], list[str]] | None:
    """Return what cuts a text into runs whose concatenated tokens are those of the text; None if nothing known does."""
    description = tokenizer.description
    if description["normalizer"] is not None or not all(token["special"] for token in description["added_tokens"]):
        return None
    pre_tokenizer = description["pre_tokenizer"]
    if pre_tokenizer is None:
        return RUNS.findall if tokenizer.kind == "characters" else None
    # Later steps of a sequence only see the words of the first step.
    first = pre_tokenizer["pretokenizers"][0] if pre_tokenizer["type"] == "Sequence" else pre_tokenizer
    if first["type"] == "Split":
        known = first["pattern"].get("Regex") in PATTERNS.values()
        return ENDS_OF_RUNS.split if known and first["behavior"] == "Isolated" and not first["invert"] else None
    if first["type"] != "ByteLevel" or first["add_prefix_space"]:
        return None
    return RUNS.findall if first["use_regex"] or (first is pre_tokenizer and tokenizer.kind == "bytes") else None


def _installed(module: str, package: str) -> str:
    """Return a package with its version. Raises ``UnsuitableError`` if it is not installed."""
    if find_spec(module) is None:
        raise UnsuitableError(f'it is not installed ("pip install {package}")')
    return f"{package} {version(package)}"


def _json_without_special_tokens(tokenizer: Tokenizer) -> str:
    """Return the tokenizer for encoders that would otherwise turn the name of a special token into that token."""
    description = tokenizer.description_in_use()
    ordinary = [token for token in description["added_tokens"] if not token["special"]]
    return json.dumps(description | {"added_tokens": ordinary}, ensure_ascii=False)
