"""The training loop, its optimizer, and what guards it."""

from lm.training.distributed import Ranks
from lm.training.optimizer import Optimizer
from lm.training.plan import plan_run
from lm.training.pretraining import Pretraining, train
from lm.training.reporter import NullReporter, Reporter
from lm.training.train_module import TrainModule
from lm.training.trainer import fit

__all__ = ["NullReporter", "Optimizer", "Pretraining", "Ranks", "Reporter", "TrainModule", "fit", "plan_run", "train"]
