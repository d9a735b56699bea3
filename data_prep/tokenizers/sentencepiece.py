"""Convert a sentencepiece ``.model`` to a ``tokenizer.json`` with the same ids.

The file is a protocol-buffer message (sentencepiece_model.proto): the pieces with their scores and types, the training
settings, and the normalization. The result must encode all probes as sentencepiece does, or the model is rejected. BPE
models that do not normalize text pass (Llama 2, Mistral, Gemma); most with an NFKC table are rejected, because
``tokenizers`` applies such a table cluster by cluster and sentencepiece does not.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.tokenizer import Tokenizer

SPACE_MARK = "\u2581"  # how sentencepiece writes a space

# Field and type numbers in the message definition.
PIECES, TRAINING, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, SPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35
CHARACTER_MAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM, BPE = 1, 2

COSTLIER = 1000.0


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Model:
    """The parts of a ``.model`` that matter here."""

    pieces: list[Piece]
    training: dict[int, int | bytes]
    normalizer: dict[int, int | bytes]

    @property
    def byte_fallback(self) -> bool:
        """Whether characters without a piece become bytes."""
        return bool(self.training.get(BYTE_FALLBACK, 0))

    def number_of(self, piece_type: int) -> int | None:
        """Return the id of the first piece of a type, or None."""
        return next((number for number, piece in enumerate(self.pieces) if piece.type == piece_type), None)


def convert_model(path: Path) -> str:
    """Return the text of a ``tokenizer.json`` equivalent to the model in ``path``.

    Raises ``UserError`` if the file is not such a model, or if no ``tokenizer.json`` gives the same ids.
    """
    content = path.read_bytes()
    try:
        model = _read(content)
    except (ValueError, IndexError, UnicodeDecodeError, struct.error):
        raise UserError(f'"{path}" is not a sentencepiece model') from None
    problem = _unsupported(model)
    if problem is None:
        text = json.dumps(_description(model), ensure_ascii=False)
        problem = _difference(model, content, text)
    if problem is not None:
        raise UserError(
            f'"{path}" cannot be converted to an equivalent tokenizer.json: {problem}; give a tokenizer.json instead'
        )
    return text


def _read(content: bytes) -> Model:
    fields = list(_fields(content))
    pieces = [dict(_fields(_as_bytes(value))) for number, value in fields if number == PIECES]
    if not pieces:
        raise ValueError("no pieces")
    sections = {number: dict(_fields(_as_bytes(value))) for number, value in fields if number in (TRAINING, NORMALIZER)}
    return Model([_piece(piece) for piece in pieces], sections.get(TRAINING, {}), sections.get(NORMALIZER, {}))


def _piece(fields: dict[int, int | bytes]) -> Piece:
    text = _as_bytes(fields.get(PIECE_TEXT, b"")).decode("utf-8")
    (score,) = struct.unpack("<f", _as_bytes(fields.get(PIECE_SCORE, bytes(4))))
    return Piece(text, score, int(fields.get(PIECE_TYPE, NORMAL)))


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number instead of text")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protocol-buffer message with their numbers; integers as int, everything else as bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + size > len(message):
            raise ValueError("the file ends inside a field")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return an integer stored in seven-bit groups, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _unsupported(model: Model) -> str | None:
    if model.training.get(MODEL_TYPE, UNIGRAM) not in (UNIGRAM, BPE):
        return "only Unigram and BPE models are supported"
    if model.training.get(SPACE_AS_SUFFIX, 0) or not model.normalizer.get(ESCAPE_SPACES, 1):
        return "it marks spaces in an unusual way"
    return None


def _description(model: Model) -> dict[str, Any]:
    fixed = [(n, piece) for n, piece in enumerate(model.pieces) if piece.type in (CONTROL, USER_DEFINED)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": piece.text, **flags, "special": piece.type == CONTROL} for number, piece in fixed
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _bpe(model) if model.training.get(MODEL_TYPE) == BPE else _unigram(model),
    }


def _normalizers(model: Model) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    character_map = _as_bytes(model.normalizer.get(CHARACTER_MAP, b""))
    if character_map:
        encoded = base64.b64encode(character_map).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.normalizer.get(REMOVE_EXTRA_SPACES, 1):
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.normalizer.get(ADD_DUMMY_PREFIX, 1):
        steps.append({"type": "Prepend", "prepend": SPACE_MARK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    return steps


def _decoders(model: Model) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.normalizer.get(ADD_DUMMY_PREFIX, 1):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _unigram(model: Model) -> dict[str, Any]:
    # In tokenizers, any entry can match text that spells it, so entries that sentencepiece never matches must cost more
    # than any other segmentation.
    lowest = min((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0) - COSTLIER
    return {
        "type": "Unigram",
        "unk_id": model.number_of(UNKNOWN),
        "vocab": [
            [piece.text, piece.score if piece.type in (NORMAL, USER_DEFINED) else lowest] for piece in model.pieces
        ],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: Model) -> dict[str, Any]:
    unknown = model.number_of(UNKNOWN)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else model.pieces[unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _merges(model: Model) -> list[list[str]]:
    """Return every way to form a piece from two others. Sentencepiece merges the pair that forms the best piece."""
    ordinary = {piece.text for piece in model.pieces if piece.type == NORMAL}
    by_score = sorted((piece for piece in model.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    return [
        [piece.text[:cut], piece.text[cut:]]
        for piece in by_score
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in ordinary and piece.text[cut:] in ordinary
    ]


def _difference(model: Model, content: bytes, description: str) -> str | None:
    """Describe the first text that sentencepiece and the new tokenizer encode differently, or return None."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = Tokenizer.from_json(description)
    fixed = [piece.text for piece in model.pieces if piece.type in (CONTROL, USER_DEFINED)]
    texts = [*PROBES, *(f"a {left} b{right}{left} c" for left, right in pairwise([*fixed, "x"]))]
    for text in texts:
        if processor.encode(text) != tokenizer.encode(text):
            return f"{text[:40]!a} is encoded differently"
    return None
