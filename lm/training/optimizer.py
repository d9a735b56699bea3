"""The optimizers and their learning rate schedule.

Muon (Jordan et al. 2024) updates the matrices inside the blocks by their momentum, with all singular values brought
near one; with ``muon_beta2`` the rows of an update get about the same size (Li et al. 2025, NorMuon). AdamW (Loshchilov
and Hutter 2019) updates the rest. ``torch.optim.Muon`` computes in bfloat16, which takes 30 times as long on a CPU
without it (docs/lab-notes.md); this one computes in float32 on a CPU, all matrices of one shape together, with a third
of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lm.config.optimizer_settings import OptimizerConfig
from lm.training.distributed import Ranks

# The quintic of Jordan et al. 2024: its slope at zero is steep, so that five rounds bring small singular values to
# between about 0.7 and 1.2, which is close enough.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Singular values above this share of the norm end up between 0.58 and 1.42; above a tenth of it, 0.33 and 1.67.
LOWEST = 0.005
SMALL = 32  # matrices of this size and below are inverted by LAPACK


def halley(lowest: float) -> tuple[float, float, float]:
    """Return a, b, c for which x (a + b x²) / (1 + c x²) is closest to 1 over all x from ``lowest`` to 1.

    This is the dynamically weighted Halley step of Nakatsukasa, Bai and Gygi 2010, whose values range from the one at
    ``lowest`` to 1, scaled so that 1 is in the middle of the range.
    """
    d = (4 * (1 - lowest**2) / lowest**4) ** (1 / 3)
    a = (1 + d) ** 0.5 + 0.5 * (8 - 4 * d + 8 * (2 - lowest**2) / (lowest**2 * (1 + d) ** 0.5)) ** 0.5
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    middle = (1 + lowest * (a + b * lowest**2) / (1 + c * lowest**2)) / 2
    return a / middle, b / middle, c


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (from 0) as a share of its peak: linear warmup, constant, linear decay."""
    warmup, decay = config.warmup_fraction * steps, config.decay_fraction * steps
    rise = (step + 1) / warmup if warmup else 1.0
    final = config.final_learning_rate_fraction
    fall = final + (1 - final) * (steps - step) / decay if decay else 1.0
    return min(1.0, rise, fall)


def weight_decay_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The weight decay of step ``step`` (from 0) as a multiple of the first one: half a cosine (Caron et al. 2021)."""
    final = config.final_weight_decay
    return final - (final - 1) * (math.cos(math.pi * step / steps) + 1) / 2


def momentum_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Muon's momentum in step ``step`` (from 0): a linear rise from ``first_momentum`` to ``momentum``."""
    rising = config.momentum_warmup * steps
    if step >= rising:
        return config.momentum
    return config.first_momentum + (config.momentum - config.first_momentum) * step / rising


def shrinking(parameter: Tensor, update: Tensor) -> Tensor:
    """The weights whose absolute value falls when ``update`` is subtracted, and zero in place of the others.

    Cautious weight decay (Chen et al. 2025) applies to these only.
    """
    return parameter * (parameter * update > 0)


def unless(skip: Tensor | None, value: Tensor, instead: Tensor | float) -> Tensor:
    """``value``, or ``instead`` if the device has decided to ``skip`` the step (bool, a scalar; None: it does not)."""
    return value if skip is None else torch.where(skip, instead, value)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix (n, rows, columns) near 1, keeping its singular vectors.

    A CPU uses one inverse, other devices only products, which are fastest on a GPU. Values below about 1/200 of the
    largest (inverse) or 1/1000 (products) stay smaller, the more so the closer they are to zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = _by_inverse(x) if x.device.type == "cpu" else _by_products(x)
    return x.mT if tall else x


def _by_inverse(x: Tensor) -> Tensor:
    """One Halley step on wide matrices: (b/c + (a - b/c) (1 + c G)⁻¹) x, where G = x xᵀ.

    The norm of G is the largest squared singular value or slightly more, so x is scaled by it first.
    """
    a, b, c = halley(LOWEST)
    gram = x @ x.mT
    norm = gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-14)
    shifted = gram.mul_(c / norm)
    shifted.diagonal(dim1=1, dim2=2).add_(1)
    factor = inverse(shifted).mul_(a - b / c)
    factor.diagonal(dim1=1, dim2=2).add_(b / c)
    return factor.mul_(norm.rsqrt()) @ x


