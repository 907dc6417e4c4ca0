"""The Triton kernels of chunk attention as operators of torch, with gradients.

Importing this module registers `torch.ops.rwkvx.chunk_attention*`. Each has a fake implementation,
which only says what comes out. Partial results grow with queries x chunks read, so the queries are
worked on in tiles: what is held beside inputs and outputs stays below half of their size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.forest import forest_of
from rwkvx_kernels.chunk_attention.triton_backward import backward
from rwkvx_kernels.chunk_attention.triton_decode import decode
from rwkvx_kernels.chunk_attention.triton_descent import descend
from rwkvx_kernels.chunk_attention.triton_forward import forward, shape_of
from rwkvx_kernels.chunk_attention.triton_pairs import blocks_of, lists_of

# Queries of a tile are at least so many: fewer would leave a GPU idle.
LEAST_TILE = 4096


def _tiles(tokens: int, chunk_size: int, topk: int) -> Iterator[slice]:
    """Tiles of queries of whole chunks, about as many as chunks that a query reads."""
    step = max(LEAST_TILE, tokens // max(1, topk - 1))
    step = -(-step // chunk_size) * chunk_size
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    layout: str,
    chunk: int,
    topk: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and chosen chunks of queries at `first` ..., tile by tile."""
    o, lse, chosen = outputs_like(q, topk)
    for tile in _tiles(q.shape[1], chunk, topk):
        part, at = q[:, tile].contiguous(), first + tile.start
        picked = descend(part, means, forest, at, chunk, topk)
        o[:, tile], lse[:, tile] = _attend_tile(part, k, v, picked, layout, chunk, topk, at)
        chosen[:, tile] = picked
    return o, lse, chosen


def _attend_tile(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: str, chunk: int, topk: int, first: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries at `first` ... whose chunks are chosen."""
    shape = shape_of(q, k, layout, chunk, topk, first)
    lists = lists_of(chosen, shape.groups, shape.chunks)
    return forward(q, k, v, chosen, lists, blocks_of(lists, shape.tile), shape)


def attend_chosen(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk_size: int, topk: int
) -> Tensor:
    """`chunk_attention` without its selection, to measure the two apart: o [B, T, H, D]."""
    o = torch.empty_like(q)
    for tile in _tiles(q.shape[1], chunk_size, topk):
        part, picked = q[:, tile].contiguous(), chosen[:, tile].contiguous()
        o[:, tile] = _attend_tile(part, k, v, picked, "bsgd", chunk_size, topk, tile.start)[0]
    return o


def outputs_like(q: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty o, log-sum-exp and chosen chunks of the queries."""
    rows = q.shape[:3]
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    return torch.empty_like(q), lse, lse.new_empty((*rows, topk - 1), dtype=torch.int32)


@torch.library.custom_op("rwkvx::chunk_attention", mutates_args=())
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, coarse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o, binary log-sum-exp [B, T, H], chosen chunks [B, T, H, topk - 1]; all contiguous."""
    batch, tokens, groups, dim = k.shape
    chunks = tokens // chunk_size
    whole = k[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    means = whole.mean(dim=2, dtype=torch.float32).transpose(1, 2).contiguous()
    forest = forest_of(means.flatten(0, 1), topk) if coarse else []
    return _attend(q, k, v, means, forest, "bsgd", chunk_size, topk, 0)


@chunk_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, coarse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs_like(q, topk)


@torch.library.custom_op("rwkvx::chunk_attention_backward", mutates_args=())
def chunk_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    chunk_size: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of q."""
    delta = (do.float() * o.float()).sum(dim=-1)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
    for tile in _tiles(q.shape[1], chunk_size, topk):
        part, do_part, lse_part, delta_part, picked = (
            x[:, tile].contiguous() for x in (q, do, lse, delta, chosen)
        )
        shape = shape_of(part, k, "bsgd", chunk_size, topk, tile.start)
        lists = lists_of(picked, shape.groups, shape.chunks)
        blocks = blocks_of(lists, shape.tile)
        dq[:, tile], dk_part, dv_part = backward(
            part, k, v, do_part, lse_part, delta_part, picked, lists, blocks, shape
        )
        dk[:, : tile.stop] += dk_part.transpose(1, 2)
        dv[:, : tile.stop] += dv_part.transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@chunk_attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    chunk_size: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.chunk_size, ctx.topk, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = chunk_attention_backward(do.contiguous(), *ctx.saved_tensors, ctx.chunk_size, ctx.topk)
    return (*grads, None, None, None)


chunk_attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("rwkvx::chunk_attention_cached", mutates_args=())
def chunk_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    length: int,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """The last T of `length` cached tokens: k, v [B, G, S, D], means [B, G, C, D]; no gradient.

    forest: tensors over the chunks before the last token's (forest.py); [] for flat selection.
    """
    first = length - q.shape[1]
    return _attend(q, k, v, means, forest, "bgsd", chunk_size, topk, first)[0]


@chunk_attention_cached.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    length: int,
    chunk_size: int,
    topk: int,
) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("rwkvx::chunk_attention_decode", mutates_args=())
def chunk_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    lengths: Tensor,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """As `chunk_attention_cached` for few queries, each sequence of a length of its own [B]."""
    return decode(q, k, v, means, forest, lengths, chunk_size, topk)


@chunk_attention_decode.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    lengths: Tensor,
    chunk_size: int,
    topk: int,
) -> Tensor:
    return torch.empty_like(q)
