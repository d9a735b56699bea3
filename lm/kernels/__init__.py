"""The operations that take most of a model's time, in Triton or PyTorch; ``reference`` has their formulas."""

from lm.kernels.cross_entropy import linear_cross_entropy
from lm.kernels.decoding_step import few_rows_product, rotate_and_store
from lm.kernels.dispatch import describe, eager_on_cpu, has_data
from lm.kernels.interval_attention import attention
from lm.kernels.matmul import linear
from lm.kernels.qkv_projection import qkv_projection
from lm.kernels.rms_norm import rms_norm
from lm.kernels.rotary import rotary
from lm.kernels.sublayers import attention_sublayer, feed_forward_sublayer
from lm.kernels.swiglu import swiglu

__all__ = [
    "attention",
    "attention_sublayer",
    "describe",
    "eager_on_cpu",
    "feed_forward_sublayer",
    "few_rows_product",
    "has_data",
    "linear",
    "linear_cross_entropy",
    "qkv_projection",
    "rms_norm",
    "rotary",
    "rotate_and_store",
    "swiglu",
]
