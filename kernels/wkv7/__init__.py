"""WKV7: the recurrence of RWKV-7."""

from rwkvx_kernels.wkv7.api import chosen_impl, wkv7

__all__ = ["chosen_impl", "wkv7"]
