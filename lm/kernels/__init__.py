"""The few operations in which a model spends its time. ``reference`` has the plain PyTorch of each.

``paths`` chooses how they are computed: by Triton's kernels on a CUDA GPU, by PyTorch's operations elsewhere.
"""

from lm.kernels.cross_entropy import linear_cross_entropy
from lm.kernels.dispatch import describe, eager_on_cpu
from lm.kernels.interval_attention import attention
from lm.kernels.matmul import linear
from lm.kernels.qkv_projection import projections
from lm.kernels.rms_norm import rms_norm
from lm.kernels.rotary import rotary
from lm.kernels.swiglu import swiglu

__all__ = [
    "attention",
    "describe",
    "eager_on_cpu",
    "linear",
    "linear_cross_entropy",
    "projections",
    "rms_norm",
    "rotary",
    "swiglu",
]
