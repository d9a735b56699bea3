"""Raw text to token shards: sources → tokenizer → shards. Knows nothing of ``lm``."""
