"""The output head and its loss fused: cross-entropy over the vocabulary that never holds all the logits.

Tokens are processed in chunks. The forward pass computes the logits, the loss and both gradients of a chunk, then
discards the logits, so memory grows with ``chunk × vocabulary`` instead of ``tokens × vocabulary``. No product is
computed twice: the forward pass does the work of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm.kernels import dispatch, reference
from lm.kernels.matmul import matmul

# The most tokens and logits in a chunk. Each chunk reads all of the head's weight and writes all of its gradient, so
# the products need many rows: at 2^21 logits (64 tokens, with a vocabulary of 32,768) the head takes up to twice as
# long on a CPU as at 8 million (244 tokens, 32 MB, the largest block that glibc keeps for the next chunk). A GPU needs
# thousands of rows (2^27 bfloat16 are 256 MiB: 2,700 tokens with a vocabulary of 50,000). Where 1/128 of its memory
# holds more, it takes more, up to four times as many, to read and write the weight's gradient less often.
CHUNK_TOKENS = {"cpu": 1024, "gpu": 16384}
CHUNK_LOGITS = {"cpu": 8_000_000, "gpu": 1 << 27}
# Between the products, PyTorch's operations process a chunk block by block: 2^20 float32 stay in a CPU's caches from
# one operation to the next.
BLOCK_LOGITS = {"cpu": 1 << 20, "gpu": 1 << 25}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    loss_weights: Tensor | None = None, softcap: float = 0.0, z_loss: float = 0.0, predicted: int | None = None,
) -> Tensor:  # fmt: skip
    """Weighted sum of the cross-entropies, in nats, of ``softcap(hidden @ weight.T)`` against the targets.

    Args:
        hidden: (N, D), any floating dtype; float32 is cast to the dtype of ``torch.autocast`` where that is on.
        weight: (V, D), of the same dtype or float32, in which its gradient is summed; a CPU rounds what each chunk of
            bfloat16 adds.
        targets: int64 (N,), -100 (or any negative number) where nothing is predicted.
        loss_weights: (N,), one weight per target; None: all 1. They carry no gradient.
        softcap: limit logits to (-softcap, softcap) by tanh; 0: off.
        z_loss: weight of the squared log-sum-exp, added to each loss (Chowdhery et al. 2022, PaLM, section 5); 0: off.
        predicted: how many targets are not negative; None: they are counted, for which the CPU waits for a GPU.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable once with respect to ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or (on a CPU) a target is not in the vocabulary. On a GPU
            a target outside the vocabulary makes the loss NaN.
    """
    direct = dispatch.eager_on_cpu(hidden) and dispatch.has_data(hidden)
    if hidden.dtype == torch.float32:
        hidden = hidden.to(dispatch.product_dtype(hidden))
    _check(hidden, weight, targets, loss_weights)
    if dispatch.reference_requested():
        return reference.linear_cross_entropy(
            hidden, weight.to(hidden.dtype), targets, loss_weights=loss_weights, softcap=softcap, z_loss=z_loss
        )
    enabled = torch.is_grad_enabled()
    needs_grad = (enabled and hidden.requires_grad, enabled and weight.requires_grad)
    operator = _Direct.apply if direct else _operator
    return operator(hidden, weight, targets, loss_weights, float(softcap), float(z_loss), *needs_grad, predicted)[0]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    if not hidden.dtype.is_floating_point or weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: "
            "weight must have the same floating-point dtype as hidden, or float32"
        )
    for name, given in (("targets", targets), ("loss_weights", loss_weights)):
        if given is not None and given.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {tuple(given.shape)} must be {tuple(hidden.shape[:1])}, (N,)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}: they must be int64")
    if any(x is not None and x.device != hidden.device for x in (weight, targets, loss_weights)):
        raise ValueError("hidden, weight, targets and loss_weights must be on one device")


def compute(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None, softcap: float, z_loss: float,
    hidden_needs_grad: bool, weight_needs_grad: bool, predicted: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, its gradients with respect to hidden (N, D) and weight (V, D), and a scalar to multiply both by.

    A gradient that is not needed is empty. The scalar is the largest loss weight: gradients are kept relative to it, so
    that none underflows in float16.
    """
    backend = dispatch.choose(hidden)
    precise = torch.promote_types(hidden.dtype, torch.float32)
    # All but recent CPUs multiply 16-bit numbers 5 to 80 times as slowly as float32.
    slow = hidden.device.type == "cpu" and not _has_native_products(hidden)
    factors = precise if backend == "torch" and slow else hidden.dtype
    total = torch.zeros((), dtype=precise, device=hidden.device)
    grad_hidden = hidden.new_zeros(hidden.shape if hidden_needs_grad else (0,))
    transposed: Tensor | None = None  # the weight's gradient, (D, V)
    # Tokens without a target cost nothing: a masked batch predicts only some of its tokens.
    there = targets >= 0
    kept = (there.nonzero() if predicted is None else torch.nonzero_static(there, size=predicted))[:, 0]
    if not len(kept):
        nothing = torch.zeros(weight.shape if weight_needs_grad else (0,), dtype=precise, device=weight.device)
        return total, grad_hidden, nothing, total.clone()
    if loss_weights is None:
        loss_weights = torch.ones(len(targets), dtype=precise, device=hidden.device)
    loss_weights = loss_weights.to(precise)
    heaviest = loss_weights[kept].abs().max().clamp(min=torch.finfo(precise).tiny)
    needs_grad = hidden_needs_grad or weight_needs_grad
    if backend == "triton":
        from lm.kernels.cross_entropy_triton import differentiate
    else:
        differentiate = _differentiate_by_torch
    rows = tokens_at_once(hidden.device, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes have been chosen above
        weight = weight.to(factors)
        for part in kept.split(rows):
            inputs, shares = hidden[part].to(factors), loss_weights[part] / heaviest
            logits = matmul(inputs, weight.T)
            losses, grad, row_factors = differentiate(logits, targets[part], shares, softcap, z_loss, needs_grad)
            total += losses @ loss_weights[part]
            if hidden_needs_grad:
                grad_inputs = matmul(grad, weight)
                if row_factors is not None:
                    grad_inputs.mul_(row_factors)
                grad_hidden[part] = grad_inputs.to(grad_hidden.dtype)
            if weight_needs_grad:
                inputs = inputs if row_factors is None else inputs.mul_(row_factors)
                transposed = _add_product(transposed, inputs, grad, precise)
            del logits, grad  # so that two chunks are never held at a time
    grad_weight = weight.new_empty(0, dtype=precise) if transposed is None else transposed.T.contiguous()
    return total, grad_hidden, grad_weight, heaviest


_operator = torch.library.custom_op("kindling::linear_cross_entropy", compute, mutates_args=())


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None, softcap: float, z_loss: float,
    hidden_needs_grad: bool, weight_needs_grad: bool, predicted: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=precise),
        hidden.new_empty(hidden.shape if hidden_needs_grad else (0,)),
        weight.new_empty(weight.shape if weight_needs_grad else (0,), dtype=precise),
        hidden.new_empty((), dtype=precise),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, weight, *_, ctx.hidden_needs_grad, ctx.weight_needs_grad, _ = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or every backward pass would allocate zeros as large as the head


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy can be differentiated only once: do not set create_graph=True")
    grad_hidden, grad_weight, heaviest = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 9
    factor = grad_loss * heaviest
    return (
        (grad_hidden * factor).to(grad_hidden.dtype) if ctx.hidden_needs_grad else None,
        (grad_weight * factor).to(ctx.weight_dtype) if ctx.weight_needs_grad else None,
        *(None,) * 7,
    )


