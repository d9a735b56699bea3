"""Use a model: continue texts, fill masks, embed, score."""

from lm.inference.batch_generation import Prompt, continuations
from lm.inference.embedding import Reading, all_vectors, reading_of
from lm.inference.fill_mask import fill_masks
from lm.inference.generator import Generator, stream
from lm.inference.infill import infill_prompt
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods

__all__ = [
    "Generator",
    "LanguageModel",
    "Prompt",
    "Reading",
    "all_vectors",
    "continuations",
    "fill_masks",
    "infill_prompt",
    "log_likelihoods",
    "reading_of",
    "stream",
]
