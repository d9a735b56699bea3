"""The few operations in which a model spends its time. ``reference`` has the plain PyTorch of each."""

from lm.kernels.attention import AttentionPlan, attend, plan
from lm.kernels.cross_entropy import linear_cross_entropy

__all__ = ["AttentionPlan", "attend", "linear_cross_entropy", "plan"]
