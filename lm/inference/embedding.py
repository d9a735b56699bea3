"""Texts as vectors: hidden states of a frozen model, for search, similarity and probes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import atomic_file, output_ending
from lm.config.model_settings import ModelConfig
from lm.config.settings import VECTOR_FILES, Config, usual_pooling, usual_reading
from lm.data.packed_sequences import packed, pooled, sequence_of
from lm.inference.language_model import LanguageModel
from lm.inference.whitening import Whitening, fit_whitening

ROWS = 16  # per forward pass
TEXTS_AT_ONCE = 2048  # held in memory and packed together

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """How a text becomes a vector.

    ``reads`` is "causal" or "bidirectional", ``pooling`` "mean" or "last" (``packed_sequences``), ``layer`` as in
    ``LanguageModel.hidden_states``. Vectors are whitened if there is a ``whitening``, and then scaled to length 1 if
    ``normalize`` is set.
    """

    reads: str
    pooling: str
    layer: int = -1
    normalize: bool = False
    whitening: Whitening | None = None


def reading_of(
    config: Config, reads: str | None = None, pooling: str | None = None, layer: int = -1, *, normalize: bool = False
) -> Reading:
    """Return the reading with what was given; the default is that of fine-tuning, else the objective's usual one.

    Raise UserError if the model has no such layer.
    """
    tuned = config.finetune
    reads = reads or (usual_reading(config) if tuned.reads == "auto" else tuned.reads)
    pooling = pooling or (usual_pooling(reads) if tuned.pooling == "auto" else tuned.pooling)
    require_layer(config.model, layer)
    return Reading(reads, pooling, layer, normalize)


def require_layer(config: ModelConfig, layer: int) -> None:
    """Raise UserError if a model has no such layer."""
    if not -1 <= layer <= config.num_layers:
        raise UserError(f"there is no layer {layer}: the model has 0 (the embeddings) to {config.num_layers}")


def scaled(vectors: Vectors) -> Vectors:
    """Vectors (n, width) scaled to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def vectors_of(
    model: LanguageModel, texts: Iterable[tuple[str, ...]], reading: Reading
) -> Iterator[tuple[Vectors, int]]:
    """Embed any number of texts, or pairs of texts, in order, part by part.

    Yield vectors, float32 (texts of the part, hidden), and how many of these texts were cut to the context length.
    """
    rest = iter(texts)
    while some := list(islice(rest, TEXTS_AT_ONCE)):
        yield _vectors(model, some, reading)


def whitened(reading: Reading, model: LanguageModel, texts: Iterable[tuple[str, ...]]) -> Reading:
    """``reading`` with the whitening of the vectors of ``texts``; raises as ``fit_whitening``."""
    plain = replace(reading, normalize=False)
    return replace(reading, whitening=fit_whitening(vectors for vectors, _ in vectors_of(model, texts, plain)))


def all_vectors(model: LanguageModel, texts: Iterable[tuple[str, ...]], reading: Reading) -> tuple[Vectors, int]:
    """Return all of ``vectors_of`` at once: float32 (texts, hidden), and how many texts were cut."""
    parts = list(vectors_of(model, texts, reading))
    empty = np.zeros((0, model.model.config.hidden_size), dtype=np.float32)
    return np.concatenate([empty, *(vectors for vectors, _ in parts)]), sum(cut for _, cut in parts)


@torch.no_grad()
def _vectors(model: LanguageModel, texts: list[tuple[str, ...]], reading: Reading) -> tuple[Vectors, int]:
    begin, end_of_text, context_length = model.tokenizer.begin_id, model.tokenizer.end_of_text_id, model.context_length
    encoded = iter(model.tokenizer.encode_batch([part for text in texts for part in text]))
    found = [sequence_of([next(encoded) for _ in text], begin, end_of_text, context_length) for text in texts]
    vectors = np.empty((len(texts), model.model.config.hidden_size), dtype=np.float32)
    for some in packed([tokens for tokens, _ in found], reading.reads, end_of_text, context_length, ROWS):
        hidden = model.hidden_states(some.batch, reading.layer)
        vectors[some.numbers] = pooled(hidden, some, reading.pooling).float().cpu().numpy()
    if reading.whitening:
        vectors = reading.whitening(vectors)
    return scaled(vectors) if reading.normalize else vectors, sum(cut for _, cut in found)


def write_vectors(path: Path, parts: Iterable[Vectors], width: int) -> int:
    """Write vectors as they come and return their number: .npy (float32), or .jsonl with {"embedding": […]} per line.

    The file appears once it is complete. Raise UserError if its name has another ending.
    """
    is_array, written = output_ending(path, VECTOR_FILES) == ".npy", 0
    with atomic_file(path) as file:
        if is_array:
            _write_header(file, 0, width)
        for vectors in parts:
            written += len(vectors)
            if is_array:
                file.write(np.ascontiguousarray(vectors).tobytes())
            else:
                write_lines(file, vectors)
        if is_array:
            file.seek(0)
            _write_header(file, written, width)  # the same size as before: NumPy pads the header for a growing number
    return written


def write_lines(file: IO[bytes], vectors: Vectors, names: Sequence[str] = ()) -> None:
    """Write vectors as JSON lines, with enough digits to restore each float32 exactly, and the names of images."""
    for number, vector in enumerate(vectors):
        line: dict[str, Any] = {"image": names[number]} if names else {}
        line["embedding"] = [float(str(each)) for each in vector]
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)
