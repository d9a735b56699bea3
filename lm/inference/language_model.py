"""A model that can be asked: its weights, its tokenizer, and the settings it was trained with, as one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.model.transformer import Transformer


@dataclass(frozen=True)
class LanguageModel:
    """What every way of asking a model takes."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config

    @property
    def context_length(self) -> int:
        """Tokens that the model reads at once."""
        return self.config.data.context_length

    @property
    def readouts(self) -> tuple[str, ...]:
        """What it can be asked for: ``next_token``, ``masked_token``, ``masked_next_token``."""
        return self.config.readouts

    @property
    def masked_readout(self) -> str | None:
        """The readout that fills masks, if it was trained with one."""
        return self.readouts[-1] if self.readouts[-1] != "next_token" else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
