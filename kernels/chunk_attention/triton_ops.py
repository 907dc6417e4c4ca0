"""The Triton kernels of chunk attention as operators of torch, with gradients.

Importing this module registers `torch.ops.rwkvx.attend_chunks*`. Partial results grow with queries
x chunks read. Where they are large, heads are worked on one after the other, so that what is held
beside inputs and outputs stays below their size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_backward import SEGMENT_BYTES, backward, delta_of
from rwkvx_kernels.chunk_attention.triton_decode import decode
from rwkvx_kernels.chunk_attention.triton_forward import Shape, forward, shape_of
from rwkvx_kernels.chunk_select.triton_decode import select_rows
from rwkvx_kernels.dispatch import runs_of
from rwkvx_kernels.tools.operators import adjacent, operator
from rwkvx_kernels.tools.triton_lists import MOST_GROUPS, MOST_PAIRS, lists_of

# Partial results of so many bytes are always held at once.
LEAST_BYTES = 1 << 28
# Beyond that, this part of the size of inputs and outputs, whatever else is held included.
PART_OF_INPUTS = 0.9


class Work(NamedTuple):
    """What is done at once: rows of the batch, their tokens, and ranges of the groups of these."""

    rows: slice
    tokens: slice
    parts: list[range]


def works(shape: Shape, element: int, inputs: int, held: int) -> list[Work]:
    """How to divide a call. All heads at once, or some after the other; where even one is too much,
    its queries are divided as well, the last ones first.

    Args:
        element: bytes of an element. inputs: bytes of inputs and outputs. held: what is held
            besides, whatever the division.
    """
    free = max(LEAST_BYTES, int(PART_OF_INPUTS * inputs) - held)
    group = shape.pairs * (shape.dim * element + 8)  # a partial result, its log-sum-exp, its place
    count, everything = shape.batch * shape.groups, slice(None)
    if group <= free and shape.pairs <= MOST_PAIRS:
        step = min(count, MOST_GROUPS, free // max(1, group))
        step = -(-count // -(-count // step))
        parts = [range(i, min(count, i + step)) for i in range(0, count, step)]
        return [Work(everything, everything, parts)]
    share = min(free / group, MOST_PAIRS / shape.pairs)
    step = max(1, int(shape.tokens * share) // shape.chunk) * shape.chunk
    parts = [range(i, i + 1) for i in range(shape.groups)]
    return [
        Work(slice(i, i + 1), slice(start, min(start + step, shape.tokens)), parts)
        for i in range(shape.batch)
        for start in reversed(range(0, shape.tokens, step))
    ]


def _divided(
    tensors: list[Tensor], k: Tensor, v: Tensor, work: list[Work], chunk_size: int
) -> Iterator[tuple[list[Tensor], Tensor, Tensor, Shape, Work]]:
    """The tensors [B, T, H, ...], q first, and keys and values, of each part of the work."""
    for one in work:
        stop = one.tokens.stop
        past = k.shape[1] if stop is None else k.shape[1] - tensors[0].shape[1] + stop
        own_k, own_v = k[one.rows, :past], v[one.rows, :past]
        own = [x[one.rows, one.tokens] for x in tensors]
        yield own, own_k, own_v, shape_of(own[0], own_k, chunk_size, tensors[1].shape[3]), one


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return q.new_empty(q.shape), lse


def attend_sequences(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`attend_triton` of sequences that are not packed."""
    q, chosen, k, v = q.contiguous(), chosen.contiguous(), adjacent(k), adjacent(v)
    o, lse = _fake(q)
    shape = shape_of(q, k, chunk, chosen.shape[3])
    held = chosen.nbytes + lse.nbytes
    work = works(shape, q.element_size(), 2 * (q.nbytes + k.nbytes), held)
    for own, own_k, own_v, own_shape, one in _divided([q, chosen, o, lse], k, v, work, chunk):
        own_q, picked, *into = own
        for part in one.parts:
            lists = lists_of(picked, shape.groups, own_shape.chunks, part)
            forward(own_q, own_k, own_v, picked, lists, own_shape, part, *into)
    return o, lse


def gradients_of_sequences(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk: int
) -> list[Tensor]:
    """The gradients of q, k and v, of sequences that are not packed."""
    do, o, lse, q, chosen = (x.contiguous() for x in (do, o, lse, q, chosen))
    k, v = adjacent(k), adjacent(v)
    delta, dq = delta_of(o, do), torch.empty_like(q)
    shape = shape_of(q, k, chunk, chosen.shape[3])
    held = chosen.nbytes + lse.nbytes + delta.nbytes + SEGMENT_BYTES
    work = works(shape, q.element_size(), 4 * (q.nbytes + k.nbytes), held)
    # Those of keys that several divisions of the queries read are summed in float32.
    dtype = k.dtype if work[0].tokens == slice(None) else torch.float32
    dk, dv = (k.new_empty(k.shape, dtype=dtype) for _ in range(2))
    tensors = [q, chosen, do, lse, delta, dq]
    for own, own_k, own_v, own_shape, one in _divided(tensors, k, v, work, chunk):
        own_q, picked, *others, own_dq = own
        into = [own_dq, dk[one.rows], dv[one.rows]]
        add = one.tokens.stop not in (None, shape.tokens)
        for part in one.parts:
            lists = lists_of(picked, shape.groups, own_shape.chunks, part)
            rows = [own_q, *others]
            backward(rows, own_k, own_v, picked, lists, own_shape, part, into, add)
    return [dq, dk.to(k.dtype), dv.to(v.dtype)]


def _gradients(grads: list[Tensor], kept: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    """Those of q, k and v."""
    q, k, v, chosen, cu_seqlens, chunk = args
    (do,), (o, lse) = grads, kept
    if cu_seqlens is None:
        return gradients_of_sequences(do, o, lse, q, k, v, chosen, chunk)
    made = [torch.empty_like(x) for x in (q, k, v)]
    for run in runs_of(cu_seqlens, *q.shape[:2]):
        rows = run.rows
        do_o_lse = (rows(do), rows(o), rows(lse))
        own = (rows(q), rows(k), rows(v), rows(chosen))
        for into, x in zip(made, gradients_of_sequences(*do_o_lse, *own, chunk), strict=True):
            run.rows(into).copy_(x)
    return made


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
    if cu_seqlens is None:
        return attend_sequences(q, k, v, chosen, chunk_size)
    o, lse = _fake(q)
    for run in runs_of(cu_seqlens, *q.shape[:2]):
        own = (run.rows(q), run.rows(k), run.rows(v), run.rows(chosen))
        made = attend_sequences(*own, chunk_size)
        for into, x in zip((o, lse), made, strict=True):
            run.rows(into).copy_(x)
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
