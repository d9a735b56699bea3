"""Each kernel in plain PyTorch, as its formula reads: slow, for any dtype, the reference for all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.kernels import masks


def attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention over key intervals; arguments and result as in ``lm.kernels.attention``."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = masks.dense(lo, hi, k.shape[1])[:, None]
    seeing = visible.any(-1, keepdim=True)
    # Queries that see nothing are computed as if they saw everything, then zeroed: no NaN, forward or backward.
    scores = scores.masked_fill(~visible & seeing, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1) * seeing, v)
    lse = torch.where(seeing[..., 0], scores.logsumexp(-1), float("-inf")).detach()
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    loss_weights: Tensor | None = None, softcap: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Weighted sum of cross-entropies, over all logits at once; arguments as in ``lm.kernels.linear_cross_entropy``."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    kept = targets >= 0
    losses = lse - logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0] + z_loss * lse**2
    losses = torch.where(kept, losses, 0.0)
    return (losses if loss_weights is None else losses * loss_weights).sum()


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated feed-forward; arguments as in ``lm.kernels.swiglu``."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, epsilon: float = 0.0) -> Tensor:
    """Normalize each head (with a ``weight``) and rotate it by its position; arguments as in ``lm.kernels.rotary``."""
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def few_rows_product(
    x: Tensor, weight: Tensor, norm: Tensor | None, epsilon: float, activation: str, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A product with what a decoding step has around it; arguments and result as in ``lm.kernels.few_rows_product``."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    wide = x.to(precise)
    inverse = 1.0 if norm is None else (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    factor = x if norm is None else wide * norm.to(precise)
    out = factor.to(weight.dtype).to(precise) @ weight.to(precise).T * inverse
    if activation == "swiglu":
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    elif activation == "relu2":
        out = F.relu(out).square()
    return out.to(dtype) if residual is None else residual.add_(out)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, hi: Tensor, cache: Tensor,
    norms: tuple[Tensor, Tensor] | None, epsilon: float,
) -> Tensor:  # fmt: skip
    """Rotary positions and a write to the cache; arguments and result as in ``lm.kernels.rotate_and_store``."""
    kv_heads, capacity = cache.shape[2:4]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q, k = (rotary(x, cos, sin, norm, epsilon) for x, norm in zip((q, k), norms or (None, None), strict=True))
    rows, slots = torch.arange(len(qkv), device=qkv.device), positions.long() % capacity
    before = cache[:, rows, :, slots]  # (rows, 2, Hkv, D)
    cache[:, rows, :, slots] = torch.where((hi > 0)[:, None, None, None], torch.stack((k, v), dim=1), before)
    return q
