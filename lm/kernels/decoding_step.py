"""What a decoding step on a GPU does between the calls of attention, in few launches: some rows, one token each.

A step reads every weight once and computes little, so its time is that of its launches. The face of two kernels: a
product with the norm before it and the activation or sum after it, and rotary positions with the write to the cache.
The bits of a row depend neither on the other rows nor on their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.kernels import dispatch, reference


def few_rows_product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    activation: str = "",
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(rms_norm(x) @ weight.T) + residual``, without gradient.

    The factors have the dtype of ``weight``; the norm's sums, those of the product, and all after it have 32 bits at
    least.

    Args:
        x: (rows, K), float, contiguous in its last dimension.
        weight: (M, K), contiguous; for "swiglu" the rows of the gate before those of up.
        norm: weight (K,) of an RMSNorm of x; None: no norm. ``epsilon`` is added to the mean square.
        activation: "", "relu2" or "swiglu".
        residual: (rows, M), contiguous, to which the result is added in place.
        dtype: of the result; None: that of ``weight``, or of ``residual``.

    Returns:
        (rows, M), of "swiglu" (rows, M / 2): ``residual``, if it is given.
    """
    arguments = x, weight, norm, epsilon, activation, residual, dtype or weight.dtype
    if dispatch.choose(x) != "triton":
        return reference.few_rows_product(*arguments)
    from lm.kernels import decoding_step_triton

    return decoding_step_triton.product(*arguments)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    hi: Tensor,
    cache: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """Rotate queries and keys (``lm.kernels.rotary``), and store keys and values, of one token of each row.

    Args:
        qkv: (rows, H + 2 Hkv, D), contiguous: queries, keys and values.
        cos, sin: float32 (rows, 1, D / 2), of the angles of the positions.
        positions: int32 (rows,); the slot in the cache is the position modulo its capacity.
        hi: int32 (rows,), how many slots are filled then; nothing of a row with 0 is stored.
        cache: (2, at least rows, Hkv, capacity, D), keys before values, contiguous in its last two dimensions.
        norms: the weights (D,) of QK-norm for queries and keys, applied first; None: no norm.

    Returns:
        The queries (rows, H, D) in the dtype of ``qkv``.
    """
    arguments = qkv, cos, sin, positions, hi, cache, norms, epsilon
    if dispatch.choose(qkv) != "triton":
        return reference.rotate_and_store(*arguments)
    from lm.kernels import decoding_step_triton

    return decoding_step_triton.rotate_and_store(*arguments)
