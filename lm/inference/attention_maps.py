"""Which patches of an image the last block attends to, and how to show it.

The trunk has no class token whose attention could be shown. A feature is the mean over the patches, so what it sees is
the mean over the patches as queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.data.images import model_inputs
from lm.data.patch_rows import layout_of
from lm.model.image_transformer import ImageTransformer
from lm.model.transformer import Attention

ROWS = 8  # images per forward pass; attention has patches x patches numbers for each head
TINT = (240, 110, 30)  # orange, as the accent of the pages
STRONGEST = 0.75  # opacity of the tint on the patch with the most attention


@torch.no_grad()
def attention_maps(
    model: ImageTransformer, form: ImageFormat, images: NDArray[np.uint8], rows: int = ROWS
) -> NDArray[np.float32]:
    """The share of the last block's attention that each patch receives, averaged over the patches as queries.

    Args:
        model: in evaluation mode.
        form: what makes inputs of pixels for this model.
        images: uint8 (n, size, size, channels).
        rows: images per forward pass.

    Returns:
        float32 (n, heads, patches down, patches across); the shares of each head sum to 1.
    """
    side = form.size // model.config.patch_size
    device = next(model.parameters()).device
    found = [np.zeros((0, model.config.num_heads, side, side), dtype=np.float32)]
    for first in range(0, len(images), rows):
        pixels = torch.from_numpy(np.ascontiguousarray(images[first : first + rows])).to(device)
        shares = _last_attention(model, model_inputs(pixels, form)).mean(2)
        found.append(shares.unflatten(-1, (side, side)).cpu().numpy())
    return np.concatenate(found)


def _last_attention(model: ImageTransformer, inputs: Tensor) -> Tensor:
    """Attention probabilities of the last block, float32 (n, heads, queries, keys), for inputs (n, C, H, W)."""
    attention = model.blocks[-1].attention
    assert isinstance(attention, Attention)
    caught: list[tuple[Tensor, Tensor]] = []

    def catch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, rotary, *_rest = arguments
        q, k, _values = attention.heads(x, rotary)
        caught.append((q.float(), k.float()))

    hook = attention.register_forward_pre_hook(catch)
    try:
        model([inputs], layout_of([inputs], model.config.patch_size))
    finally:
        hook.remove()
    ((q, k),) = caught
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return (torch.einsum("nqhd,nkhd->nhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def overlaid(pixels: NDArray[np.uint8], shares: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An image, uint8 (size, size, channels), in gray, and over it in orange how much attention each patch receives.

    The patch with the most has the strongest color. ``shares`` is (patches down, patches across); returns uint8
    (size, size, 3).
    """
    size = len(pixels) // len(shares)
    strength = STRONGEST * np.kron(shares / shares.max(), np.ones((size, size)))[..., None]
    gray = pixels.mean(axis=2, keepdims=True)
    return np.rint(gray * (1 - strength) + np.array(TINT) * strength).astype(np.uint8)
