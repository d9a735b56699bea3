"""What training and validation read of a run's data, be it text or images."""

from __future__ import annotations

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.batch import Vocabulary
from lm.data.corpora import Corpora
from lm.data.image_corpora import ImageCorpora
from lm.data.images import HeldOutImages, ImageValidation, TrainingImages
from lm.data.rows import TrainingRows, ValidationRows, vocabulary_of


def training_inputs(corpora: Corpora | ImageCorpora) -> Vocabulary | ImageFormat:
    """What an objective needs to know of the data."""
    return corpora.format if isinstance(corpora, ImageCorpora) else vocabulary_of(corpora)


def stand_in(config: Config) -> Vocabulary | ImageFormat:
    """What an objective needs to know of a model's inputs, as far as the settings tell, for a plan without data."""
    if not config.reads_images:
        return Vocabulary(config.model.vocab_size, 0, 1, infill=(1, 1, 1))
    channels = config.model.image_channels
    return ImageFormat(config.model.image_size, channels, (0.5,) * channels, (0.25,) * channels)


def training_rows(corpora: Corpora | ImageCorpora, config: Config) -> TrainingRows | TrainingImages:
    """The rows, or the images, of each step."""
    return TrainingImages(corpora, config) if isinstance(corpora, ImageCorpora) else TrainingRows(corpora, config)


def validation_rows(corpora: Corpora | ImageCorpora, config: Config) -> ValidationRows | ImageValidation | None:
    """What a validation reads; None if the data has no validation split."""
    if isinstance(corpora, ImageCorpora):
        images = ImageValidation(*(HeldOutImages(corpora, name) for name in ("validation", "train")))
        return images if images.count else None
    split = corpora.split("validation")
    return ValidationRows(split, config.data.context_length) if split.tokens else None
