"""Images as vectors: what a frozen model makes of their patches, averaged; for search, neighbors and probes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.files import atomic_file, output_ending
from data_prep.shards.images import ImageFormat
from lm.config.settings import VECTOR_FILES
from lm.data.images import model_inputs
from lm.data.patch_rows import layout_of
from lm.inference.embedding import Vectors, require_layer, scaled, write_lines, write_vectors
from lm.model.image_transformer import ImageTransformer

ROWS = 64  # images per forward pass


@torch.no_grad()
def image_vectors(
    model: ImageTransformer,
    form: ImageFormat,
    images: Iterable[NDArray[np.uint8]],
    layer: int = -1,
    *,
    normalize: bool = False,
    rows: int = ROWS,
) -> Vectors:
    """The features of images: the mean over the patches of an image, float32 (images, hidden).

    Args:
        model: in evaluation mode; its weights stay as they are.
        form: what makes inputs of pixels for this model.
        images: uint8 (n, size, size, channels), in parts of any length.
        layer: 0 is the patch embedding, n the output of block n, -1 that of the last.
        normalize: scale vectors to length 1.
        rows: images per forward pass.

    Raises:
        UserError: the model has no such layer.
    """
    assert not model.training, "features are those of a frozen model: call model.eval() first"
    require_layer(model.config, layer)
    device = next(model.parameters()).device
    found = [np.zeros((0, model.config.hidden_size), dtype=np.float32)]
    for part in images:
        for first in range(0, len(part), rows):
            pixels = torch.from_numpy(np.ascontiguousarray(part[first : first + rows])).to(device)
            features = _hidden_states(model, model_inputs(pixels, form), layer).float().mean(1)
            assert not features.requires_grad
            found.append(features.cpu().numpy())
    vectors = np.concatenate(found)
    return scaled(vectors) if normalize else vectors


def _hidden_states(model: ImageTransformer, inputs: Tensor, layer: int) -> Tensor:
    """Hidden states (n, patches, hidden) of inputs (n, C, H, W)."""
    images = [inputs]
    layout = layout_of(images, model.config.patch_size)
    if layer in (-1, len(model.blocks)):
        hidden: Tensor = model(images, layout)
        return hidden
    caught: list[Tensor] = []
    module = model.embedding if layer == 0 else model.blocks[layer - 1]
    hook = module.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        model(images, layout)
    finally:
        hook.remove()
    return caught[0]


def names_file(vectors: Path) -> Path:
    """The text file next to a .npy file of vectors that has the name of each row's image in a line."""
    return vectors.with_suffix(".txt")


def write_image_vectors(path: Path, parts: Iterable[tuple[Sequence[str], Vectors]], width: int) -> int:
    """Write the vectors of images, with their names, as they come, and return their number.

    A .npy file gets a ``names_file``; in a .jsonl each line has the name as "image". UserError for another ending.
    """
    if output_ending(path, VECTOR_FILES) == ".jsonl":
        written = 0
        with atomic_file(path) as file:
            for names, vectors in parts:
                write_lines(file, vectors, names)
                written += len(vectors)
        return written
    with atomic_file(names_file(path)) as file:

        def noted() -> Iterator[Vectors]:
            for names, vectors in parts:
                file.write("".join(f"{name}\n" for name in names).encode())
                yield vectors

        return write_vectors(path, noted(), width)
