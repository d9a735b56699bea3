"""A served run that reads images: one checkpoint, and what it makes of a picture."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.errors import UserError
from lm.config.shown import shown_values
from lm.data.image_files import Picture, Pixels, pixels_of_file
from lm.inference.attention_maps import attention_maps
from lm.inference.embedding import require_layer
from lm.inference.image_embedding import image_vectors
from lm.inference.image_model import ImageEncoder
from lm.inference.image_neighbors import ImageBank, image_bank
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, plain_settings
from lm.runs.run_data import DATA_HINT, held_out_pictures, training_pictures
from lm.serve.schema import Limits

BODY_BYTES = 16 << 20  # of a request with a picture
MOST_PIXELS = 64_000_000  # of a picture
MOST_NEIGHBORS = 50
MOST_IN_BANK, SECONDS_FOR_BANK = 2000, 5  # images that neighbors are sought in
SAMPLES = 6

Classify = Callable[[Pixels], dict[str, Any]]


@dataclass(frozen=True)
class ImageService:
    """One loaded checkpoint of a run that reads images.

    Attributes:
        encoder: the model, of a fine-tuned run its trunk.
        classify: a fine-tuned run's answer to the pixels of an image, as ``kindling predict`` writes it; None: there
            are no classes.
        bank: the images that neighbors are sought in; None if they are gone.
        bank_note: a sentence about them.
        samples: held-out images to begin with.
    """

    run: Run
    checkpoint: Checkpoint
    encoder: ImageEncoder
    limits: Limits
    classify: Classify | None = None
    bank: ImageBank | None = None
    bank_note: str = ""
    samples: Sequence[Picture] = field(default_factory=list)

    @classmethod
    def open(
        cls, run: Run, checkpoint: Checkpoint, encoder: ImageEncoder, limits: Limits, classify: Classify | None = None
    ) -> ImageService:
        """Compute the features of the images that neighbors are sought in, for a few seconds."""
        start = time.monotonic()
        try:
            pictures, count = training_pictures(run, MOST_IN_BANK)
            bank = image_bank(encoder.model, encoder.form, pictures, SECONDS_FOR_BANK)
        except UserError as error:
            reason = str(error).removesuffix(DATA_HINT)  # there is no such option here
            note = f"There are no neighbors, because the training images cannot be read: {reason}."
            return cls(run, checkpoint, encoder, limits, classify, None, note)
        among = f"{len(bank.pictures):,}"
        if count is not None:
            among = f"{among} of the {count:,}" if count > len(bank.pictures) else f"all {among}"
        took = f"whose features took {time.monotonic() - start:.1f} seconds at the start"
        note = f"Neighbors are sought among {among} training images, {took}."
        return cls(run, checkpoint, encoder, limits, classify, bank, note, held_out_pictures(run, SAMPLES))

    @property
    def name(self) -> str:
        """The name of the model: that of the run's folder."""
        return self.run.path.resolve().name

    @property
    def places(self) -> int:
        """The largest number of pictures that can be looked at or wait."""
        return 1 + self.limits.waiting

    def make_writer(self) -> None:
        """Nothing generates text."""

    def embed(self, image: bytes, layer: int, *, normalize: bool) -> Iterator[list[float]]:
        """Return one result, the feature of the picture in an image file, for ``Engine.compute``."""
        require_layer(self.encoder.config.model, layer)

        def vector() -> list[float]:
            model, pixels = self.encoder.model, self._pixels(image)
            found = image_vectors(model, self.encoder.form, [np.stack([pixels])], layer, normalize=normalize)
            return [float(each) for each in found[0]]

        return (vector() for _ in range(1))  # a generator, because the engine's thread computes it

    def look(self, image: bytes, neighbors: int) -> Iterator[dict[str, Any]]:
        """Return one result, what the model makes of the picture in an image file, for ``Engine.compute``."""
        return (self._look(self._pixels(image), neighbors) for _ in range(1))

    def _pixels(self, image: bytes) -> Pixels:
        return pixels_of_file(image, self.encoder.form, MOST_PIXELS)

    def _look(self, pixels: Pixels, neighbors: int) -> dict[str, Any]:
        model, form = self.encoder.model, self.encoder.form
        (vector,) = image_vectors(model, form, [np.stack([pixels])])
        (maps,) = attention_maps(model, form, np.stack([pixels]))
        found = self.bank.nearest(vector, neighbors) if self.bank else []
        return {
            "pixels": png(pixels),
            "attention": [[[float(share) for share in row] for row in head] for head in maps],
            "neighbors": [{**_shown(picture), "cosine": cosine} for picture, cosine in found],
            "prediction": self.classify(pixels) if self.classify else None,
        }

    def about(self) -> dict[str, Any]:
        """The body of ``/api/run``: the model, its limits and its settings."""
        config = self.run.config
        return {
            "name": self.name,
            "reads": "images",
            "description": self.encoder.model.describe(),
            "parameters": self.encoder.model.parameter_counts(),
            "step": self.checkpoint.step,
            "objective": config.objective.objective,
            "task": config.finetune.task if config.has_task_head else None,
            "image_size": self.encoder.form.size,
            "channels": self.encoder.form.channels,
            "patch_size": config.model.patch_size,
            "neighbors": {"images": len(self.bank.pictures) if self.bank else 0, "note": self.bank_note},
            "samples": [_shown(picture) for picture in self.samples],
            "limits": {"waiting": self.limits.waiting, "body_bytes": self.limits.body_bytes, "pixels": MOST_PIXELS},
            "settings": plain_settings(config),
            "sections": shown_values(config),
        }


def _shown(picture: Picture) -> dict[str, Any]:
    return {"name": picture.name, "class": picture.label, "image": png(picture.pixels)}


def png(pixels: Pixels) -> str:
    """Pixels, uint8 (height, width, 1 or 3), as a PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
