"""Pretrain a small model of your own and use it: ``lm.load``, ``lm.train``, ``lm.finetune``, ``lm.evaluate``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.api import Config, Run, Sampling, UserError, evaluate, finetune, load, train

__version__ = "0.1.0"
__all__ = ["Config", "Run", "Sampling", "UserError", "evaluate", "finetune", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import PyTorch and the rest when a name is first used: ``import lm`` takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
