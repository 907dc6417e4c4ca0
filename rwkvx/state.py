"""What a model remembers: one NamedTuple per kind of block, passed in and returned.

Axes: B batch, C width, H heads, N head size, G key/value heads, W convolution width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention import KeyValueCache


class Rwkv7State(NamedTuple):
    """Of an RWKV-7 block: constant size.

    `shift` and `ffn_shift` [B, C] are the last inputs of the two mixers, `wkv` [B, H, N, N]
    (value, key) the float32 matrix state.
    """

    shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


class CachedRows(NamedTuple):
    """Batch rows of equal length: of what `cache` holds, `length` tokens count here."""

    cache: KeyValueCache
    length: int

    def append(self, k_BTGD: Tensor, v_BTGD: Tensor) -> "CachedRows":
        """With T more tokens."""
        cache = self.cache.append(self.length, k_BTGD, v_BTGD)
        return CachedRows(cache, self.length + k_BTGD.shape[1])

    def select(self, index: Tensor) -> "CachedRows":
        """A copy of the rows `index`."""
        return CachedRows(self.cache.rows(self.length, index), self.length)


class SparseState(NamedTuple):
    """Of a sparse block: grows with the text.

    `cached` holds keys and values: of all rows together, or row by row where the lengths may
    differ (empty: no tokens yet). `conv` [B, W - 1, G·N] are the last keys before the convolution
    (None: no convolution), `ffn_shift` [B, C] the last input of the channel mix.
    """

    cached: tuple[CachedRows, ...]
    conv: Tensor | None
    ffn_shift: Tensor


BlockState = Rwkv7State | SparseState


class ModelState(NamedTuple):
    """Of a whole model: one state per block, and how many tokens were read."""

    blocks: tuple[BlockState, ...]
    length: int

    def recurrent(self) -> "ModelState":
        """The same without gradients and attention cache: what state passing passes."""
        blocks = tuple(map_tensors(b, Tensor.detach, keep_cache=False) for b in self.blocks)
        return ModelState(blocks, 0)


def select_state(state: ModelState, rows: Tensor | list[int]) -> ModelState:
    """The batch rows `rows` (integer indices, repeats allowed) as a state of their own."""
    if not isinstance(rows, Tensor):
        rows = torch.tensor(rows, dtype=torch.int64)
    blocks = []
    for block in state.blocks:
        index = rows.to(block.ffn_shift.device)
        picked = map_tensors(block, partial(_rows, index=index))
        if isinstance(block, SparseState) and isinstance(picked, SparseState):
            picked = picked._replace(cached=_select_cached(block.cached, index))
        blocks.append(picked)
    return ModelState(tuple(blocks), state.length)


def repeat_state(state: ModelState, n: int) -> ModelState:
    """Every batch row `n` times, neighbours together (as `repeat_interleave`)."""
    rows = torch.arange(state.blocks[0].ffn_shift.shape[0]).repeat_interleave(n)
    return select_state(state, rows)


def state_bytes(state: ModelState) -> int:
    """Memory that the state's tokens take, in bytes (spare capacity of caches not counted)."""
    total = 0
    for block in state.blocks:
        total += sum(x.numel() * x.element_size() for x in block if isinstance(x, Tensor))
        for cache, length in block.cached if isinstance(block, SparseState) else ():
            total += int(cache.bytes_per_token() * length * cache.batch)
    return total


def _select_cached(cached: tuple[CachedRows, ...], index: Tensor) -> tuple[CachedRows, ...]:
    """Rows together are copied; single rows are shared, and copied when one is continued."""
    if len(cached) == 1:
        return (cached[0].select(index),)
    return tuple(cached[i] for i in index.tolist()) if cached else ()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def map_tensors(
    block: BlockState, f: Callable[[Tensor], Tensor], keep_cache: bool = True
) -> BlockState:
    """A block state with `f` applied to every tensor; the cache is kept as it is, or left out."""
    if isinstance(block, Rwkv7State):
        return Rwkv7State(*(f(x) for x in block))
    conv = None if block.conv is None else f(block.conv)
    return SparseState(block.cached if keep_cache else (), conv, f(block.ffn_shift))
