"""The Triton kernels of chunk attention as operators of torch, with gradients.

Importing this module registers `torch.ops.rwkvx.attend_chunks*`. Partial results grow with queries
x chunks read, so the queries are worked on in tiles: what is held beside inputs and outputs stays
below half of their size.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_backward import backward
from rwkvx_kernels.chunk_attention.triton_decode import decode
from rwkvx_kernels.chunk_attention.triton_forward import forward, shape_of
from rwkvx_kernels.chunk_select.triton_decode import select_rows
from rwkvx_kernels.dispatch import check_cu_seqlens
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.tools.triton_lists import lists_of, tiles_of

# Queries of a tile are at least so many: fewer would leave a GPU idle.
LEAST_TILE = 4096


def _tiles(tokens: int, chunk_size: int, slots: int) -> Iterator[slice]:
    """Tiles of queries of whole chunks, about as many as chunks that a query reads."""
    step = max(LEAST_TILE, tokens // max(1, slots))
    step = -(-step // chunk_size) * chunk_size
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return q.new_empty(q.shape), lse


def _gradients(grads: list[Tensor], kept: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    """Those of q, k and v."""
    *tensors, cu_seqlens, chunk_size = args
    every = [*grads, *kept, *tensors]
    if cu_seqlens is None:
        return _gradients_whole(every, chunk_size)
    bounds = pairwise(check_cu_seqlens(cu_seqlens, *tensors[0].shape[:2]))
    made = [_gradients_whole([x[:, a:b] for x in every], chunk_size) for a, b in bounds if a < b]
    return [torch.cat(x, dim=1) for x in zip(*made, strict=True)]


def _gradients_whole(every: list[Tensor], chunk_size: int) -> list[Tensor]:
    do, o, lse, q, k, v, chosen = every
    k, v, first = _adjacent(k), _adjacent(v), k.shape[1] - q.shape[1]
    delta = (do.float() * o.float()).sum(dim=-1)
    dq = q.new_empty(q.shape)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
    for tile in _tiles(q.shape[1], chunk_size, chosen.shape[3]):
        own = [x[:, tile].contiguous() for x in (q, do, lse, delta, chosen)]
        last = first + tile.stop
        shape = shape_of(own[0], k[:, :last], chunk_size, chosen.shape[3])
        lists = lists_of(own[4], shape.groups, shape.chunks)
        dq[:, tile], dk_own, dv_own = backward(own, k, v, lists, tiles_of(lists, shape.tile), shape)
        dk[:, :last] += dk_own.transpose(1, 2)
        dv[:, :last] += dv_own.transpose(1, 2)
    return [dq, dk.to(k.dtype), dv.to(v.dtype)]


@operator("attend_chunks", _fake, _gradients, outputs=1, kept=slice(0, 2))
def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """As `api.attend_chunks`, of packed sequences if there are offsets: o and the binary
    log-sum-exp [B, T, H]."""
    o, lse = _fake(q)
    if cu_seqlens is not None:
        for a, b in pairwise(check_cu_seqlens(cu_seqlens, *q.shape[:2])):
            if a < b:
                own = (x[:, a:b] for x in (q, k, v, chosen))
                o[:, a:b], lse[:, a:b] = attend_triton(*own, None, chunk_size)
        return o, lse
    k, v, first = _adjacent(k), _adjacent(v), k.shape[1] - q.shape[1]
    for tile in _tiles(q.shape[1], chunk_size, chosen.shape[3]):
        own_q, picked = q[:, tile].contiguous(), chosen[:, tile].contiguous()
        shape = shape_of(own_q, k[:, : first + tile.stop], chunk_size, chosen.shape[3])
        lists = lists_of(picked, shape.groups, shape.chunks)
        tiles = tiles_of(lists, shape.tile)
        o[:, tile], lse[:, tile] = forward(own_q, k, v, picked, lists, tiles, shape)
    return o, lse


@operator("chunk_attention_decode", lambda q, *_: q.new_empty(q.shape))
def decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    lengths: Tensor,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """The last T tokens, few, of each sequence: k, v [B, G, S, D], means [B, G, C, D].

    forest: tensors over the chunks before the last token's (chunk_select/forest.py); [] for flat
    selection. lengths: [B] int64.
    """
    q, chosen = q.contiguous(), None
    if topk > 1:
        chosen = select_rows(q, means, forest, lengths, chunk_size, topk)
    return decode(q, k, v, chosen, lengths, chunk_size, topk)


def _adjacent(k: Tensor) -> Tensor:
    """With the channels of a key one after the other; tokens and heads may lie anywhere."""
    return k if k.stride(3) == 1 else k.contiguous()
