"""What the implementations of chunk attention share: what they can do, how keys are laid out.

Axes: B batch, T tokens, G key/value heads, D head size; N groups (B·G), C chunks, S tokens of a
chunk.
"""

import torch
from torch import Tensor

# Up to so many queries at once, or keys of each, a compiled loop beats products of matrices.
FEW_QUERIES, FEW_KEYS = 4, 512
# The Triton kernels: largest head size, what divides the chunk, queries that are decoded.
MOST_DIM, CHUNK_MULTIPLE, DECODED = 128, 16, 8


def to_chunks(k: Tensor, chunk_size: int) -> Tensor:
    """[B, T, G, D] -> [B·G, C, S, D], at least float32, zeros after the end."""
    k = k.to(torch.promote_types(k.dtype, torch.float32)).transpose(1, 2).flatten(0, 1)
    missing = -k.shape[1] % chunk_size
    return torch.nn.functional.pad(k, (0, 0, 0, missing)).unflatten(1, (-1, chunk_size))


def from_chunks(k_NCSD: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_chunks`."""
    k = k_NCSD.flatten(1, 2)[:, : like.shape[1]]
    return k.unflatten(0, (like.shape[0], -1)).transpose(1, 2).to(like.dtype)
