"""Masked autoencoder (He et al. 2022): predict the pixels of hidden patches from the visible ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.model_settings import ModelConfig
from lm.config.settings import Config
from lm.config.view_settings import ViewsConfig
from lm.data.images import ImageBatch, ImageRows, ImageValidation, denormalized
from lm.data.keyed_random import Stream, key, uniform
from lm.data.patch_rows import rows_of_images
from lm.data.views import draw_views, without_color
from lm.model.image_transformer import ImageTransformer, PixelDecoder, images_of, patches_of
from lm.objectives.images import ImageObjective, normalized
from lm.objectives.objective import Measure

HEAD_WIDTH = 32  # of the decoder


def decoder_config(config: Config) -> ModelConfig:
    """The decoder's own shape."""
    width = config.objective.decoder_size
    return dataclasses.replace(
        config.model,
        num_layers=config.objective.decoder_layers,
        hidden_size=width,
        num_heads=width // HEAD_WIDTH,
        num_key_value_heads=0,
        head_size=HEAD_WIDTH,
        feed_forward_size=0,
    )


class MaskedAutoencoder(ImageObjective):
    """The encoder reads the visible patches only; a small decoder predicts all, and the hidden ones count."""

    name, views = "mae", 1

    @property
    def view_settings(self) -> ViewsConfig:
        """Crops and flips, without changes of color."""
        return without_color(self.config.views)

    @property
    def visible(self) -> int:
        """Patches of an image that the encoder reads, at least one and not all."""
        patches = self.config.model.patches
        return min(max(1, round(patches * (1 - self.config.objective.patch_mask_rate))), patches - 1)

    @property
    def hidden(self) -> int:
        """The others."""
        return self.config.model.patches - self.visible

    def head(self) -> nn.Module:
        model = self.config.model
        pixels = model.image_channels * model.patch_size**2
        return PixelDecoder(decoder_config(self.config), model.hidden_size, pixels)

    def prepare(self, rows: ImageRows) -> ImageBatch:
        draws = draw_views(self.seed, rows.numbers, self.views, self.view_settings)
        batch = self.batch_of(rows.images, draws, 1 / len(rows.images))
        return dataclasses.replace(batch, kept=self._kept(self.seed, rows.numbers))

    def example(self, rows: int) -> ImageBatch:
        kept = torch.arange(self.visible).expand(rows, -1).contiguous()
        return dataclasses.replace(super().example(rows), kept=kept)

    def _kept(self, seed: int, numbers: NDArray[np.int64]) -> Tensor:
        """The patches of each image that stay visible, ascending: int64 (n, visible)."""
        chance = uniform(key(seed, Stream.HIDDEN_PATCHES), numbers, self.config.model.patches)
        return torch.from_numpy(np.sort(np.argsort(chance, axis=1)[:, : self.visible], axis=1))

    def loss(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """The mean squared error of the hidden patches' pixels, averaged over each image's patches, weighted."""
        assert batch.kept is not None
        views = self.views_of(batch)
        errors = (self.predictions(model, views, batch.kept).float() - self.targets(views)).square().mean(2)
        hidden = torch.ones_like(errors).scatter(1, batch.kept, 0.0)
        per_image = (errors * hidden).sum(1) / self.hidden
        return {self.name: per_image @ batch.loss_weights}

    def predictions(self, model: nn.Module, views: Tensor, kept: Tensor) -> Tensor:
        """The pixels of all patches, (n, patches, pixels), from the patches ``kept`` of normalized views."""
        assert isinstance(model, ImageTransformer)
        assert model.head is not None
        side = model.config.image_size // model.config.patch_size
        visible = model([views], rows_of_images(len(views), side, side, kept), kept)
        pixels: Tensor = model.head(visible, kept, rows_of_images(len(views), side, side).to(views.device))
        return pixels

    def targets(self, views: Tensor) -> Tensor:
        """The pixels to predict, (n, patches, pixels): those of each patch normalized by itself, if so set."""
        pixels = patches_of(views, self.config.model.patch_size)
        if not self.config.objective.normalize_patches:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()

    def measured(self, held_out: ImageValidation, numbers: NDArray[np.int64], measure: Measure) -> dict[str, float]:
        total, images = measure(numbers, [lambda some: self.whole(held_out.held_out.read(some), some)])
        return {"loss": total / max(images, 1)}

    def whole(self, images: NDArray[np.uint8], numbers: NDArray[np.int64]) -> ImageBatch:
        """A batch of held-out images as they are, with the same patches hidden in every validation."""
        whole = dataclasses.replace(self.view_settings, crop_area=1.0, crop_ratio=1.0, flip=0.0)
        made = self.batch_of(images, draw_views(0, numbers, self.views, whole), 1.0)
        return dataclasses.replace(made, kept=self._kept(0, numbers))

    def pictures(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """What there is to see of a batch: pictures by name, float32 (n, C, H, W) in [0, 1].

        ``visible`` has the hidden patches in gray, ``rebuilt`` as the model predicts them, and ``flat`` with their mean
        alone. Predictions of normalized patches are scaled by the mean and standard deviation of the patch itself: what
        ``rebuilt`` adds to ``flat`` is the model's.
        """
        assert batch.kept is not None
        size = self.config.model.patch_size
        views = self.views_of(batch)
        patches = patches_of(views, size)
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        predicted = self.predictions(model, views, batch.kept).float()
        if self.config.objective.normalize_patches:
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        gray = patches_of(normalized(torch.full_like(views, 0.5), self.form), size)
        hidden = torch.ones_like(patches[:, :, :1], dtype=torch.bool).scatter(1, batch.kept[..., None], False)
        made = {"original": patches, "visible": gray, "flat": mean.expand_as(patches), "rebuilt": predicted}
        return {
            name: denormalized(images_of(torch.where(hidden, part, patches), size, *views.shape[2:]), self.form)
            for name, part in made.items()
        }

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """The visible patches go through the trunk, all through the decoder."""
        assert isinstance(model, ImageTransformer)
        assert isinstance(model.head, PixelDecoder)
        share = self.visible / context_length
        decoder = model.head.blocks.flops_per_token(context_length) + 6.0 * model.head.pixels.weight.numel()
        return share * model.flops_per_patch(self.visible) + decoder


open_objective = MaskedAutoencoder
