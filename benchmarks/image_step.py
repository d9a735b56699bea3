"""Compare a whole training step on images on the CPU with a plain PyTorch ViT's and lightly's, of the same shape.

    pip install --no-deps --target FOLDER lightly
    python -m benchmarks.image_step [--lightly FOLDER] [--rounds 5] [--threads 1] [--images 128] [--only simclr]

A step makes the views, runs forward, loss and backward, clips to norm 1 and takes a step of AdamW; "Muon" is the step
of the recipes. Kindling runs the functions that ``train.py`` calls, at the shape of images-mae.toml,
SimCLR too: 4 blocks of 192 with 6 heads and patches of 4 of random images of 32 pixels, in memory; MAE reads a
quarter of the patches and has a decoder of 2 blocks of 96. The plain ViT is as people write it: LayerNorm, biases,
GELU, ``scaled_dot_product_attention``, learned positions, gathered visible patches. Its views are made by Pillow, one
by one, as torchvision's transforms do (``benchmarks.views``), or by Kindling, so that the rest is compared alone.
``--lightly`` adds a ViT with lightly's SimCLR head and loss; they need no torchvision, as other parts of lightly do.

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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.side_by_side import apart_in_turn
from benchmarks.views import pillow_view
from data_prep.shards.images import ImageFormat
from lm.config.recipes import find_recipe, load_config
from lm.config.view_settings import ViewsConfig
from lm.data.image_corpora import sized
from lm.data.images import ImageRows
from lm.data.views import draw_views, make_views, without_color
from lm.model.device import keep_freed_memory
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients
from lm.training.optimizer import Optimizer
from lm.training.plan import settle_micro_batch

SIZE, PATCH = 32, 4
LAYERS, WIDTH, HEADS = 4, 192, 6
DECODER_LAYERS, DECODER_WIDTH, DECODER_HEADS = 2, 96, 3
PATCHES, PIXELS = (SIZE // PATCH) ** 2, 3 * PATCH**2
HIDDEN_SHARE = 0.75
PROJECTION, PROJECTION_HIDDEN, TEMPERATURE = 128, 512, 0.2
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VIEWS = {"simclr": 2, "mae": 1}
SETTINGS = {"simclr": ViewsConfig(), "mae": without_color(ViewsConfig())}

Views = Callable[[], Tensor]


def pictures(images: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (images, SIZE, SIZE, 3), dtype=np.uint8)


def pillow_views(objective: str, images: int) -> Views:
    """A function that makes the views of a step one by one: (views x images, 3, size, size)."""
    opened = [Image.fromarray(image) for image in pictures(images)]
    settings, views = SETTINGS[objective], VIEWS[objective]
    return lambda: torch.stack([pillow_view(image, settings) for _ in range(views) for image in opened])


def batched_views(objective: str, images: int) -> Views:
    """The same by ``lm.data.views``."""
    settings, views, steps = SETTINGS[objective], VIEWS[objective], count()
    repeated = torch.from_numpy(pictures(images)).repeat(views, 1, 1, 1)

    def make() -> Tensor:
        drawn = draw_views(next(steps), np.arange(images), views, settings)
        return make_views(repeated, drawn.transpose(0, 1).flatten(0, 1), SIZE, settings)

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
        unused = types.ModuleType("torchvision.ops")  # lightly.models.utils names a class of it
        unused.__dict__["StochasticDepth"] = nn.Identity
        sys.modules |= {"torchvision": types.ModuleType("torchvision"), unused.__name__: unused}
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


def plain_steps(
    make: Callable[[], nn.Module], views: Callable[[str, int], Views], objective: str, images: int, threads: int
) -> Callable[[], object]:
    torch.set_num_threads(threads)
    model, made = make(), views(objective, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))

    def step() -> None:
        loss = model((made() - mean) / std)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def kindling_steps(objective: str, optimizer: str, images: int, threads: int) -> Callable[[], object]:
    """A step of the recipe, but for its batch, with this optimizer."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    asked = {"batch_images": images, "optimizer": optimizer, "precision": "float32"}
    config = sized(load_config(find_recipe(f"images-{objective}"), {**asked, "patch_size": PATCH}), SIZE, 3)
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (LAYERS, WIDTH, HEADS)
    config = settle_micro_batch(config, torch.device("cpu"))
    learned = open_objective(config, ImageFormat(SIZE, 3, MEAN, STD))
    model = learned.new_model().initialize(0)
    own = Optimizer(model, config.optimizer)
    rows, steps = pictures(images), count()

    def step() -> None:
        number = next(steps)
        batch = learned.prepare(ImageRows(rows, np.arange(images) + number * images))
        losses, _ = step_gradients(learned, model, batch, config, number)
        own.clip()
        own.step(1.0)
        sum(loss.item() for loss in losses.values())

    return step


def compare(objective: str, images: int, rounds: int, threads: int, lightly: Path | None) -> None:
    plain: type[nn.Module] = {"simclr": PlainSimCLR, "mae": PlainMAE}[objective]
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "plain ViT, Pillow's views": partial(plain_steps, plain, pillow_views, objective, images, threads),
        "plain ViT, Kindling's views": partial(plain_steps, plain, batched_views, objective, images, threads),
    }
    if lightly and objective == "simclr":
        made = partial(LightlySimCLR, lightly)
        makers["lightly, Pillow's views"] = partial(plain_steps, made, pillow_views, objective, images, threads)
        makers["lightly, Kindling's views"] = partial(plain_steps, made, batched_views, objective, images, threads)
    makers["kindling"] = partial(kindling_steps, objective, "adamw", images, threads)
    makers["kindling, Muon"] = partial(kindling_steps, objective, "muon", images, threads)
    timings = apart_in_turn(makers, rounds=rounds, warm_up=2)
    print(f"{objective}: {images} images, {threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, timing in timings.items():
        print(
            f"  {name:28}{images / timing.cpu:7.1f} images/CPU s; kindling's "
            f"{timing.cpu / timings['kindling'].cpu:.2f} times as many, with Muon "
            f"{timing.cpu / timings['kindling, Muon'].cpu:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightly", type=Path, help="a folder with lightly's package")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=128, help="of a step")
    parser.add_argument("--only", default="", help="simclr or mae")
    arguments = parser.parse_args()
    for one in VIEWS:
        if arguments.only in one:
            compare(one, arguments.images, arguments.rounds, arguments.threads, arguments.lightly)
