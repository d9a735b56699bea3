"""Attention over key intervals, by the cheapest of PyTorch's own paths that gives the same result.

The intervals of a batch are looked at once (``plan``) and the answer serves every layer (``attend``): no mask at all
when every query sees every key, the built-in causal flag when all rows are plainly causal, a boolean mask otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lm import masks


@dataclass(frozen=True)
class AttentionPlan:
    """What one batch's intervals ask for: ``visible`` is bool (rows, 1, queries, keys) when ``kind`` is "mask".

    ``seeing``, (rows, queries, 1, 1), is only there when some query sees nothing; its output is zeroed.
    """

    kind: Literal["causal", "full", "mask"]
    visible: Tensor | None = None
    seeing: Tensor | None = None


def plan(lo: Tensor, hi: Tensor, keys: int) -> AttentionPlan:
    """Decide how to attend with the intervals ``lo``, ``hi`` (rows, queries) over ``keys`` keys."""
    rows, queries = lo.shape
    if not lo.any():
        if (hi == keys).all():
            return AttentionPlan("full")
        if queries == keys and torch.equal(hi, masks.causal(rows, queries, device=hi.device)[1]):
            return AttentionPlan("causal")
    visible = masks.dense(lo, hi, keys)
    seeing = lo < hi
    if seeing.all():
        return AttentionPlan("mask", visible[:, None])
    # Let blind queries look everywhere, so that the softmax stays finite, and zero what they saw.
    return AttentionPlan("mask", (visible | ~seeing[..., None])[:, None], seeing[..., None, None])


def attend(q: Tensor, k: Tensor, v: Tensor, how: AttentionPlan) -> Tensor:
    """Softmax attention in which each query sees one contiguous run of keys.

    Args:
        q: (rows, Tq, H, D). k, v: (rows, Tk, Hkv, D); H is a multiple of Hkv (grouped-query attention).
        how: the plan of the intervals.

    Returns:
        (rows, Tq, H, D), zeros for a query that sees nothing.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=how.visible,
        is_causal=how.kind == "causal",
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return out if how.seeing is None else torch.where(how.seeing, out, 0.0)
