"""What RWKV-7's channel mix does between its projections."""

from rwkvx_kernels.channel_mix.api import squared_relu

__all__ = ["squared_relu"]
