"""BEiT (Bao et al. 2021): predict the visual tokens of hidden patches, the codes of a tokenizer trained before."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from lm.config.view_settings import ViewsConfig
from lm.data.batch import IGNORED
from lm.data.images import ImageBatch, ImageRows, ImageValidation, denormalized, normalized
from lm.data.keyed_random import Stream, key
from lm.data.patch_blocks import hidden_blocks
from lm.data.patch_rows import rows_of_images
from lm.data.views import draw_views, without_color
from lm.data.visual_codes import codebook_of
from lm.kernels import linear_cross_entropy
from lm.model.heads import CodePredictor
from lm.model.image_transformer import ImageTransformer, images_of, patches_of
from lm.objectives.images import ImageObjective
from lm.objectives.objective import Measure

CENTER = 128  # subtracted from pixels: small whole numbers, whose products float32 adds up exactly


class VisualTokenizer(nn.Module):
    """The codebook, which checkpoints keep: ``pixels`` is uint8 (codes, pixels of a patch)."""

    pixels: Tensor

    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self.register_buffer("pixels", pixels)

    def codes(self, images: Tensor, size: int) -> Tensor:
        """The code most like each patch, int64 (n, patches), of images (n, C, H, W) in [0, 1].

        The same as ``data_prep.shards.codebook`` finds for these pixels, up to rounding in patches of over 341 numbers.
        """
        with torch.autocast(images.device.type, enabled=False):
            patches = patches_of((images.float() * 255).round(), size) - CENTER
            codebook = self.pixels.float() - CENTER
            return (patches @ codebook.T - codebook.square().sum(1) / 2).argmax(2)

    def images(self, codes: Tensor, size: int, height: int, width: int) -> Tensor:
        """The images (n, C, height, width) in [0, 1] that codes (n, patches) stand for."""
        return images_of(self.pixels[codes].float() / 255, size, height, width)


class BEiT(ImageObjective):
    """All patches go through the trunk, the hidden ones as a mask vector; a linear head predicts their codes."""

    name, views = "beit", 1
    memory: VisualTokenizer

    @property
    def view_settings(self) -> ViewsConfig:
        """Crops and flips, without changes of color."""
        return without_color(self.config.views)

    @property
    def hidden(self) -> int:
        """Patches of an image that are hidden, at least one and not all."""
        patches = self.config.model.patches
        return min(max(1, round(patches * self.config.objective.patch_mask_rate)), patches - 1)

    def head(self) -> nn.Module:
        model = self.config.model
        return CodePredictor(model.hidden_size, self.config.objective.visual_codes, model.norm_epsilon)

    def begin(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.memory = VisualTokenizer(torch.from_numpy(codebook_of(self.config)).to(device))

    def after_step(self, model: nn.Module, step: int) -> None:
        """Refuse a run that begins without its codes, as one of several machines may."""
        if step == 0 and not self.memory.pixels.any():
            raise UserError(f'there is no visual tokenizer "{self.config.objective.visual_tokenizer}" here')

    def prepare(self, rows: ImageRows) -> ImageBatch:
        draws = draw_views(self.seed, rows.numbers, self.views, self.view_settings)
        batch = self.batch_of(rows.images, draws, 1 / len(rows.images))
        return dataclasses.replace(batch, kept=self._kept(self.seed, rows.numbers))

    def example(self, rows: int) -> ImageBatch:
        kept = torch.arange(self.config.model.patches - self.hidden).expand(rows, -1).contiguous()
        return dataclasses.replace(super().example(rows), kept=kept)

    def _kept(self, seed: int, numbers: NDArray[np.int64]) -> Tensor:
        """The patches of each image that stay visible, ascending: int64 (n, visible)."""
        side = self.config.model.image_size // self.config.model.patch_size
        hidden = hidden_blocks(key(seed, Stream.HIDDEN_PATCHES), numbers, side, self.hidden)
        return torch.from_numpy(np.nonzero(~hidden)[1].reshape(len(numbers), -1))

    def loss(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """The cross-entropy of the hidden patches' codes, in nats, averaged over each image's, weighted."""
        hidden, targets, states = self.predictions(model, batch)
        assert isinstance(model.head, CodePredictor)
        weights = (batch.loss_weights / self.hidden)[:, None].expand_as(targets)
        loss = linear_cross_entropy(
            states.flatten(0, 1),
            model.head.codes.weight,
            targets.masked_fill(~hidden, IGNORED).flatten(),
            loss_weights=weights.flatten(),
        )
        return {self.name: loss}

    def predictions(self, model: nn.Module, batch: ImageBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Which patches are hidden, bool (n, patches); the codes of all; the states (n, patches, width) that predict.

        The codes are those of the views themselves, so that crops have theirs.
        """
        assert isinstance(model, ImageTransformer)
        assert isinstance(model.head, CodePredictor)
        assert batch.kept is not None
        views, size = self.views_of(batch), model.config.patch_size
        targets = self.memory.codes(denormalized(views, self.form), size)
        hidden = torch.ones_like(targets, dtype=torch.bool).scatter(1, batch.kept, False)
        side = model.config.image_size // size
        layout = rows_of_images(len(views), side, side).to(views.device)
        return hidden, targets, model.head(model([views], layout, masked=(hidden, model.head.mask)))

    def judged(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """The loss of each image, and the share of its hidden patches whose code is predicted: float32 (n, 2)."""
        hidden, targets, states = self.predictions(model, batch)
        assert isinstance(model.head, CodePredictor)
        logits = (states @ model.head.codes.weight.T).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        both = torch.stack([losses, (logits.argmax(2) == targets).float()], dim=2)
        return (both * hidden[..., None]).sum(1) / self.hidden

    def measured(self, held_out: ImageValidation, numbers: NDArray[np.int64], measure: Measure) -> dict[str, float]:
        found = measure.vectors("judged", numbers, lambda some: self.whole(held_out.held_out.read(some), some))
        loss, accuracy = found.double().mean(0).tolist()
        return {"loss": loss, "code_accuracy": accuracy}

    def whole(self, images: NDArray[np.uint8], numbers: NDArray[np.int64]) -> ImageBatch:
        """A batch of held-out images as they are, with the same patches hidden in every validation."""
        whole = dataclasses.replace(self.view_settings, crop_area=1.0, crop_ratio=1.0, flip=0.0)
        made = self.batch_of(images, draw_views(0, numbers, self.views, whole), 1.0)
        return dataclasses.replace(made, kept=self._kept(0, numbers))

    def pictures(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """What there is to see of a batch: pictures by name, float32 (n, C, H, W) in [0, 1].

        ``codes`` is rebuilt from the codes of all patches, the most that the model can know; ``visible`` has the hidden
        patches in gray, and ``rebuilt`` has there the codes that the model finds most likely.
        """
        assert isinstance(model, ImageTransformer)
        assert isinstance(model.head, CodePredictor)
        hidden, targets, states = self.predictions(model, batch)
        views = self.views_of(batch)
        size, (height, width) = model.config.patch_size, views.shape[2:]
        predicted = (states @ model.head.codes.weight.T).argmax(2)
        original = denormalized(views, self.form)
        gray = normalized(torch.full_like(views, 0.5), self.form)
        covered = torch.where(hidden[..., None], patches_of(gray, size), patches_of(views, size))
        return {
            "original": original,
            "codes": self.memory.images(targets, size, height, width),
            "visible": denormalized(images_of(covered, size, height, width), self.form),
            "rebuilt": self.memory.images(torch.where(hidden, predicted, targets), size, height, width),
        }

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """All patches go through the trunk, the hidden ones through the head; each is compared with all codes."""
        assert isinstance(model, ImageTransformer)
        assert isinstance(model.head, CodePredictor)
        predicted = 6.0 * model.head.codes.weight.numel() * self.hidden / context_length
        compared = 2.0 * model.head.codes.out_features * model.config.image_channels * model.config.patch_size**2
        return model.flops_per_patch(context_length) + predicted + compared


open_objective = BEiT
