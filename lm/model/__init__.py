"""The transformer, and the device it computes on."""

from lm.model.device import autocast, choose_device
from lm.model.lora import add_lora, merge_lora
from lm.model.transformer import Block, RMSNorm, Transformer, Trunk

__all__ = ["Block", "RMSNorm", "Transformer", "Trunk", "add_lora", "autocast", "choose_device", "merge_lora"]
