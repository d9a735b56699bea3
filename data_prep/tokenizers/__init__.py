"""Text to ids: train, load and run tokenizers."""
