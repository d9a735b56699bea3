"""The transformer on images: stem (patch embedding) -> trunk (the blocks that also read text) -> an objective's head.

Stem and trunk are what transformers calls a ``PixtralVisionModel`` (Agrawal et al. 2024, "Pixtral 12B"): an RMSNorm
after the patch embedding, none after the last block, rotary positions over rows and columns, every patch sees all
patches of its image. What is learned from images (``lm.objectives``) brings a head, which is no part of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lm.config.model_settings import ModelConfig
from lm.model.transformer import RMSNorm, Transformer, Trunk, initialize

# Channels of the first convolution of a convolutional stem; each halving of the resolution doubles them.
STEM_CHANNELS = 32


class PatchLayout(Protocol):
    """Where patches of images stand in the rows of a pass (``lm.data.patch_rows.PatchRows``).

    Attributes:
        slots: int64 (rows, T), the number of each position's patch among those of all images, one image after another;
            None: each image is a row.
        places: int64 (patches,), the position of each patch among those of all rows; None likewise.
        positions: int32 (rows, T, 2), the row and column of the patch in its image.
        lo, hi: int32 (rows, T), the key intervals: each patch sees those of its image.
    """

    @property
    def slots(self) -> Tensor | None: ...
    @property
    def places(self) -> Tensor | None: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def lo(self) -> Tensor: ...
    @property
    def hi(self) -> Tensor: ...


def patches_of(images: Tensor, size: int) -> Tensor:
    """Cut images (n, C, H, W) into patches, row by row: (n, H / size · W / size, C · size · size)."""
    n, channels, height, width = images.shape
    cut = images.reshape(n, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * size * size)


def images_of(patches: Tensor, size: int, height: int, width: int) -> Tensor:
    """The images (n, C, height, width) that ``patches_of`` cuts into these patches, (n, patches, C · size · size)."""
    n, rows, columns = len(patches), height // size, width // size
    cut = patches.reshape(n, rows, columns, -1, size, size)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, height, width)


class PatchEmbedding(nn.Module):
    """Images (n, C, H, W) -> a vector for each patch, (n, patches, hidden).

    The linear stem maps the pixels of a patch (Dosovitskiy et al. 2021). The convolutional one first looks at the whole
    image through 3 x 3 convolutions (Xiao et al. 2021, "Early convolutions help transformers see better"), with a norm
    over the channels and positions of each image instead of one over the batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size, self.channels, self.convolutions = config.patch_size, config.image_channels, None
        if config.stem == "convolutional":
            self.patch_size, layers, channels = 2, list[nn.Module](), self.channels
            for halving in range(config.patch_size.bit_length() - 1):
                width = STEM_CHANNELS * 2**halving
                layers += [
                    nn.Conv2d(channels, width, 3, stride=2 if halving else 1, padding=1, bias=False),
                    nn.GroupNorm(1, width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            self.convolutions, self.channels = nn.Sequential(*layers), channels
        inputs = self.channels * self.patch_size**2
        self.projection = nn.Linear(inputs, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)

    def cut(self, images: Tensor) -> Tensor:
        """What the linear map reads of each patch: (n, patches, inputs)."""
        if self.convolutions is not None:
            images = self.convolutions(images)
        return patches_of(images, self.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """The vectors (…, hidden) of patches (…, inputs) as from ``cut``."""
        return self.norm(self.projection(patches))


class ImageTransformer(nn.Module):
    """Normalized images in, hidden states of their patches out; ``head`` is the objective's, None without one."""

    def __init__(self, config: ModelConfig, head: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config)
        self.blocks = Trunk(config)
        self.head = head
        self._compiled: Callable[..., Tensor] | None = None

    def initialize(self, seed: int, *, identity: bool = True, output_init: float = 0.0) -> ImageTransformer:
        """Draw all weights from ``seed``, as of ``lm.model.transformer.initialize``."""
        initialize(self, seed, identity=identity, output_init=output_init)
        return self

    def forward(
        self,
        images: Sequence[Tensor],
        layout: PatchLayout,
        kept: Tensor | None = None,
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of the patches of all images.

        Args:
            images: float32 (n, C, H, W), the images of each size.
            layout: where their patches stand in rows, on the same device.
            kept: int64 (n, k), the patches to read of each image, which are all of one size; None: all.
            masked: bool (n, patches), where each image is a row, and the vector (1, hidden) that stands for the
                patches where it is true.

        Returns:
            (n, patches, hidden) if each image is a row; else (patches, hidden), one image after another.
        """
        cut = [self.embedding.cut(each) for each in images]
        if kept is not None:
            (whole,) = cut
            cut = [whole.gather(1, kept[..., None].expand(-1, -1, whole.shape[2]))]
        if layout.slots is None or layout.places is None:
            (patches,) = cut
            return self._read(patches, layout, masked)
        flat = torch.cat([each.flatten(0, 1) for each in cut])
        return self._read(flat[layout.slots], layout).flatten(0, 1)[layout.places]

    def _read(self, patches: Tensor, layout: PatchLayout, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        through = self._compiled if self._compiled and self.training else self._through_trunk
        return through(patches, layout.positions, layout.lo, layout.hi, masked)

    def _through_trunk(
        self, patches: Tensor, positions: Tensor, lo: Tensor, hi: Tensor, masked: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        x = self.embedding(patches)
        if masked is not None:
            hidden, mask = masked
            x = torch.where(hidden[..., None], mask.to(x.dtype), x)
        return self.blocks(x, positions, lo, hi, None)

    def compile_training(self) -> None:
        """Run training passes through ``torch.compile``, at the first one of each shape; others stay eager."""
        self._compiled = torch.compile(self._through_trunk, fullgraph=True)

    def flops_per_patch(self, patches: int) -> float:
        """As of ``Transformer.flops_per_token``, of one of ``patches`` that go through stem and trunk together."""
        stem, size = float(self.embedding.projection.weight.numel()), self.config.patch_size
        for layer in self.embedding.convolutions or ():
            if isinstance(layer, nn.Conv2d):
                size //= layer.stride[0]
                stem += layer.weight.numel() * size**2  # positions of a patch
        return 6.0 * stem + self.blocks.flops_per_token(patches)

    def describe(self) -> str:
        """One line: what this model is."""
        c, counts = self.config, self.parameter_counts()
        head = f" ({counts['head'] / 1e6:.2f}M head)" if counts["head"] else ""
        return (
            f"{counts['total'] / 1e6:.2f}M parameters{head}: {c.shape}, "
            f"{c.patches} patches of {c.patch_size} x {c.patch_size} pixels, {c.stem} stem"
        )

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, in the patch embedding, in the blocks and in the objective's head."""
        parts = {"embedding": self.embedding, "blocks": self.blocks, "head": self.head}
        counts = {name: sum(p.numel() for p in part.parameters()) if part else 0 for name, part in parts.items()}
        return {"total": sum(counts.values()), **counts}


Model = Transformer | ImageTransformer


class PixelDecoder(nn.Module):
    """MAE's decoder (He et al. 2022, section 3): hidden states of the visible patches -> pixels of all patches.

    ``config`` is the decoder's own shape, ``width`` that of the hidden states, ``pixels`` the numbers of a patch.
    """

    def __init__(self, config: ModelConfig, width: int, pixels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, config.norm_epsilon)
        self.embedding = nn.Linear(width, config.hidden_size, bias=False)
        self.mask = nn.Parameter(torch.zeros(1, config.hidden_size))  # stands for each hidden patch
        self.blocks = Trunk(config)
        self.output_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.pixels = nn.Linear(config.hidden_size, pixels, bias=False)

    def forward(self, visible: Tensor, kept: Tensor, layout: PatchLayout) -> Tensor:
        """Pixels (n, patches, pixels) from hidden states (n, k, width) of the patches ``kept``, int64 (n, k)."""
        known = self.embedding(self.norm(visible))
        patches = layout.positions.shape[1]
        everything = self.mask.to(known.dtype).expand(len(known), patches, -1)
        x = everything.scatter(1, kept[..., None].expand_as(known), known)
        return self.pixels(self.output_norm(self.blocks(x, layout.positions, layout.lo, layout.hi, None)))
