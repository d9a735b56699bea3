"""The weights of another run that a run starts from, and which of them fine-tuning updates.

They are kept in the run directory (``base.safetensors``), so you can move or delete the other run.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors

from data_prep.errors import UserError
from data_prep.files import rename, sync_directory
from lm.config.settings import Config
from lm.data.keyed_random import Stream, key
from lm.model.image_transformer import ImageTransformer, Model
from lm.model.lora import add_lora
from lm.model.transformer import Transformer
from lm.runs import checkpoint

BASE = "base.safetensors"


def kept_base(path: Path) -> Path | None:
    """The weights that the run in ``path`` started from; None if it has no checkpoint yet."""
    return path / BASE if checkpoint.steps(path / "checkpoints") and (path / BASE).is_file() else None


def keep_base(weights: Path, path: Path) -> None:
    """Link or copy the file ``weights``, which never changes, into the run directory ``path``; OSError if it fails."""
    final, temporary = path / BASE, path / f"{BASE}.tmp"
    if weights == final:
        return
    temporary.unlink(missing_ok=True)
    try:
        os.link(weights, temporary)
    except OSError:  # another disk, or one without links
        shutil.copyfile(weights, temporary)
    rename(temporary, final)
    sync_directory(path)


def load_base(model: Model, path: Path) -> None:
    """Load the weights that the run in ``path`` started from; UserError if they are unreadable or do not fit.

    The head of another objective on images, or on views, is left out: the model's own stays as it is.
    """
    try:
        weights, own = checkpoint.load_tensors(path / BASE), model.state_dict()
        head = "head." if isinstance(model, ImageTransformer) else "projector."
        trained = {name: weight.shape for name, weight in weights.items() if name.startswith(head)}
        if trained != {name: weight.shape for name, weight in own.items() if name.startswith(head)}:
            weights = {name: weight for name, weight in weights.items() if name not in trained}
            weights |= {name: weight for name, weight in own.items() if name.startswith(head)}
        model.load_state_dict(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path / BASE} cannot be read: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{path / BASE} does not fit config.toml: {error}".split("\n")[0]) from None


def starting_trunk(config: Config, path: Path) -> Any:
    """The model that fine-tuning in ``path`` starts from; only what is trained requires a gradient.

    It is a ``Transformer``, or an ``ImageTransformer`` without a head.

    UserError as of ``load_base``.
    """
    task, seed = config.finetune, config.training.seed
    # A probe's features are fixed, so dropout applies only in the head.
    shape = dataclasses.replace(config.model, dropout=0.0) if task.method == "probe" else config.model
    trunk: Model = ImageTransformer(shape) if config.reads_images else Transformer(shape)
    if task.weights == "random":
        trunk.initialize(seed)
    else:
        load_base(trunk, path)
    if task.method == "lora":
        add_lora(trunk, task.lora_rank, task.lora_alpha, task.lora_matrices, key(seed, Stream.LORA) >> 1)
    return trunk.requires_grad_(False) if task.method == "probe" else trunk
