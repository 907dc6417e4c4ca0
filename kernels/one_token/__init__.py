"""One token through whole blocks, compiled, on the CPU."""

from rwkvx_kernels.one_token.api import DTYPES, BlockWeights, Cache, OneToken, fits

__all__ = ["DTYPES", "BlockWeights", "Cache", "OneToken", "fits"]
