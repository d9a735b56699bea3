"""Texts as vectors: the hidden states of a frozen model, for probes, for search, and for whoever wants embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import atomic_file
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config, usual_pooling, usual_reading
from lm.data.batch import Batch
from lm.data.packed_sequences import packed, pooled, sequence_of
from lm.model.transformer import Transformer

ROWS = 16  # of one forward pass
TEXTS_AT_ONCE = 2048  # are held, and packed among themselves

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """How a text becomes a vector.

    ``reads`` is "causal" or "bidirectional", ``pooling`` "mean" or "last" (``packed_sequences``). ``layer`` counts from
    0, the embeddings, to the number of blocks; -1 is the last, whose states are normalised as the head sees them.
    ``normalize`` scales vectors to length 1.
    """

    reads: str
    pooling: str
    layer: int = -1
    normalize: bool = False


def reading_of(
    config: Config, reads: str | None = None, pooling: str | None = None, layer: int = -1, *, normalize: bool = False
) -> Reading:
    """What was asked for; where nothing was, what a run was fine-tuned with, else what is usual for its objective."""
    tuned = config.finetune
    reads = reads or (usual_reading(config) if tuned.reads == "auto" else tuned.reads)
    pooling = pooling or (usual_pooling(reads) if tuned.pooling == "auto" else tuned.pooling)
    return Reading(reads, pooling, layer, normalize)


def vectors_of(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Iterable[tuple[str, ...]],
    reading: Reading,
    context_length: int,
) -> Iterator[tuple[Vectors, int]]:
    """The vectors of texts, or pairs of texts, in their order, some at a time, whatever their number.

    Yields:
        Vectors, float32 (some texts, hidden), and how many of these texts were cut to ``context_length`` tokens.

    Raises:
        UserError: the model has no such layer.
    """
    blocks = len(model.blocks)
    if not -1 <= reading.layer <= blocks:
        raise UserError(f"there is no layer {reading.layer}: the model has 0 (the embeddings) to {blocks}")
    rest = iter(texts)
    while some := list(islice(rest, TEXTS_AT_ONCE)):
        yield _vectors(model, tokenizer, some, reading, context_length)


def all_vectors(
    model: Transformer, tokenizer: Tokenizer, texts: Iterable[tuple[str, ...]], reading: Reading, context_length: int
) -> tuple[Vectors, int]:
    """``vectors_of`` at once: float32 (texts, hidden), and how many were cut."""
    parts = list(vectors_of(model, tokenizer, texts, reading, context_length))
    empty = np.zeros((0, model.config.hidden_size), dtype=np.float32)
    return np.concatenate([empty, *(vectors for vectors, _ in parts)]), sum(cut for _, cut in parts)


@torch.no_grad()
def _vectors(
    model: Transformer, tokenizer: Tokenizer, texts: list[tuple[str, ...]], reading: Reading, context_length: int
) -> tuple[Vectors, int]:
    encoded = iter(tokenizer.encode_batch([part for text in texts for part in text]))
    end_of_text = tokenizer.end_of_text_id
    found = [sequence_of([next(encoded) for _ in text], end_of_text, context_length) for text in texts]
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    device = next(model.parameters()).device
    for some in packed([tokens for tokens, _ in found], reading.reads, end_of_text, context_length, ROWS):
        hidden = hidden_states(model, some.batch.to(device), reading.layer)
        vectors[some.numbers] = pooled(hidden, some, reading.pooling).float().cpu().numpy()
    if reading.normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors, sum(cut for _, cut in found)


def hidden_states(model: Transformer, batch: Batch, layer: int = -1) -> Tensor:
    """Hidden states (rows, T, hidden) behind a layer, as ``Reading.layer`` counts."""
    if layer in (-1, len(model.blocks)):
        return model(batch.inputs, batch.positions, batch.lo, batch.hi)
    caught: list[Tensor] = []
    module = model.embedding if layer == 0 else model.blocks[layer - 1]
    hook = module.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        model(batch.inputs, batch.positions, batch.lo, batch.hi)
    finally:
        hook.remove()
    return caught[0]


def write_vectors(path: Path, parts: Iterable[Vectors], width: int) -> int:
    """Write vectors as they come, and return their number: .npy (float32), or .jsonl, {"embedding": […]} a line.

    The file appears when it is complete.

    Raises:
        UserError: the name ends otherwise.
    """
    if path.suffix not in (".npy", ".jsonl"):
        raise UserError(f"embeddings are written to .npy or .jsonl, not to {path}")
    written = 0
    with atomic_file(path) as file:
        if path.suffix == ".npy":
            _write_header(file, 0, width)
        for vectors in parts:
            written += len(vectors)
            if path.suffix == ".npy":
                file.write(np.ascontiguousarray(vectors).tobytes())
            else:
                write_lines(file, vectors)
        if path.suffix == ".npy":
            file.seek(0)
            _write_header(file, written, width)  # as long as the first: NumPy leaves room for the number to grow
    return written


def write_lines(file: IO[bytes], vectors: Vectors) -> None:
    """Write vectors as JSON lines, each number with as many digits as a float32 needs to be read again."""
    for vector in vectors:
        numbers = [float(str(number)) for number in vector]
        file.write(json.dumps({"embedding": numbers}).encode() + b"\n")


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)
