"""The weights of another run that a run begins with, and what of them a fine-tuning moves.

They are kept in the run directory (``base.safetensors``), so that it stands alone, whatever becomes of the run that
they are from.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import safetensors
from safetensors.torch import load_file

from data_prep.errors import UserError
from data_prep.files import sync_directory
from lm.config.settings import Config
from lm.data import keyed_random
from lm.data.keyed_random import Stream
from lm.model.lora import add_lora
from lm.model.transformer import Transformer
from lm.runs import checkpoint

BASE = "base.safetensors"


def kept_base(path: Path) -> Path | None:
    """The weights that the run in ``path`` began with; None if it has not made a step yet that is saved."""
    return path / BASE if checkpoint.steps(path / "checkpoints") and (path / BASE).is_file() else None


def keep_base(weights: Path, path: Path) -> None:
    """Have the file ``weights``, which never changes, in the run directory ``path`` too: as a link where that can be.

    Raises:
        OSError: it could not be copied.
    """
    final, beside = path / BASE, path / f"{BASE}.tmp"
    if weights == final:
        return
    beside.unlink(missing_ok=True)
    try:
        os.link(weights, beside)
    except OSError:  # another disk, or one without links
        shutil.copyfile(weights, beside)
    beside.rename(final)
    sync_directory(path)


def load_base(model: Transformer, path: Path) -> None:
    """Give ``model`` the weights that the run directory ``path`` begins with; UserError if that cannot be."""
    try:
        model.load_state_dict(load_file(path / BASE))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path / BASE} cannot be read: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{path / BASE} does not fit config.toml: {error}".split("\n")[0]) from None


def starting_trunk(config: Config, path: Path) -> Transformer:
    """The model that the fine-tuning in the run directory ``path`` begins with; what learns requires a gradient.

    Raises:
        UserError: the weights are not there, or do not fit.
    """
    task, seed = config.finetune, config.training.seed
    # A probe has the features as they are; dropout is then the head's alone.
    trunk = Transformer(dataclasses.replace(config.model, dropout=0.0) if task.method == "probe" else config.model)
    if task.weights == "random":
        trunk.initialise(seed)
    else:
        load_base(trunk, path)
    if task.method == "lora":
        add_lora(trunk, task.lora_rank, task.lora_alpha, task.lora_matrices, keyed_random.key(seed, Stream.LORA) >> 1)
    return trunk.requires_grad_(False) if task.method == "probe" else trunk
