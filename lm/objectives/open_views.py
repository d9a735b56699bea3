"""The objective by which a method that compares views learns from images, or from text."""

from __future__ import annotations

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.batch import Vocabulary
from lm.objectives.image_views import ImageViews
from lm.objectives.text_views import TextViews
from lm.objectives.view_method import ViewMethod


def open_views(config: Config, inputs: ImageFormat | Vocabulary, method: ViewMethod) -> ImageViews | TextViews:
    """Images or texts, as ``inputs`` says."""
    if isinstance(inputs, Vocabulary):
        return TextViews(config, inputs, method)
    return ImageViews(config, inputs, method)
