"""One token through whole blocks, compiled, on the CPU."""

from rwkvx_kernels.one_token.api import OneToken, fits
from rwkvx_kernels.one_token.common import BlockWeights, Cache

__all__ = ["BlockWeights", "Cache", "OneToken", "fits"]
