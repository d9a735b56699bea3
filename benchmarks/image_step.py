"""Compare a whole training step on images on the CPU with a plain PyTorch ViT's and lightly's, of the same shape.

    python -m benchmarks.image_step [--rounds 5] [--threads 1] [--lightly FOLDER] [--only simclr]

A step makes the views, runs forward, loss and backward, clips to norm 1 and takes a step of AdamW; "Muon" is that of
the recipes. Images are random, in memory, 32 pixels wide and cut into patches of 4; the trunk has 4 blocks of 192 with
heads of 64. The plain ViT is as people write it: LayerNorm, biases, GELU, ``scaled_dot_product_attention``, learned
positions. Its views are Pillow's, one by one, as torchvision makes them (``benchmarks.views``), or Kindling's, so that
the models alone are compared. ``--lightly`` names a folder with lightly's package (pip install --no-deps --target
FOLDER lightly); its SimCLR head and loss then replace those of the plain ViT. It needs torchvision for other parts
only. MAE reads a quarter of the patches, and its decoder has 2 blocks of 96.

Images are per CPU second of all threads together. Each candidate has its own process.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.side_by_side import apart_in_turn
from benchmarks.views import pillow_view
from lm.config.settings import ViewsConfig
from lm.data.views import draw_views, make_views, without_color
from lm.model.device import keep_freed_memory

IMAGES, SIZE, PATCH = 64, 32, 4
LAYERS, WIDTH, HEADS = 4, 192, 3
DECODER_LAYERS, DECODER_WIDTH, DECODER_HEADS = 2, 96, 3
PATCHES, PIXELS = (SIZE // PATCH) ** 2, 3 * PATCH**2
HIDDEN_SHARE = 0.75
PROJECTION, PROJECTION_HIDDEN, TEMPERATURE = 128, 512, 0.2
VIEWS = {"simclr": 2, "mae": 1}
SETTINGS = {"simclr": ViewsConfig(), "mae": without_color(ViewsConfig())}


def pictures() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8))


def pillow_views(objective: str) -> Callable[[], Tensor]:
    """A function that makes the views of a step one by one: (views x images, 3, size, size)."""
    opened = [Image.fromarray(image) for image in pictures().numpy()]
    settings, views = SETTINGS[objective], VIEWS[objective]
    return lambda: torch.stack([pillow_view(image, settings) for _ in range(views) for image in opened])


def batched_views(objective: str) -> Callable[[], Tensor]:
    """The same by ``lm.data.views``."""
    images, settings, views, steps = pictures(), SETTINGS[objective], VIEWS[objective], count()

    def make() -> Tensor:
        drawn = draw_views(next(steps), np.arange(IMAGES), views, settings)
        return torch.cat([make_views(images, drawn[:, view], SIZE, settings) for view in range(views)])

    return make


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """Mean-pooled features for SimCLR, or hidden states of the visible patches for MAE."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn(1, PATCHES, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(PlainBlock(WIDTH, HEADS) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        x = self.embedding(images).flatten(2).transpose(1, 2) + self.positions
        if kept is not None:
            x = x.gather(1, kept[:, :, None].expand(-1, -1, WIDTH))
        return self.norm(self.blocks(x))


class PlainSimCLR(nn.Module):
    """NT-Xent as in SimCLR's paper, with a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = PlainViT()
        self.head: nn.Module = nn.Sequential(
            nn.Linear(WIDTH, PROJECTION_HIDDEN), nn.ReLU(), nn.Linear(PROJECTION_HIDDEN, PROJECTION)
        )

    def loss(self, vectors: Tensor) -> Tensor:
        vectors = F.normalize(vectors, dim=1)
        similarities = vectors @ vectors.T / TEMPERATURE
        similarities.fill_diagonal_(-torch.inf)
        return F.cross_entropy(similarities, torch.arange(len(vectors)).roll(len(vectors) // 2))

    def forward(self, views: Tensor) -> Tensor:
        return self.loss(self.head(self.trunk(views).mean(1)))


class LightlySimCLR(PlainSimCLR):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        sys.path.insert(0, str(folder))
        for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules"):
            # Empty packages with the real paths: their own __init__ imports torchvision.
            package = types.ModuleType(name)
            package.__path__ = [str(folder / name.replace(".", "/"))]
            sys.modules[name] = package
        from lightly.loss.ntx_ent_loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        self.head = SimCLRProjectionHead(WIDTH, PROJECTION_HIDDEN, PROJECTION)
        self.criterion = NTXentLoss(TEMPERATURE)

    def loss(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.criterion(*vectors.chunk(2))
        return found


class PlainMAE(nn.Module):
    """The encoder sees gathered visible patches; the loss is that of the hidden ones' normalized pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = PlainViT()
        self.embedding, self.mask = nn.Linear(WIDTH, DECODER_WIDTH), nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.positions = nn.Parameter(torch.randn(1, PATCHES, DECODER_WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(PlainBlock(DECODER_WIDTH, DECODER_HEADS) for _ in range(DECODER_LAYERS)))
        self.norm, self.pixels = nn.LayerNorm(DECODER_WIDTH), nn.Linear(DECODER_WIDTH, PIXELS)

    def forward(self, views: Tensor) -> Tensor:
        order = torch.rand(len(views), PATCHES).argsort(1)
        kept = order[:, : round(PATCHES * (1 - HIDDEN_SHARE))]
        visible = self.embedding(self.trunk(views, kept))
        everything = self.mask.expand(len(views), PATCHES, -1)
        x = everything.scatter(1, kept[:, :, None].expand_as(visible), visible) + self.positions
        predicted = self.pixels(self.norm(self.blocks(x)))
        side = SIZE // PATCH
        target = views.view(-1, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCHES, PIXELS)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        hidden = torch.ones(len(views), PATCHES).scatter_(1, kept, 0)
        return ((predicted - target).square().mean(2) * hidden).sum() / hidden.sum()


def plain_step(
    make: Callable[[], nn.Module], views: Callable[[str], Callable[[], Tensor]], objective: str, threads: int
) -> Callable[[], object]:
    torch.set_num_threads(threads)
    model, images = make(), views(objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

    def step() -> float:
        model((images() - 0.5) / 0.25).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    return step
