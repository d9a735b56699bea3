"""The image datasets of a run, opened as one; as ``lm.data.corpora`` for text."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from data_prep.errors import UserError
from data_prep.shards.images import ImageDataset, ImageFormat, ImageSplit, open_images
from lm.config.settings import Config
from lm.data.corpora import Datasets


class ImageCorpora(Datasets[ImageDataset]):
    """Image datasets, each with a weight, of one size and number of channels; raises UserError if they differ.

    With several, pixels are normalized by the mean and standard deviation of the first.
    """

    def __init__(self, datasets: Sequence[ImageDataset], weights: Sequence[Fraction] = (Fraction(1),)) -> None:
        super().__init__(datasets, weights)
        first = datasets[0]
        self.format: ImageFormat = first.format
        for other in datasets[1:]:
            if other.format.shape != self.format.shape:
                raise UserError(
                    f"{other.directory} has images of {other.format.shape}, and {first.directory} of "
                    f"{self.format.shape}: prepare them with the same --size and --channels"
                )

    @property
    def processor(self) -> ImageFormat:
        """What makes model inputs of pictures."""
        return self.format

    def splits(self, name: str) -> list[ImageSplit]:
        """The split ``train`` or ``validation`` of each dataset."""
        return [dataset.split(name) for dataset in self.datasets]


def sized(config: Config, size: int, channels: int) -> Config:
    """The settings for images of this size; a patch is a token."""
    patches = (size // config.model.patch_size) ** 2
    return config.replace(
        image_size=size,
        image_channels=channels,
        context_length=patches,
        batch_tokens=patches * config.data.batch_images,
    )


def with_images(config: Config, corpora: ImageCorpora) -> Config:
    """Set what the data decides: size and channels of the images, and the tokens of a row and of a step.

    Raises:
        UserError: the settings ask for another size, or for patches that do not divide it.
    """
    form, model = corpora.format, config.model
    for name, asked, there in (
        ("image_size", model.image_size, form.size),
        ("image_channels", model.image_channels, form.channels),
    ):
        if asked not in (0, there):
            raise UserError(f"{name} is {asked}, but the images of {corpora.name} have {there}")
    if form.size % model.patch_size or form.size // model.patch_size < 2:
        fitting = [str(size) for size in range(1, form.size // 2 + 1) if form.size % size == 0]
        raise UserError(
            f"patch_size {model.patch_size} does not cut images of {form.size} pixels into patches: "
            f"choose one of {', '.join(fitting)}"
        )
    return sized(config, form.size, form.channels)


def open_image_corpora(paths: Sequence[str], weights: Sequence[Fraction]) -> ImageCorpora:
    """Open image datasets, reading sizes and headers only; errors as of ``open_images`` and ``ImageCorpora``."""
    return ImageCorpora([open_images(path) for path in paths], weights)
