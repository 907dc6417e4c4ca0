"""What RWKV-7's time mix does between its projections."""

from rwkvx_kernels.time_mix.api import time_mix

__all__ = ["time_mix"]
