"""The visual tokenizer whose codes the objective ``beit`` predicts, read without PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.shards.codebook import load_codebook
from lm.config.settings import Config


def with_codes(config: Config, before: Config | None = None) -> Config:
    """Set ``visual_codes`` to those of the visual tokenizer, if the objective needs one.

    ``before`` is the run as it was begun: its checkpoints have the codebook, so the tokenizer may be gone.

    Raises:
        UserError: there is no tokenizer, or one for other patches, or with another number of codes than was set.
    """
    if config.objective.objective != "beit":
        return config
    name, asked, model = config.objective.visual_tokenizer, config.objective.visual_codes, config.model
    if not name:
        raise UserError(
            "beit predicts the codes of a visual tokenizer: name one with --visual-tokenizer "
            f"({command('prep visual-tokens')} makes one)"
        )
    if before is not None and before.objective.visual_tokenizer == name and not Path(name).exists():
        return config.replace(visual_codes=before.objective.visual_codes)
    book = load_codebook(name)
    if (book.size, book.channels) != (model.patch_size, model.image_channels):
        raise UserError(
            f'the visual tokenizer "{name}" is for patches of {book.size} pixels and {book.channels} channels, and the '
            f"model has patches of {model.patch_size} pixels and {model.image_channels} channels: build another one, "
            "or set patch_size"
        )
    if asked not in (0, book.codes):
        raise UserError(f'visual_codes is {asked}, but the visual tokenizer "{name}" has {book.codes}')
    return config.replace(visual_codes=book.codes)


def codebook_of(config: Config) -> NDArray[np.uint8]:
    """The pixels of each code, (codes, C · size · size), cut as the model's patches are.

    Zeros where the tokenizer is not there, or another one is by now: then a checkpoint has them, or it is for a plan.
    """
    model, objective = config.model, config.objective
    nothing = np.zeros((objective.visual_codes, model.image_channels * model.patch_size**2), dtype=np.uint8)
    try:
        pixels = load_codebook(objective.visual_tokenizer).pixels.transpose(0, 3, 1, 2)
    except UserError:
        return nothing
    found = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    return found if found.shape == nothing.shape else nothing
