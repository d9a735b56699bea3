"""Use tokenizers. Each one is a plain ``tokenizer.json`` that other programs can read as well.

Text never becomes a special token, even if it spells one. ``data_prep.tokenizers.training`` trains new tokenizers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import secrets
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.files import parse_json, write_atomically
from data_prep.settings import END_OF_TEXT, MASK, PADDING, TOKEN_SETS
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.special_tokens import SpecialTokens, recorded
from data_prep.tokenizers.spelled_names import ids_or_none, keep_spelled_names, unknown_id

# How existing tokenizers spell the three special tokens; the first one present is used.
END_OF_TEXT_SPELLINGS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
PADDING_SPELLINGS = (PADDING, "[PAD]", "<pad>")
MASK_SPELLINGS = (MASK, "[MASK]", "<mask>")
# Of the tokens that introduce the prefix, the suffix and the middle of a text whose middle is to be written.
INFILL_SPELLINGS = (TOKEN_SETS["infill"], ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))

# The visible characters that stand for the bytes 0 to 255 in byte-level tokenizers.
BYTE_CHARACTERS = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


# Printable Latin-1 stands for itself; the characters from U+0100 on stand for the other bytes, in order.
_OTHERS = [byte for byte in range(256) if chr(byte) not in BYTE_CHARACTERS]
BYTE_OF_CHARACTER = {c: ord(c) if ord(c) < 256 else _OTHERS[ord(c) - 256] for c in BYTE_CHARACTERS}


class Tokenizer:
    """Convert text to token ids and back.

    Attributes:
        end_of_text_id: what ends a document.
        begin_id: what begins a text; None if nothing does. It is the end of text, unless a checkpoint was imported.
        end_ids: the tokens that end a generated text.
        padding_id: what fills up a batch; an imported checkpoint may use its end of text.
        unwritable_ids: tokens that are never generated.
        special: all of these, as one value.
        is_imported: whether they are those of an imported checkpoint, recorded in its ``tokenizer.json``.
        vocab_size: the largest id plus one.
        kind: ``bpe``, ``wordpiece``, ``unigram``, ``bytes`` or ``characters``, or the lowercase name of any other
            model type.
    """

    file_name = "tokenizer.json"  # in a run or a dataset

    def __init__(self, backend: Backend) -> None:
        # Text must not be able to produce a special token: "<|mask|>" in a document remains eight characters.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        imported = recorded(backend)
        self.is_imported = imported is not None
        self.special = imported or _found_or_added(backend)
        self.end_of_text_id, self.padding_id = self.special.end_of_text, self.special.padding
        self.begin_id, self.end_ids = self.special.begin, self.special.ends
        self.unwritable_ids = self.special.unwritable
        needed = {self.end_of_text_id, self.padding_id, self.special.mask}
        self._file_text = keep_spelled_names(backend, needed)  # after all special tokens are known
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_json(cls, text: str, *, name: str = "tokenizer.json") -> Tokenizer:
        """Make a tokenizer from the text of a ``tokenizer.json``; ``name`` identifies it in error messages."""
        try:
            backend = Backend.from_str(_with_short_scores(text))
        except Exception as error:  # the library raises the base class for everything
            raise UserError(f'"{name}" is not a readable tokenizer.json: {error}') from None
        if backend.get_vocab_size() == 0:
            raise UserError(f'"{name}" is a tokenizer without tokens')
        try:
            return cls(backend)
        except UserError as problem:
            raise UserError(f'the tokenizer "{name}" cannot be used: {problem}') from None

    def to_json(self) -> str:
        """Return the whole tokenizer as JSON text; equal tokenizers give equal text."""
        return (self._file_text or str(self._backend.to_str(pretty=True))) + "\n"

    @property
    def cuts_names(self) -> bool:
        """Whether names of special tokens are cut here, because the file alone would take them for the tokens."""
        return self._file_text is not None

    def description_in_use(self) -> dict[str, Any]:
        """Return ``description`` with the step that cuts names."""
        description: dict[str, Any] = json.loads(self._backend.to_str())
        return description

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``."""
        write_atomically(Path(path), self.to_json())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of ``to_json()``, and so of the saved file."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """``to_json()`` as Python objects; do not modify."""
        description: dict[str, Any] = json.loads(self.to_json())
        return description

    @cached_property
    def kind(self) -> str:
        model = self.description["model"]
        if model["type"] != "BPE" or model["merges"]:
            return str(model["type"]).lower()
        return "characters" if model["byte_fallback"] else "bytes"

    @property
    def mask_id(self) -> int:
        """What hides a token. Raises ``UserError`` if the tokenizer has no such token."""
        if self.special.mask is None:
            raise UserError(
                "this tokenizer has no mask token: train with --objective next_token, or import the checkpoint again "
                "with --add-mask"
            )
        return self.special.mask

    @cached_property
    def infill_ids(self) -> tuple[int, int, int] | None:
        """What introduces the prefix, the suffix and the middle of a text to infill; None without such tokens."""
        for names in INFILL_SPELLINGS:
            if set(names) <= self.special_tokens.keys():
                prefix, suffix, middle = (self.special_tokens[name] for name in names)
                return prefix, suffix, middle
        return None

    def begun(self, ids: Iterable[int]) -> list[int]:
        """Return the ids of a text after what begins it, or an end of text if there would be no ids.

        An imported tokenizer's own beginning is not added twice: a chat template may have written it.
        """
        text = list(ids)
        written = text[:1] == [self.begin_id] != [self.end_of_text_id]
        start = [] if self.begin_id is None or written else [self.begin_id]
        return [*start, *text] or [self.end_of_text_id]

    @property
    def start_id(self) -> int:
        """What stands before a text whose first token is predicted: its beginning, else the end of another text."""
        return self.end_of_text_id if self.begin_id is None else self.begin_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without adding special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, on all cores unless ``TOKENIZERS_PARALLELISM`` is ``false``."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_shielded(self, text: str, shielded: str, cuts: Sequence[int] = ()) -> list[list[int]]:
        """Return the ids of a text before, between and after the cuts; no token spans a cut.

        Args:
            text: as for ``encode``, but with special tokens where it spells them outside of what is shielded.
            shielded: the text, with other characters in the places that must not be part of a special token.
            cuts: positions in the text, in characters, ascending.
        """
        special = set(self._special_names)

        def found_in(spelled: str) -> list[tuple[int, int, int]]:
            encoded = splitter.encode(spelled, add_special_tokens=False)
            pairs = zip(encoded.offsets, encoded.ids, strict=True)
            return [(*offsets, token_id) for offsets, token_id in pairs if token_id in special]

        splitter, boundary, lock = self._splitter
        with lock:
            splitter.encode_special_tokens = False
            written = [
                (start, stop, token_id)
                for start, stop, token_id in found_in(shielded)
                if shielded[start:stop].strip() == self._special_names[token_id].strip()
            ]
            if found_in(text) == written:
                whole = splitter.encode(text, add_special_tokens=False).ids
                starts = [splitter.encode(text[:cut], add_special_tokens=False).ids for cut in cuts]
                if all(whole[: len(start)] == start for start in starts):
                    lengths = [0, *map(len, starts), len(whole)]
                    return [whole[a:b] for a, b in itertools.pairwise(lengths)]
            splitter.encode_special_tokens = True
            # A token that is in no text stands for each special token and each cut, so that what is between two of
            # them is encoded as the middle of a text.
            # A cut inside a special token, or the space that belongs to it, moves to its end.
            after = {at: stop for start, stop, _ in written for at in range(start + 1, stop)}
            moved = [after.get(cut, cut) for cut in cuts]
            marks = sorted([*written, *((cut, cut, -1) for cut in moved)])
            between = itertools.pairwise([0, *(at for mark in marks for at in mark[:2]), len(text)])
            joined = boundary.join(text[start:stop] for start, stop in itertools.islice(between, 0, None, 2))
            ids = splitter.encode(joined, add_special_tokens=False).ids
        pieces: list[list[int]] = [[]]
        left = iter(marks)
        for token_id in ids:
            if token_id != splitter.token_to_id(boundary):
                pieces[-1].append(token_id)
            elif (mark := next(left)[2]) >= 0:
                pieces[-1].append(mark)
            else:
                pieces.append([])
        return pieces

    @cached_property
    def _splitter(self) -> tuple[Backend, str, threading.Lock]:
        """A copy with one more token, an unguessable one, and a lock to hold while using the copy."""
        boundary = f"\ufdd0{secrets.token_hex(16)}\ufdd0"
        splitter = Backend.from_str(self._backend.to_str())
        splitter.add_tokens([AddedToken(boundary, special=False, normalized=False)])
        return splitter, boundary, threading.Lock()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids, with special tokens as their names and invalid UTF-8 as U+FFFD."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of some ids without special tokens, exact even if a character is split.

        This holds for byte-level and byte-fallback tokenizers, which includes all trained here; others return the UTF-8
        of their decoded text.
        """
        wanted = [int(i) for i in ids]
        if self._token_bytes is not None:
            return b"".join(self._token_bytes[i] for i in wanted)
        return str(self._backend.decode(wanted, skip_special_tokens=True)).encode("utf-8")

    @property
    def has_bytes(self) -> bool:
        """Whether each token stands for fixed bytes, so that ``decode_bytes`` is exact token by token."""
        return self._token_bytes is not None

    def token_text(self, token_id: int) -> str:
        """Return one token as printable text, with control characters and incomplete bytes escaped."""
        if token_id in self._special_names:
            return self._special_names[token_id]
        text = self.decode_bytes([token_id]).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

    def piece(self, token_id: int) -> str:
        """Return one token as the file spells it; "" if there is none with this id."""
        return str(self._backend.id_to_token(token_id) or "")

    @cached_property
    def words_have_spaces(self) -> bool:
        """Whether there are tokens of a space and the letters after it, in any script."""
        return any(re.match(r" \w", self.token_text(token)) for token in range(self.vocab_size))

    @cached_property
    def is_lossless(self) -> bool:
        """Whether decoding restores all ``PROBES``, as with every tokenizer trained here."""
        return all(self.decode_bytes(ids_or_none(self.encode, text)) == text.encode("utf-8") for text in PROBES)

    @cached_property
    def unknown_id(self) -> int | None:
        """The id for text outside the vocabulary, or None; tokenizers trained here never need one."""
        return unknown_id(self._backend)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids, sorted by id."""
        return {name: token_id for token_id, name in sorted(self._special_names.items())}

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """``bos_token``, ``eos_token``, ``pad_token`` and ``mask_token`` of ``transformers``, those that exist."""
        special = self.special
        ids = {"bos": special.bos, "eos": special.end_of_text, "pad": special.padding, "mask": special.mask}
        return {f"{name}_token": self._special_names[i] for name, i in ids.items() if i is not None}

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {i: token.content for i, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of every id, or None if the tokens do not stand for fixed bytes."""
        decoder = self.description["decoder"]
        kinds = {part["type"] for part in decoder.get("decoders", [decoder])} if decoder else set()
        prefix = _prefix_that_decoding_drops(self.description) if kinds == {"Replace", "ByteLevel"} else ""
        byte_level = kinds == {"ByteLevel"} or bool(prefix)
        if not byte_level and kinds != {"ByteFallback", "Fuse"}:
            return None
        added = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        table = []
        for token_id in range(self.vocab_size):
            token = self.piece(token_id)
            if token_id in self._special_names:
                table.append(b"")
            elif token_id in added:
                table.append(added[token_id].encode("utf-8"))
            elif byte_level:
                table.append(_bytes_of_byte_characters(token.removeprefix(prefix)))
            else:
                byte = BYTE_TOKEN.fullmatch(token)
                table.append(bytes([int(byte[1], 16)]) if byte else token.encode("utf-8"))
        return table


