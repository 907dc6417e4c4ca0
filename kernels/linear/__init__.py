"""Products of activations with weight matrices."""

from rwkvx_kernels.linear.api import linear, low_rank

__all__ = ["linear", "low_rank"]
