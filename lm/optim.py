"""Optimizers and the schedule of their learning rate.

Muon (Jordan et al. 2024) moves the matrices inside the blocks: its update is the momentum with all singular values
brought near one. AdamW (Loshchilov and Hutter 2019) moves the rest. ``torch.optim.Muon`` computes in bfloat16, which
takes 30 times as long on a CPU that has none (docs/lab-notes.md); this one computes in float32 on a CPU, all matrices
of one shape together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lm.config import OptimizerConfig
from lm.distributed import Ranks

# The quintic of Jordan et al. 2024: its slope at zero is steep, so that five rounds lift small singular values to
# between about 0.7 and 1.2, which is near enough.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (from 0) as a share of its peak: linear up, level, linear down."""
    warmup, decay = config.warmup_fraction * steps, config.decay_fraction * steps
    rise = (step + 1) / warmup if warmup else 1.0
    floor = config.final_learning_rate_fraction
    fall = floor + (1 - floor) * (steps - step) / decay if decay else 1.0
    return min(1.0, rise, fall)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix (n, rows, columns) near 1, keeping its singular vectors."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum, orthogonalised; one stack for all matrices of a shape."""

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        momentum: float,
        weight_decay: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.momentum, self.weight_decay, self.ranks = momentum, weight_decay, ranks or Ranks()
        self.groups: dict[torch.Size, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named_parameters.items():
            self.groups.setdefault(parameter.shape, []).append((name, parameter))
        self.buffers = {
            shape: torch.stack([torch.zeros_like(parameter, requires_grad=False) for _, parameter in group])
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for shape, group in self.groups.items():
            gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for _, p in group])
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            looking_ahead = gradients.lerp_(buffer, self.momentum)  # Nesterov
            updates = self.ranks.map_matrices(orthogonalise, looking_ahead)
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (_, parameter), update in zip(group, updates, strict=True):
                parameter.mul_(1 - learning_rate * self.weight_decay).add_(update, alpha=-learning_rate * scale)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.momentum": self.buffers[shape][i]
            for shape, group in self.groups.items()
            for i, (name, _) in enumerate(group)
        }


class Optimizer:
    """Muon and AdamW together, each parameter in the one that suits it; weight decay on the blocks' matrices only."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self.parameters = dict(model.named_parameters())
        matrices = {n: p for n, p in self.parameters.items() if p.ndim == 2 and n.startswith("blocks.")}
        by_muon = matrices if config.optimizer == "muon" else {}
        self.muon = Muon(by_muon, config.momentum, config.weight_decay, self.ranks)
        decayed = [p for n, p in matrices.items() if n not in by_muon]
        plain = [p for n, p in self.parameters.items() if n not in matrices]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=(config.beta1, config.beta2), fused=True
        )

    def clip(self) -> Tensor:
        """Scale the whole gradient down to ``gradient_clip``; return its norm before."""
        limit = self.config.gradient_clip or float("inf")
        return self.ranks.whole(nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def step(self, factor: float) -> None:
        """Move the weights, at ``factor`` times the peak learning rates."""
        for group in self.adamw.param_groups:
            group["lr"] = factor * self.config.learning_rate
        self.adamw.step()
        self.muon.step(factor * self.config.muon_learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Every tensor to save, by name; views of the live state."""
        tensors = self.muon.state()
        for name, parameter in self.parameters.items():
            for part, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"{name}.{part}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, buffer in self.muon.state().items():
            buffer.copy_(self.ranks.cut(tensors[name], buffer))
        for name, parameter in self.parameters.items():
            if f"{name}.exp_avg" in tensors:
                self.adamw.state[parameter] = {
                    "step": tensors[f"{name}.step"].to(parameter.device),
                    **{
                        part: self.ranks.cut(tensors[f"{name}.{part}"], parameter) for part in ("exp_avg", "exp_avg_sq")
                    },
                }
