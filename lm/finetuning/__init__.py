"""Learn a task from labeled examples."""

from lm.finetuning.answers import Answers
from lm.finetuning.finetune import Finetuned, Finetuning
from lm.finetuning.heads import TaskModel
from lm.finetuning.predict import Predictor, open_predictor
from lm.finetuning.task import Task

__all__ = ["Answers", "Finetuned", "Finetuning", "Predictor", "Task", "TaskModel", "open_predictor"]
