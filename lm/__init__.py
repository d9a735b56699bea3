"""The language model: configuration, the transformer, its objectives, training, generation and evaluation."""

__version__ = "0.1.0"
