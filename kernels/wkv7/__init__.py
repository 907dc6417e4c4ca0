"""WKV7: the recurrence of RWKV-7."""

from rwkvx_kernels.wkv7.api import chosen_impl, wkv7
from rwkvx_kernels.wkv7.summary import Summary, wkv7_compose, wkv7_summary

__all__ = ["Summary", "chosen_impl", "wkv7", "wkv7_compose", "wkv7_summary"]
