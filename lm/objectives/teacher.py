"""Teachers: an exponential moving average of the weights in training (Tarvainen and Valpola 2017, "Mean teachers")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """A value that goes from ``first`` at step 0 to ``last`` at step ``steps`` along half a cosine."""
    return last - (last - first) * (math.cos(math.pi * min(step / steps, 1.0)) + 1) / 2


class Teacher(nn.Module):
    """What an objective with a teacher remembers.

    Attributes:
        model: the teacher, with the student's trunk, and as much of its head as it needs, by the same names.
        steps: how many steps it has followed, which checkpoints have as the tensor ``count``.
    """

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        super().__init__()
        device = next(student.parameters()).device
        self.model = model.requires_grad_(requires_grad=False).to(device).eval()  # it sees no dropout
        self.steps = 0
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.count: Tensor
        weights = dict(student.named_parameters())
        with torch.no_grad():
            for name, own in self.model.named_parameters():
                own.copy_(weights[name])

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """Move to ``momentum`` x the own weights + (1 - ``momentum``) x the student's."""
        weights = dict(student.named_parameters())
        own = dict(self.model.named_parameters())
        torch._foreach_mul_(list(own.values()), momentum)
        torch._foreach_add_(list(own.values()), [weights[name].detach() for name in own], alpha=1 - momentum)
        self.steps += 1
        self.count.fill_(self.steps)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of ``nn.Module``."""
        result = super().load_state_dict(state_dict, strict, assign)
        self.steps = int(self.count)
        return result
