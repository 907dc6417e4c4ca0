"""Which past chunks of keys a query reads."""

from rwkvx_kernels.chunk_select.api import select_chunks
from rwkvx_kernels.chunk_select.common import chunk_means
from rwkvx_kernels.names import SELECTIONS

__all__ = ["SELECTIONS", "chunk_means", "select_chunks"]
