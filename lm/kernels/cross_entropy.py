"""The output head and its loss in one: cross-entropy over the vocabulary that never holds all the logits.

The tokens are taken in chunks. For each, the logits, the loss and both gradients are computed in the forward pass and
the logits are forgotten, so that memory grows with ``chunk × vocabulary`` instead of ``tokens × vocabulary``. It costs
no extra products: the forward pass does what the backward pass would have done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm.kernels import paths, reference

# Logits held at once. On a CPU 2^21 float32 are 8 MiB, which stay in its caches, and the products are still large; a
# GPU wants thousands of rows a product (2^27 bfloat16 are 256 MiB: 2,700 rows of a vocabulary of 50,000).
CHUNK_LOGITS_CPU = 1 << 21
CHUNK_LOGITS_GPU = 1 << 27
# Below this a float32 probability may have lost digits, so the loss is not taken from its logarithm.
SMALLEST_PROBABILITY = 1e-30


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
        hidden: (N, D). weight: (V, D), of the same floating dtype. Under autocast both are taken in its dtype.
        targets: int64 (N,), -100 (or any negative number) where there is nothing to predict.
        loss_weights: (N,), one number a target; None: all 1. They carry no gradient.
        softcap: squash logits into (-softcap, softcap) by tanh; 0: off.
        z_loss: weight of the squared log-sum-exp, added to each loss (Chowdhery et al. 2022, PaLM, section 5); 0: off.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable once by ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not (N, D) and (V, D)")
    if not hidden.dtype.is_floating_point or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: they must be of one floating dtype")
    for name, given in (("targets", targets), ("loss_weights", loss_weights)):
        if given is not None and given.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {tuple(given.shape)} is not {tuple(hidden.shape[:1])}, (N,)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}: they must be int64")
    if paths.reference_is_asked_for():
        return reference.linear_cross_entropy(
            hidden, weight, targets, loss_weights=loss_weights, softcap=softcap, z_loss=z_loss
        )
    asked = torch.is_grad_enabled()
    needs = (asked and hidden.requires_grad, asked and weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):  # what is summed in float32 stays there
        return _operator(hidden, weight, targets, loss_weights, float(softcap), float(z_loss), *needs)[0]


def compute(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None, softcap: float, z_loss: float,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, its gradients by hidden and weight (empty where not needed), and a scalar to multiply both by.

    The scalar is the largest loss weight: the gradients are kept relative to it, so that none vanishes in float16.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=precise, device=hidden.device)
    grad_hidden = hidden.new_zeros(hidden.shape if hidden_needs_grad else (0,))
    grad_weight = torch.zeros(weight.shape if weight_needs_grad else (0,), dtype=precise, device=weight.device)
    if loss_weights is None:
        loss_weights = torch.ones(len(targets), dtype=precise, device=hidden.device)
    # Rows without a target cost nothing: a masked batch predicts only a fifth of its tokens.
    kept = (targets >= 0).nonzero()[:, 0]
    if not len(kept):
        return total, grad_hidden, grad_weight, total.clone()
    loss_weights = loss_weights.to(precise)
    heaviest = loss_weights[kept].abs().max().clamp(min=torch.finfo(precise).tiny)
    needs_grad = hidden_needs_grad or weight_needs_grad
    differentiate = _chunk_by_triton if paths.choose(hidden) == "triton" else _chunk_by_torch
    most = CHUNK_LOGITS_GPU if hidden.is_cuda else CHUNK_LOGITS_CPU
    for part in kept.split(max(1, most // weight.shape[0])):
        rows, shares = hidden[part], loss_weights[part] / heaviest
        losses, grad = differentiate(rows @ weight.T, targets[part], shares, softcap, z_loss, needs_grad)
        total += losses @ loss_weights[part]
        if hidden_needs_grad:
            grad_hidden[part] = grad.to(weight.dtype) @ weight
        if weight_needs_grad:
            _add_product(grad_weight, grad.T, rows)
    return total, grad_hidden, grad_weight, heaviest


_operator = torch.library.custom_op("kindling::linear_cross_entropy", compute, mutates_args=())


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None, softcap: float, z_loss: float,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=precise),
        hidden.new_empty(hidden.shape if hidden_needs_grad else (0,)),
        weight.new_empty(weight.shape if weight_needs_grad else (0,), dtype=precise),
        hidden.new_empty((), dtype=precise),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, weight, *_, ctx.hidden_needs_grad, ctx.weight_needs_grad = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight, heaviest = ctx.saved_tensors
    factor = grad_loss * heaviest
    by_hidden = (grad_hidden * factor).to(grad_hidden.dtype) if ctx.hidden_needs_grad else None
    by_weight = (grad_weight * factor).to(ctx.weight_dtype) if ctx.weight_needs_grad else None
    return by_hidden, by_weight, None, None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def _chunk_by_torch(
    logits: Tensor, targets: Tensor, shares: Tensor, softcap: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of a chunk of logits (n, V), and shares (n,) × their gradient by the logits (n, V).

    Consumes the logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if int(targets.max()) >= logits.shape[1]:
        raise ValueError(f"target {int(targets.max())} is not in a vocabulary of {logits.shape[1]}")
    slope = None
    if softcap:
        squashed = logits.div_(softcap).tanh_()
        slope = 1 - squashed**2 if needs_grad else None
        logits = squashed.mul_(softcap)
    at_target = logits.gather(1, targets[:, None])[:, 0]
    if not needs_grad:
        lse = logits.logsumexp(1)
        return lse - at_target + z_loss * lse**2, logits
    probabilities = logits.softmax(1)
    likelihood = probabilities.gather(1, targets[:, None])[:, 0]
    losses = -likelihood.log()
    faint = (likelihood < SMALLEST_PROBABILITY).nonzero()[:, 0]
    if len(faint):
        losses[faint] = logits[faint].logsumexp(1) - at_target[faint]
    # d loss / d logits = softmax · (1 + 2 z lse) − onehot
    if z_loss:
        lse = losses + at_target
        losses = losses + z_loss * lse**2
        probabilities.mul_(1 + 2 * z_loss * lse[:, None])
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    if slope is not None:
        probabilities.mul_(slope)
    # Mostly all tokens weigh the same: then a pass over the widest tensor there is can be left out.
    return losses, probabilities if (shares == 1).all() else probabilities.mul_(shares[:, None])


def _chunk_by_triton(
    logits: Tensor, targets: Tensor, shares: Tensor, softcap: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """As ``_chunk_by_torch``; the gradient takes the place of the logits, in their dtype."""
    from lm.kernels import cross_entropy_triton

    return cross_entropy_triton.differentiate(logits, targets, shares, softcap, z_loss, needs_grad), logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in the dtype of ``total`` whatever the factors' is."""
    if a.is_cuda and b.dtype != total.dtype:
        # The tensor cores multiply in 16 bits and add in 32, straight into the total.
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
