"""One token through whole blocks: compiled on a CPU, a few launches for each on a GPU."""

from rwkvx_kernels.one_token.api import OneToken, embed, logits, read_block
from rwkvx_kernels.one_token.common import BlockWeights, Cache, Memory

__all__ = ["BlockWeights", "Cache", "Memory", "OneToken", "embed", "logits", "read_block"]
