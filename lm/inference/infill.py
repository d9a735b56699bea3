"""Write what fits into a gap of a text, with a model that was trained to fill in the middle (Bavarian et al. 2022)."""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import GAP, problem_of_infill
from lm.config.settings import Config
from lm.inference.batch_generation import Prompt
from lm.inference.sampling import Sampling


def infill_prompt(tokenizer: Tokenizer, config: Config, text: str, sampling: Sampling) -> Prompt:
    """What to continue for the ``[GAP]`` of a text: what is before it and after it, then the beginning of the middle.

    If words include the space before them, so does what is written, and the text before the gap ends without one.

    Raises:
        UserError: the model was not trained with fill_in_the_middle, the text does not have one gap, or it is too long.
    """
    if "fill_in_the_middle" not in config.objective.shares:
        raise UserError(
            f"this model was trained with {config.objective.objective}, not to fill gaps: train it with --objective "
            "next_token:0.5,fill_in_the_middle:0.5"
        )
    if problem := problem_of_infill(text):
        raise UserError(problem)
    before, after = text.split(GAP)
    before = before.removesuffix(" ") if tokenizer.words_have_spaces else before
    assert tokenizer.infill_ids is not None  # or it could not have been trained
    prefix, suffix, middle = tokenizer.infill_ids
    tokens = tokenizer.begun([prefix, *tokenizer.encode(before), suffix, *tokenizer.encode(after), middle])
    if len(tokens) >= (most := config.data.context_length):
        raise UserError(f"the text around the gap has {len(tokens)} tokens; this model reads fewer than {most} at once")
    return Prompt(before, sampling, tokens=tokens, suffix=after)
