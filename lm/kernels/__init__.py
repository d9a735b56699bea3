"""The operations that take most of a model's time, in Triton or PyTorch; ``reference`` has their formulas."""

from lm.kernels.cross_entropy import linear_cross_entropy
from lm.kernels.dispatch import describe, eager_on_cpu
from lm.kernels.interval_attention import attention
from lm.kernels.matmul import linear
from lm.kernels.qkv_projection import qkv_projection
from lm.kernels.rms_norm import rms_norm
from lm.kernels.rotary import rotary
from lm.kernels.swiglu import swiglu

__all__ = [
    "attention",
    "describe",
    "eager_on_cpu",
    "linear",
    "linear_cross_entropy",
    "qkv_projection",
    "rms_norm",
    "rotary",
    "swiglu",
]