def _with_short_scores(text: str) -> str:
    """Round a Unigram model's scores to nine decimals.

    The library reads longer numbers with an error in the last bit, so the text would change with every save and load.
    """
    if '"Unigram"' not in text:
        return text
    description = parse_json(text)
    if description["model"].get("type") != "Unigram":
        return text
    description["model"]["vocab"] = [[token, round(score, 9)] for token, score in description["model"]["vocab"]]
    return json.dumps(description, ensure_ascii=False)


def _prefix_that_decoding_drops(description: dict[str, Any]) -> str:
    """Return the prefix of word-internal WordPiece tokens if the decoder replaces only that, else ""."""
    prefix = str(description["model"].get("continuing_subword_prefix") or "")
    replacements = [part for part in description["decoder"].get("decoders", []) if part["type"] == "Replace"]
    dropped = [{"type": "Replace", "pattern": {"String": prefix}, "content": ""}]
    return prefix if prefix and replacements == dropped else ""


def _bytes_of_byte_characters(token: str) -> bytes:
    """Return the bytes of a byte-level token; as in the library, a token with other characters is its own text."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _found_or_added(backend: Backend) -> SpecialTokens:
    """The three special tokens that training needs, added where they are missing."""
    end = find_or_add(backend, END_OF_TEXT_SPELLINGS)
    padding = find_or_add(backend, PADDING_SPELLINGS)
    mask = find_or_add(backend, MASK_SPELLINGS)
    return SpecialTokens(end, end, end, (end,), padding, mask, unwritable=(padding, mask))


def find_or_add(backend: Backend, spellings: Sequence[str]) -> int:
    """Return the id of the first spelling in the vocabulary, marked as special; if none is there, add the first."""
    name = next((spelling for spelling in spellings if backend.token_to_id(spelling) is not None), spellings[0])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    token_id = backend.token_to_id(name)
    assert token_id is not None
    return token_id


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that stores tokens of this vocabulary: ``uint16``, or ``int32`` above 65,536 tokens."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")
