"""The datasets of a run, be they text or images, opened without PyTorch, so that mistakes are reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.shards.images import holds_images
from lm.config.settings import Config
from lm.data.corpora import Corpora, check_entries, open_corpora, with_vocabulary
from lm.data.image_corpora import ImageCorpora, open_image_corpora, with_images
from lm.data.visual_codes import with_codes

if TYPE_CHECKING:
    from data_prep.shards.remote import Access


def open_training_data(data: Sequence[str], access: Access | None = None) -> Corpora | ImageCorpora:
    """Open the datasets of the setting ``data``, reading sizes and headers only; ``access`` as of ``open_corpora``.

    Raises:
        UserError: no dataset is named, one is missing or incomplete, or they do not belong together.
    """
    if not any(data):
        return open_corpora(data, access)  # which explains it
    paths, weights = check_entries(data)
    of_images = [holds_images(path) for path in paths]
    if all(of_images):
        return open_image_corpora(paths, weights)
    if any(of_images):
        text, images = paths[of_images.index(False)], paths[of_images.index(True)]
        raise UserError(f"{images} has images, and {text} has text: a run learns from one kind")
    return open_corpora(data, access)


def settled(config: Config, corpora: Corpora | ImageCorpora, before: Config | None = None) -> Config:
    """The settings with what the data decides: the vocabulary, or the size of the images and the number of codes.

    ``before``: the settings of the run as it was begun, if it is resumed.

    Raises:
        UserError: settings and data do not fit together.
    """
    if config.reads_images != isinstance(corpora, ImageCorpora):
        there, asked = ("text", "images") if config.reads_images else ("images", "text")
        hint = "set patch_size, or start from a recipe such as images-simclr" if there == "images" else "choose others"
        raise UserError(f"{corpora.name} holds {there}, and these settings are for {asked}: {hint}")
    if isinstance(corpora, ImageCorpora):
        return with_codes(with_images(config, corpora), before)
    return with_vocabulary(config, corpora)
