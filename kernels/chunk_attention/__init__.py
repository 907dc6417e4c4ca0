"""Top-k chunk attention: every query reads its own chunk and the best past chunks."""

from rwkvx_kernels.chunk_attention.api import (
    SELECTIONS,
    cached_chunk_attention,
    chosen_impl,
    chunk_attention,
    has_decode_kernel,
    selected_chunks,
)
from rwkvx_kernels.chunk_attention.cache import KeyValueCache

__all__ = [
    "SELECTIONS",
    "KeyValueCache",
    "cached_chunk_attention",
    "chosen_impl",
    "chunk_attention",
    "has_decode_kernel",
    "selected_chunks",
]
