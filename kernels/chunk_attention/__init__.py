"""Top-k chunk attention: every query reads its own chunk and the best past chunks."""

from rwkvx_kernels.chunk_attention.api import (
    attend_chunks,
    cached_chunk_attention,
    chunk_attention,
    has_decode_kernel,
    selected_chunks,
)
from rwkvx_kernels.chunk_attention.cache import KeyValueCache

__all__ = [
    "KeyValueCache",
    "attend_chunks",
    "cached_chunk_attention",
    "chunk_attention",
    "has_decode_kernel",
    "selected_chunks",
]
