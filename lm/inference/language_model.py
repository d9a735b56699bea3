"""A model ready for use: its weights, its tokenizer and the settings it was trained with, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.data.batch import Batch
from lm.inference.low_precision import LowPrecisionTransformer
from lm.model.device import uses_bfloat16
from lm.model.transformer import Transformer


@dataclass(frozen=True)
class LanguageModel:
    """A trained model with everything that is needed to generate, fill masks, embed and score."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config

    @property
    def context_length(self) -> int:
        """The number of tokens that the model can read at once."""
        return self.config.data.context_length

    @property
    def readouts(self) -> tuple[str, ...]:
        """What the model was trained to predict: ``next_token``, ``masked_token``, ``masked_next_token``."""
        return self.config.readouts

    @property
    def masked_readout(self) -> str | None:
        """The readout that fills masks, or None if the model was trained without one."""
        return next((name for name in self.readouts if name != "next_token"), None)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @cached_property
    def writer(self) -> Transformer:
        """The model that generates: on a GPU with weights in bfloat16, if the run was trained with that precision."""
        if self.device.type == "cuda" and uses_bfloat16(self.device, self.config.training.precision):
            return LowPrecisionTransformer(self.model)
        return self.model

    def hidden_states(self, batch: Batch, layer: int = -1) -> Tensor:
        """Hidden states (rows, T, hidden) of a batch from any device, on the model's.

        ``layer`` 0 is the embeddings, n the output of block n; -1 is the last, normalized as the head sees it.
        """
        batch, model = batch.to(self.device), self.model
        if layer in (-1, len(model.blocks)):
            return model.read(batch)
        caught: list[Tensor] = []
        module = model.embedding if layer == 0 else model.blocks[layer - 1]
        hook = module.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            model.read(batch)
        finally:
            hook.remove()
        return caught[0]
