"""What is learned from several views of one thing, such as an image: a head, a loss, perhaps a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from lm.config.settings import Config
from lm.objectives.teacher import Teacher, cosine

LEAST_SPREAD, LEAST_RANK = 0.1, 1.5  # of features that have not collapsed
FEWEST_STEPS = 100  # before which nothing is called a collapse


class ViewMethod(ABC):
    """A loss that compares the views of a step, from the features that a trunk has of them.

    Attributes:
        name: the objective's, and that of its loss.
        with_teacher: a teacher looks at the first two views, and its vectors are the targets of ``compare``.
        local_views: how many smaller views only the student sees, besides the first two.
        memory: what is kept from step to step; None without a teacher.
        things, per_step: what there are views of, in words, and how many of them a step has.
    """

    name: ClassVar[str]
    with_teacher: ClassVar[bool] = False
    against_collapse: ClassVar[str]  # what to change after one
    local_views = 0
    memory: Teacher | None = None
    things: str
    per_step: int

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.objective

    @property
    def head_shape(self) -> tuple[int, int, int, float]:
        """Width of the features, inside the head and of its vectors, and the epsilon of its norm."""
        model, objective = self.config.model, self.settings
        return model.hidden_size, objective.projection_hidden_size, objective.projection_size, model.norm_epsilon

    @abstractmethod
    def head(self) -> nn.Module:
        """The student's head."""

    def teacher_head(self) -> nn.Module:
        """The teacher's head; each of its weights follows that of the student's by name."""
        return self.head()

    def new_memory(self, teacher: nn.Module, student: nn.Module) -> Teacher:
        """The memory of step 0; ``teacher`` is a model with ``teacher_head``, not initialized."""
        return Teacher(teacher, student)

    def vectors(self, head: nn.Module, features: Tensor) -> Tensor:
        """What is compared, float32 (n, views, size), of the student's features of each view, (views, n, hidden)."""
        found: Tensor = head(features)
        return found.float().transpose(0, 1)

    def targets(self, head: nn.Module, features: Tensor) -> Tensor:
        """The same of the teacher, float32 (n, 2, size), with its head and its features, (2, n, hidden)."""
        found: Tensor = head(features)
        return found.float().transpose(0, 1)

    @abstractmethod
    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The losses of a step, from the vectors and targets of all its rows."""

    def observe(self, targets: Tensor) -> None:
        """As of ``lm.objectives.objective.Comparing``."""
        return

    def measured(self, targets: Tensor) -> dict[str, float]:
        """What else a validation says, from the targets of held-out rows."""
        return {}

    def after_step(self, model: nn.Module, step: int) -> None:
        """The teacher follows with a momentum that rises to 1 along a cosine (Grill et al. 2020, BYOL)."""
        if self.memory is not None:
            momentum = cosine(self.settings.teacher_momentum, 1.0, step, self.config.training.steps)
            self.memory.follow(model, momentum)

    @property
    def slow_start(self) -> float:
        """Share of the steps in which what looks like a collapse may be the start."""
        return 0.1

    def collapse(self, found: dict[str, float]) -> str:
        """What shows in the numbers of a validation that the method has collapsed, in words; or ""."""
        if found["spread"] < LEAST_SPREAD:
            return f"all {self.things} have nearly the same features (spread {found['spread']:.3f})"
        if found["effective_rank"] < LEAST_RANK:
            return f"the features differ in one direction only (effective rank {found['effective_rank']:.2f})"
        return ""

    def warnings(self, rows: int) -> list[str]:
        """What experience says against these settings for data with ``rows`` rows, a sentence each."""
        return []
