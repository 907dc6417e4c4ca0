"""One token through whole blocks, compiled, on the CPU."""

from rwkvx_kernels.one_token.api import BlockWeights, Cache, OneToken, fits

__all__ = ["BlockWeights", "Cache", "OneToken", "fits"]
