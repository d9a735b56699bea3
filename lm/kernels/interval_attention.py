"""Attention over key intervals: the public function and its custom operators, which ``torch.compile`` calls whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import attention_torch, dispatch, reference


def attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees one contiguous range of keys, ``lo <= key < hi``.

    The result is correct for any intervals. The work is proportional to the visible pairs if neither bound decreases
    along a row, as in all masks of ``lm.kernels.masks``. Outputs and gradients are deterministic, bit for bit.

    Args:
        q: (B, Tq, H, D), D at most 256, float32, bfloat16 or float16 (or float64, which Triton does not compute on a
            GPU). Under autocast q, k and v are cast to its dtype, but on a CPU that multiplies bfloat16 k and v to q's,
            since attention gains nothing by it there.
        k, v: (B, Tk, Hkv, D), H a multiple of Hkv (grouped-query attention, Ainslie et al. 2023).
        lo, hi: int32 (B, Tq), clamped to [0, Tk].
        scale: factor of the scores, above 0; None: 1 / sqrt(D).
        softcap: limit scores to (-softcap, softcap) by tanh; 0: off.

    Returns:
        The output (B, Tq, H, D), zeros for a query that sees nothing, and the natural log-sum-exp of the scores
        (B, H, Tq), -inf for such a query, in float32 (float64 for float64 inputs), without gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = q.dtype if dispatch.eager_on_cpu(q) else dispatch.product_dtype(q)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, lo, hi, scale, softcap)
    if dispatch.reference_requested():
        return reference.attention(q, k, v, lo, hi, scale=scale, softcap=softcap)
    forward = _Direct.apply if dispatch.eager_on_cpu(q) and dispatch.has_data(q) else _forward
    return forward(q, k, v, lo, hi, scale, float(softcap))


def _check(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, Tq, H, D) and (B, Tk, Hkv, D)"
        )
    if q.shape[2] % max(k.shape[2], 1):
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads")
    if not 1 <= q.shape[3] <= 256:
        raise ValueError(f"the head dimension is {q.shape[3]}: it must be between 1 and 256")
    if lo.shape != q.shape[:2] or hi.shape != q.shape[:2]:
        raise ValueError(f"lo {tuple(lo.shape)} and hi {tuple(hi.shape)} must be {tuple(q.shape[:2])}, (B, Tq)")
    if lo.dtype != torch.int32 or hi.dtype != torch.int32:
        raise ValueError(f"lo is {lo.dtype} and hi {hi.dtype}: they must be int32")
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have the same floating-point dtype"
        )
    if any(x.device != q.device for x in (k, v, lo, hi)):
        raise ValueError("q, k, v, lo and hi must be on one device")
    if scale <= 0 or softcap < 0:
        raise ValueError(f"scale {scale} must be above 0, and softcap {softcap} at least 0")


@torch.library.custom_op("kindling::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    if dispatch.choose(q) == "triton":
        from lm.kernels import attention_triton, decoding_triton

        forward = decoding_triton.forward if decoding_triton.serves(q, k) else attention_triton.forward
    else:
        forward = attention_torch.forward
    with torch.autocast(q.device.type, enabled=False):  # the dtype has been chosen; sums stay in float32
        return forward(q, k, v, lo, hi, scale, softcap)


@_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, queries, heads, _ = q.shape
    lse = q.new_empty(rows, heads, queries, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("kindling::attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor, hi: Tensor,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if dispatch.choose(q) == "triton":
        from lm.kernels.attention_triton import backward
    else:
        backward = attention_torch.backward
    return backward(grad_out, q, k, v, out, lse, lo, hi, scale, softcap)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lo, hi, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi)
    ctx.mark_non_differentiable(output[1])


def _differentiate(
    ctx: Any, grad_out: Tensor, _: Tensor | None, backward: Any = _backward
) -> tuple[Tensor | None, ...]:
    return *backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.softcap), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which at 768 tokens takes as long as the attention itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = attention_torch.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad_out, None, attention_torch.backward)