def inverse(matrices: Tensor) -> Tensor:
    """The inverse of each symmetric positive definite matrix (n, size, size), by blocks.

    LAPACK's own inverts one matrix after another, which takes twice as long at size 128, and its results depend on the
    number of threads.
    """
    size = matrices.shape[1]
    if size <= SMALL:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices).L)
    half = size // 2
    first, corner = inverse(matrices[:, :half, :half]), matrices[:, :half, half:]
    across = first @ corner
    last = inverse(torch.baddbmm(matrices[:, half:, half:], corner.mT, across, alpha=-1))  # of the Schur complement
    product = across @ last
    result = torch.empty_like(matrices)
    result[:, :half, :half] = torch.baddbmm(first, product, across.mT)
    result[:, :half, half:] = -product
    result[:, half:, :half] = -product.mT
    result[:, half:, half:] = last
    return result


def _by_products(x: Tensor) -> Tensor:
    """Five Newton-Schulz rounds on wide matrices, in bfloat16 on a CUDA GPU."""
    a, b, c = QUINTIC
    y = x.bfloat16() if x.is_cuda else x
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.to(x.dtype)


class Muon:
    """Orthogonalized momentum, computed for all matrices of a shape together.

    ``beta2`` and ``cautious`` are the settings ``muon_beta2`` and ``cautious_weight_decay``; the others are as for
    ``Optimizer``.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        momentum: float,
        weight_decay: float,
        ranks: Ranks | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        *,
        beta2: float = 0.0,
        cautious: bool = False,
    ) -> None:
        self.momentum, self.weight_decay, self.ranks = momentum, weight_decay, ranks or Ranks()
        self.beta2, self.cautious = beta2, cautious
        self.lr_multipliers = lr_multipliers or {}
        self.groups: dict[torch.Size, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named_parameters.items():
            self.groups.setdefault(parameter.shape, []).append((name, parameter))
        self.buffers = {
            shape: torch.stack([torch.zeros_like(parameter, requires_grad=False) for _, parameter in group])
            for shape, group in self.groups.items()
        }
        # One number a row, (matrices, rows, 1): so few that each rank holds them all.
        self.row_moments = {
            shape: torch.zeros(len(group), shape[0], 1, device=group[0][1].device)
            for shape, group in self.groups.items()
            if beta2
        }

    @torch.no_grad()
    def step(
        self, learning_rate: float, decay: float = 1.0, momentum: float | None = None, skip: Tensor | None = None
    ) -> None:
        """One update, with ``decay`` times the weight decay; None: the momentum of the settings.

        ``skip`` is as of ``Optimizer.step``.
        """
        momentum = self.momentum if momentum is None else momentum
        for shape, group in self.groups.items():
            gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for _, p in group])
            gradients = unless(skip, gradients, self.buffers[shape])  # the buffer does not move towards itself
            buffer = self.buffers[shape].lerp_(gradients, 1 - momentum)
            looking_ahead = gradients.lerp_(buffer, momentum)  # Nesterov
            updates = self.ranks.map_matrices(orthogonalize, looking_ahead)
            if self.beta2:
                updates = self._with_even_rows(updates, self.row_moments[shape], skip)
            updates = unless(skip, updates, 0.0)
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (name, parameter), update in zip(group, updates, strict=True):
                rate = learning_rate * self.lr_multipliers.get(name, 1.0)
                if self.cautious:
                    parameter.sub_(shrinking(parameter, update), alpha=rate * decay * self.weight_decay)
                    parameter.add_(update, alpha=-rate * scale)
                else:
                    kept: Tensor | float = 1 - rate * decay * self.weight_decay
                    if skip is not None:
                        kept = torch.where(skip, 1.0, kept)
                    parameter.mul_(kept).add_(update, alpha=-rate * scale)

    def _with_even_rows(self, updates: Tensor, moments: Tensor, skip: Tensor | None) -> Tensor:
        """Divide each row by the root of its moment, and keep the norm of each matrix.

        Matrices behind a projection that starts at zero have no gradient in the first step: their update stays zero.
        """
        squares = self.ranks.whole(updates.square().sum(2, keepdim=True))
        moments.lerp_(unless(skip, squares / updates.shape[2], moments), 1 - self.beta2)
        scale = moments.clamp(min=1e-12).rsqrt()
        before, after = squares.sum(1, keepdim=True), (squares * scale.square()).sum(1, keepdim=True)
        scale = scale * (before / after.clamp(min=1e-12)).sqrt()
        return updates * self.ranks.cut(scale, updates)

    def state(self) -> dict[str, Tensor]:
        kinds = {"momentum": self.buffers, "row_moment": self.row_moments}
        return {
            f"{name}.{kind}": stacks[shape][i]
            for kind, stacks in kinds.items()
            for shape in stacks
            for i, (name, _) in enumerate(self.groups[shape])
        }


class AdamW:
    """AdamW by the fused kernel that ``torch.optim.AdamW`` calls, whose class imports torch._dynamo: 2 s of each start.

    ``groups`` has the named parameters for each weight decay and learning-rate multiplier.
    """

    def __init__(
        self,
        groups: Mapping[tuple[float, float], list[tuple[str, nn.Parameter]]],
        beta1: float,
        beta2: float,
        *,
        cautious: bool = False,
    ) -> None:
        self.groups, self.beta1, self.beta2, self.cautious = groups, beta1, beta2, cautious
        self.moments: dict[str, dict[str, Tensor]] = {}  # of each parameter that has had a gradient

    @torch.no_grad()
    def step(self, learning_rate: float, decay: float = 1.0, skip: Tensor | None = None) -> None:
        """One update, with ``decay`` times the weight decay; ``skip`` is as of ``Optimizer.step``."""
        found_inf = None if skip is None else skip.float()  # if it is 1, the kernel writes nothing
        for (weight_decay, lr_multiplier), group in self.groups.items():
            named = [(name, parameter) for name, parameter in group if parameter.grad is not None]
            if not named:
                continue
            gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
            moments = [self._moments_of(name, parameter) for name, parameter in named]
            steps = [each["step"] for each in moments]
            torch._foreach_add_(steps, 1)
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))  # a single tensor would be read by the CPU
            rate, cautious = learning_rate * lr_multiplier, self.cautious and weight_decay > 0
            if cautious:  # the update has the sign of the mean gradient
                for (_, parameter), gradient, each in zip(named, gradients, moments, strict=True):
                    coming = each["exp_avg"].lerp(gradient, 1 - self.beta1)
                    decayed = unless(skip, shrinking(parameter, coming), 0.0)
                    parameter.sub_(decayed, alpha=rate * decay * weight_decay)
            torch._fused_adamw_(
                [parameter for _, parameter in named],
                gradients,
                [each["exp_avg"] for each in moments],
                [each["exp_avg_sq"] for each in moments],
                [],
                steps,
                lr=rate,
                beta1=self.beta1,
                beta2=self.beta2,
                weight_decay=0.0 if cautious else decay * weight_decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )

    def _moments_of(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        if name not in self.moments:
            first, second = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
            step = torch.zeros((), device=parameter.device)  # float32, as the kernel wants it
            self.moments[name] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return self.moments[name]

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{part}": value for name, parts in self.moments.items() for part, value in parts.items()}


class Optimizer:
    """Muon and AdamW together, for parameters that require a gradient.

    The matrices of blocks have ``weight_decay``, the token embedding and its head ``embedding_weight_decay``.
    ``lr_multipliers`` has learning-rate multipliers by parameter name; all others have 1.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        ranks: Ranks | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
    ) -> None:
        self.config, self.ranks, lr_multipliers = config, ranks or Ranks(), lr_multipliers or {}
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = {n: p for n, p in self.parameters.items() if p.ndim == 2 and "blocks" in n.split(".")}
        by_muon = matrices if config.optimizer == "muon" else {}
        cautious = config.cautious_weight_decay
        self.muon = Muon(
            by_muon,
            config.momentum,
            config.weight_decay,
            self.ranks,
            lr_multipliers,
            beta2=config.muon_beta2,
            cautious=cautious,
        )
        groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.parameters.items():
            if name not in by_muon:
                of_tokens = name in ("embedding.weight", "head.weight")
                decay = config.weight_decay if name in matrices else config.embedding_weight_decay * of_tokens
                groups.setdefault((decay, lr_multipliers.get(name, 1.0)), []).append((name, parameter))
        self.adamw = AdamW(groups, config.beta1, config.beta2, cautious=cautious)

    def clip(self) -> Tensor:
        """Clip the norm of the whole gradient to ``gradient_clip``; return the norm before clipping."""
        limit = self.config.gradient_clip or float("inf")
        return self.ranks.whole(nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def step(
        self, factor: float, decay: float = 1.0, momentum: float | None = None, skip: Tensor | None = None
    ) -> None:
        """Update the weights with ``factor`` times the peak learning rates and ``decay`` times the weight decay.

        ``momentum`` is Muon's in this step; None: that of the settings. If ``skip``, a bool on the device, is
        true, weights and state stay as they are, bit for bit; the CPU need not know it.
        """
        self.adamw.step(factor * self.config.learning_rate, decay, skip)
        self.muon.step(factor * self.config.muon_learning_rate, decay, momentum, skip)

    def state(self) -> dict[str, Tensor]:
        """Every tensor to save, by name, as views of the live state."""
        return self.muon.state() | self.adamw.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, buffer in self.muon.state().items():
            buffer.copy_(self.ranks.cut(tensors[name], buffer))
        for name, parameter in self.parameters.items():
            if f"{name}.exp_avg" in tensors:
                moments = {n: self.ranks.cut(tensors[f"{name}.{n}"], parameter) for n in ("exp_avg", "exp_avg_sq")}
                self.adamw.moments[name] = {"step": tensors[f"{name}.step"].to(parameter.device), **moments}
