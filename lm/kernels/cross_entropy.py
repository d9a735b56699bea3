"""The output head and its loss in one: cross-entropy over the vocabulary that never holds all the logits.

The tokens are taken in chunks; for each, the logits, the loss and both gradients are computed in the forward pass and
the logits are forgotten, so that memory grows with ``chunk × vocabulary`` instead of ``tokens × vocabulary``. It costs
no extra products: the forward pass does what the backward pass would have done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at once: 2^22 float32 are 16 MiB, which stays in a CPU's cache hierarchy and keeps the products large.
CHUNK_LOGITS = 1 << 22


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        softcap: float,
        z_loss: float,
        needs_grad: bool,
    ) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if needs_grad else None
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.T).to(accumulate)
            slope = None
            if softcap:
                squashed = torch.tanh(logits / softcap)
                slope, logits = 1 - squashed**2, softcap * squashed
            lse = logits.logsumexp(-1)
            picked = targets[part, None]
            total += ((lse - logits.gather(-1, picked)[:, 0] + z_loss * lse**2) * loss_weights[part]).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = w · (softmax · (1 + 2 z lse) − onehot)
            grad = logits.sub_(lse[:, None]).exp_()
            if z_loss:
                grad.mul_(1 + 2 * z_loss * lse[:, None])
            grad.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=accumulate))
            grad.mul_(loss_weights[part, None])
            if slope is not None:
                grad.mul_(slope)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            grad_weight.addmm_(grad.T.to(accumulate), hidden[part].to(accumulate))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            (grad_weight * scale).to(ctx.weight_dtype),
            *(None,) * 5,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_weights: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Weighted sum of the cross-entropies of ``softcap(hidden @ weight.T)`` against the targets.

    Args:
        hidden: (N, D). weight: (V, D), of the same dtype.
        targets: int64 (N,), -100 (or any negative number) where there is nothing to predict.
        loss_weights: (N,), one number a target; None: all 1. They carry no gradient.
        softcap: squash logits into (-softcap, softcap) by tanh; 0: off.
        z_loss: weight of the squared log-sum-exp, added to each loss (Chowdhery et al. 2022, PaLM, section 5); 0: off.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable once by ``hidden`` and ``weight``.
    """
    kept = targets >= 0
    if loss_weights is None:
        loss_weights = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    if not kept.all():
        # Rows without a target cost nothing: a masked batch predicts only a fifth of its tokens.
        chosen = kept.nonzero()[:, 0]
        hidden, targets, loss_weights = hidden[chosen], targets[chosen], loss_weights[chosen]
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, loss_weights, float(softcap), float(z_loss), needs_grad)
