"""What is learned: an objective turns rows into a batch, and a batch into named losses."""

from lm.objectives.batches import TrainingBatches
from lm.objectives.contrastive import info_nce
from lm.objectives.objective import Objective, open_objective
from lm.objectives.text import TextObjective

__all__ = ["Objective", "TextObjective", "TrainingBatches", "info_nce", "open_objective"]
