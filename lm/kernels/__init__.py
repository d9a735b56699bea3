"""The few operations in which a model spends its time. ``reference`` has the plain PyTorch of each.

``paths`` chooses how they are computed: by Triton's kernels on a CUDA GPU, by PyTorch's operations elsewhere.
"""

from lm.kernels.cross_entropy import linear_cross_entropy
from lm.kernels.interval_attention import attention
from lm.kernels.paths import describe
from lm.kernels.rotary import rotary

__all__ = ["attention", "describe", "linear_cross_entropy", "rotary"]
