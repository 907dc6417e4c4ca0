"""Every token mixed with the one before it."""

from rwkvx_kernels.token_shift.api import token_shift

__all__ = ["token_shift"]
