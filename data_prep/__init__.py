"""Raw text to token shards: sources → tokenizer → shards. Knows nothing of ``lm``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.pipeline.build import build
    from data_prep.shards.tokens import open_dataset

__all__ = ["build", "open_dataset"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that ``import data_prep.errors`` and --help stay fast.
    if name == "build":
        from data_prep.pipeline.build import build

        return build
    if name == "open_dataset":
        from data_prep.shards.tokens import open_dataset

        return open_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
