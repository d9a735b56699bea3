"""Ask a model: continue, fill, embed, score."""
