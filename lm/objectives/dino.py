"""DINO (Caron et al. 2021): agree with a teacher, which sees only large crops, on which prototypes a view is like."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.batch import Vocabulary
from lm.model.heads import PrototypeHead
from lm.objectives.image_views import ImageViews
from lm.objectives.open_views import open_views
from lm.objectives.teacher import Teacher
from lm.objectives.text_views import TextViews
from lm.objectives.view_method import ViewMethod


class Centered(Teacher):
    """A teacher, and the ``center`` (prototypes,), the moving average of its outputs."""

    def __init__(self, model: nn.Module, student: nn.Module, prototypes: int) -> None:
        super().__init__(model, student)
        self.register_buffer("center", torch.zeros(prototypes, device=next(student.parameters()).device))
        self.center: Tensor


def sinkhorn(scores: Tensor, iterations: int = 3) -> Tensor:
    """Soft assignments (n, prototypes) of n views to prototypes, each row with the sum 1, all prototypes used alike.

    ``scores`` (n, prototypes) are divided by their temperature already (Caron et al. 2020, SwAV, appendix A; Ruan et
    al. 2023, as in DINOv2). The last iteration leaves the rows exact and the columns close to n / prototypes.
    """
    shares = torch.softmax(scores.flatten(), 0).view_as(scores)
    rows, columns = scores.shape
    for _ in range(iterations):
        shares = shares / shares.sum(0, keepdim=True).clamp(min=1e-30) / columns
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30) / rows
    return shares * rows


class DINO(ViewMethod):
    """Cross-entropy of the student's distribution over prototypes, for each view but the teacher's own."""

    name, with_teacher = "dino", True
    against_collapse = (
        "a lower teacher_temperature, a third of learning_rate and muon_learning_rate, or more prototypes"
    )
    _seen: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.local_views = config.objective.local_views

    def head(self) -> nn.Module:
        width, hidden, bottleneck, epsilon = self.head_shape
        return PrototypeHead(width, hidden, bottleneck, self.settings.prototypes, epsilon)

    def new_memory(self, teacher: nn.Module, student: nn.Module) -> Teacher:
        return Centered(teacher, student, self.settings.prototypes)

    @property
    def _share_done(self) -> float:
        """Share of the run's steps that the teacher has followed."""
        assert self.memory is not None
        return self.memory.steps / self.config.training.steps

    @property
    def temperature(self) -> float:
        """The teacher's, which rises linearly from its first value."""
        settings = self.settings
        risen = min(1.0, self._share_done / settings.teacher_warmup) if settings.teacher_warmup else 1.0
        first = settings.first_teacher_temperature
        return first + (settings.teacher_temperature - first) * risen

    @property
    def frozen(self) -> bool:
        """Whether the prototypes do not change yet."""
        return self._share_done < self.settings.prototypes_frozen

    def vectors(self, head: nn.Module, features: Tensor) -> Tensor:
        scores: Tensor = head(features, frozen=self.frozen)
        return scores.transpose(0, 1)

    def assignments(self, scores: Tensor, center: Tensor) -> Tensor:
        """The teacher's distribution over prototypes for each of its ``scores``, (n, views, prototypes)."""
        if self.centering == "sinkhorn":
            return sinkhorn(scores.flatten(0, 1) / self.temperature).view_as(scores)
        return torch.softmax((scores - center.to(scores.device)) / self.temperature, dim=2)

    @property
    def centering(self) -> str:
        """ "mean" or "sinkhorn"."""
        chosen = self.settings.centering
        return {"dino": "mean", "dinov2": "sinkhorn"}[self.name] if chosen == "auto" else chosen

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The mean over all pairs of a teacher's view and another view (equation 3)."""
        assert targets is not None
        assert isinstance(self.memory, Centered)
        student = F.log_softmax(vectors / self.settings.student_temperature, dim=2)
        costs = -torch.einsum("ntk,nvk->tv", self.assignments(targets, self.memory.center), student) / len(vectors)
        own = torch.eye(*costs.shape, dtype=torch.bool, device=costs.device)
        return {self.name: costs.masked_fill(own, 0.0).sum() / (costs.numel() - len(costs))}

    def observe(self, targets: Tensor) -> None:
        self._seen = targets.mean((0, 1))

    def after_step(self, model: nn.Module, step: int) -> None:
        super().after_step(model, step)
        assert isinstance(self.memory, Centered)
        seen = self._seen.to(self.memory.center.device)
        self.memory.center.lerp_(seen, 1 - self.settings.center_momentum)

    @property
    def slow_start(self) -> float:
        """DINO's teacher is close to uniform for a long time at first."""
        return max(0.2, self.settings.teacher_warmup)

    def collapse(self, found: dict[str, float]) -> str:
        entropy, most = found["teacher_entropy"], math.log(self.settings.prototypes)
        if entropy > 0.99 * most:
            return f"the teacher finds all prototypes alike (its entropy is {entropy:.3f} of {most:.3f})"
        if entropy < 0.01 * most:
            return f"the teacher has the same prototype for everything (its entropy is {entropy:.3f})"
        return super().collapse(found)

    def measured(self, targets: Tensor) -> dict[str, float]:
        """The mean entropy of the teacher's distributions in nats: 0, or ln of the prototypes, after a collapse."""
        assert isinstance(self.memory, Centered)
        shares = self.assignments(targets, self.memory.center)
        return {"teacher_entropy": float(-torch.xlogy(shares, shares).sum(2).mean())}


def open_objective(config: Config, inputs: ImageFormat | Vocabulary) -> ImageViews | TextViews:
    return open_views(config, inputs, DINO(config))