_operator.register_autograd(_differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which with a small vocabulary takes longer than the loss itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = compute(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """The most tokens in a chunk, always the same on one device, since the order of the sums depends on it."""
    kind = _kind(device)
    logits = CHUNK_LOGITS[kind]
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
        logits = min(max(logits, memory // 256), 4 * logits)
    return min(CHUNK_TOKENS[kind], max(1, logits // vocabulary))


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "gpu"


def _differentiate_by_torch(
    logits: Tensor, targets: Tensor, shares: Tensor, softcap: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses (n,) of a chunk of logits (n, V), and two factors of the logits' gradient, (n, V) and (n, 1) or None.

    The gradient of each row is multiplied by its ``shares`` (n,). The first factor overwrites the logits.
    """
    if logits.device.type == "cpu" and int(targets.max()) >= logits.shape[1]:
        raise ValueError(f"target {int(targets.max())} is not in the vocabulary of {logits.shape[1]}")
    rows = max(1, BLOCK_LOGITS[_kind(logits.device)] // logits.shape[1])
    losses, sums = torch.empty((2, len(logits), 1), dtype=shares.dtype, device=logits.device)
    narrow = logits.dtype != shares.dtype
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        block = logits[part].to(shares.dtype)
        losses[part], sums[part] = _block_by_torch(block, targets[part, None], softcap, z_loss, needs_grad)
        if needs_grad and narrow:
            # In 16 bits the sums of a large vocabulary could overflow.
            logits[part] = block.mul_(shares[part, None] / sums[part])
    return losses[:, 0], logits, None if narrow else shares[:, None] / sums


def _block_by_torch(
    logits: Tensor, targets: Tensor, softcap: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of logits (n, V), which are overwritten by their gradient times the second result, (n, 1).

    With as few passes over the logits as possible: factors per row are applied elsewhere.
    """
    slope = None
    if softcap:
        # c tanh(x / c) = c (2 s - 1) with s = sigmoid(2 x / c), and its slope is 4 (s - s²): PyTorch's sigmoid takes a
        # quarter of the time of its tanh.
        sigmoid = logits.mul_(2 / softcap).sigmoid_()
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1) if needs_grad else None
        logits = sigmoid.mul_(2 * softcap).sub_(softcap)
    top = logits.amax(1, keepdim=True)
    at_target = logits.gather(1, targets)
    exponentials = logits.sub_(top).exp_()
    sums = exponentials.sum(1, keepdim=True)
    log_sums = sums.log()
    lse = top + log_sums
    # Added in this order, the logarithm does not lose its digits to a large maximum.
    losses = (top - at_target) + log_sums + z_loss * lse**2
    if not needs_grad:
        return losses, sums
    # d loss / d logits = exponentials / sums · (1 + 2 z lse) − onehot; here multiplied by sums
    if z_loss:
        exponentials.mul_(1 + 2 * z_loss * lse)
    exponentials.scatter_add_(1, targets, -sums)
    if slope is None:
        return losses, sums
    exponentials.mul_(slope)
    return losses, sums / 4


def _has_native_products(x: Tensor) -> bool:
    """Whether x holds bfloat16 on a CPU that has instructions for it."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and dispatch.multiplies_bfloat16()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a.T @ b``, (D, V) of (n, D) and (n, V), summed in ``dtype``; a total of None counts as 0."""
    if _has_native_products(a):  # into bfloat16
        product = matmul(a.T.contiguous(), b)
        return product.to(dtype) if total is None else total.add_(product)
    if not a.is_cuda or a.dtype == dtype:
        return matmul(a.T.to(dtype).contiguous(), b.to(dtype), addend=total)
    if total is None:
        total = torch.zeros(a.shape[1], b.shape[1], dtype=dtype, device=a.device)
    # The tensor cores multiply in 16 bits and add in 32, directly into the total.
    return torch.addmm(total, a.T, b, out_dtype=dtype, out=total)
