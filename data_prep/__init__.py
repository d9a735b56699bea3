"""Raw text to token shards, images to image shards. Knows nothing of ``lm``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.pipeline.build import build
    from data_prep.pipeline.images import build_images
    from data_prep.pipeline.visual_tokens import build_visual_tokens
    from data_prep.shards.images import open_images
    from data_prep.shards.tokens import open_dataset

__all__ = ["build", "build_images", "build_visual_tokens", "open_dataset", "open_images"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that ``import data_prep.errors`` and --help stay fast.
    modules = {
        "build": "data_prep.pipeline.build",
        "build_images": "data_prep.pipeline.images",
        "build_visual_tokens": "data_prep.pipeline.visual_tokens",
        "open_dataset": "data_prep.shards.tokens",
        "open_images": "data_prep.shards.images",
    }
    if name in modules:
        return getattr(import_module(modules[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
