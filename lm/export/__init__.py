"""Into and out of other programs: transformers and GGUF."""
