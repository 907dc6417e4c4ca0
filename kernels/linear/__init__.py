"""Products of activations with weight matrices."""

from rwkvx_kernels.linear.api import linear, low_rank
from rwkvx_kernels.linear.cross_entropy import linear_cross_entropy

__all__ = ["linear", "linear_cross_entropy", "low_rank"]
