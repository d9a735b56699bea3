"""Compare packed patches on the CPU with padding and with a pass for each size: forward and backward of the trunk.

    python -m benchmarks.patch_packing [--rounds 9] [--threads 1]

At the shape of configs/images-mae.toml:

- crops: of 16 images two crops of 32 pixels and eight of 16, as DINO's. Packed, four small crops share the row of a
  large one; padded, each crop has a row of 64 patches; "a pass a size" runs the trunk once for each size.
- visible: MAE's visible quarter of 256 images of 32 pixels. Packed, as training does it, a row has the visible patches
  of one image; padded, all 64 positions, of which the first 16 are used; "shared rows" packs four images into a row.

All compute the same hidden states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.side_by_side import in_turn, table
from lm.config.model_settings import ModelConfig
from lm.data.patch_rows import PatchRows, layout_of, packed_rows, rows_of_images
from lm.kernels import masks
from lm.model.image_transformer import ImageTransformer

CONFIG = ModelConfig(patch_size=4, image_size=32, image_channels=3, norm_epsilon=1e-5)
PATCHES = CONFIG.patches


def padded(positions: Tensor, used: int) -> PatchRows:
    """Rows of ``PATCHES`` positions of which the first ``used`` hold patches."""
    rows = len(positions)
    filled = torch.zeros(rows, PATCHES, 2, dtype=torch.int32)
    filled[:, :used] = positions
    starts = torch.zeros(rows, PATCHES, dtype=torch.bool)
    lo, hi = masks.packed(starts, torch.ones(rows, dtype=torch.bool), torch.full((rows,), used))
    return PatchRows(filled, lo, hi)


def through(model: ImageTransformer, patches: Tensor, rows: PatchRows, used: int | None = None) -> Tensor:
    """Hidden states of embedded rows, (rows, T, hidden), up to ``used`` positions of each row."""
    hidden: Tensor = model.blocks(patches, rows.positions, rows.lo, rows.hi, None)
    return hidden if used is None else hidden[:, :used]


def widened(patches: Tensor) -> Tensor:
    """Rows filled up with zeros to ``PATCHES`` positions."""
    return torch.nn.functional.pad(patches, (0, 0, 0, PATCHES - patches.shape[1]))


def measured(model: ImageTransformer, pass_: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        torch.stack([hidden.square().sum() for hidden in pass_()]).sum().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = ImageTransformer(CONFIG).initialize(0, identity=False)
    large, small = torch.randn(32, 3, 32, 32), torch.randn(128, 3, 16, 16)
    layouts = {"packed": layout_of([large, small], 4), "large": layout_of([large], 4), "small": layout_of([small], 4)}
    wide = padded(layouts["small"].positions, 16)

    def embedded(images: Tensor) -> Tensor:
        return model.embedding(model.embedding.cut(images))

    crops = {
        "packed": lambda: [model([large, small], layouts["packed"])],
        "padded": lambda: [
            model([large], layouts["large"]),
            through(model, widened(embedded(small)), wide, 16),
        ],
        "a pass a size": lambda: [model([large], layouts["large"]), model([small], layouts["small"])],
    }
    show("crops", model, crops, arguments.rounds)

    images = torch.randn(256, 3, 32, 32)
    kept = torch.stack([torch.randperm(PATCHES)[:16].sort().values for _ in range(len(images))])
    rows = rows_of_images(len(images), 8, 8, kept)
    wide_rows = padded(rows.positions, 16)
    shared = packed_rows(((len(images), 4, 4),), PATCHES)
    slots, places = shared.slots, shared.places
    assert slots is not None
    assert places is not None
    of_shared = PatchRows(rows.positions.flatten(0, 1)[slots], shared.lo, shared.hi)

    def visible() -> Tensor:
        patches = model.embedding.cut(images)
        return model.embedding(patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2])))

    halves = {
        "packed": lambda: [model([images], rows, kept)],
        "shared rows": lambda: [through(model, visible().flatten(0, 1)[slots], of_shared).flatten(0, 1)[places]],
        "padded": lambda: [through(model, widened(visible()), wide_rows, 16)],
    }
    show("visible", model, halves, arguments.rounds)


def show(title: str, model: ImageTransformer, passes: dict[str, Callable[[], list[Tensor]]], rounds: int) -> None:
    """Check that all passes agree, time them in turn, and print the table."""
    width = CONFIG.hidden_size
    expected, *others = (torch.cat([each.reshape(-1, width) for each in pass_()]) for pass_ in passes.values())
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    timings = in_turn({name: measured(model, pass_) for name, pass_ in passes.items()}, rounds=rounds)
    print(table(title, timings, "packed"))


if __name__ == "__main__":
    main()
