"""How good a model is: losses, minimal pairs, multiple choice and tasks, with baselines."""

from lm.evaluation.bootstrap import Accuracy
from lm.evaluation.minimal_pairs import evaluate_pairs, read_pairs
from lm.evaluation.multiple_choice import evaluate_choices
from lm.evaluation.perplexity import evaluate_text
from lm.evaluation.validation_loss import evaluate

__all__ = ["Accuracy", "evaluate", "evaluate_choices", "evaluate_pairs", "evaluate_text", "read_pairs"]
