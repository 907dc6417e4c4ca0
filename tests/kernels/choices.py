"""What coarse-to-fine selection chooses, against the reference; attention given a choice.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention import attend_chunks
from rwkvx_kernels.chunk_select import chunk_means, forest, select_chunks
from rwkvx_kernels.chunk_select.triton_descent import descend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(
    tokens: int, heads: int = 4, groups: int = 2, dim: int = 12, batch: int = 1
) -> list[Tensor]:
    torch.manual_seed(tokens)
    q = torch.randn(batch, tokens, heads, dim)
    k, v = (torch.randn(batch, tokens, groups, dim) for _ in range(2))
    return [x.to(DEVICE) for x in (q, k, v)]


def sets_of(chosen: Tensor, chunks: int) -> Tensor:
    """Chosen [B, T, H, slots] as booleans [B, H, T, C]; no chunk stands twice."""
    assert int(chosen.max()) < chunks
    places = chosen.long().masked_fill(chosen < 0, chunks).transpose(1, 2)
    count = places.new_zeros((*places.shape[:3], chunks + 1))
    count = count.scatter_add(-1, places, torch.ones_like(places))[..., :-1]
    assert int(count.max()) <= 1
    return count > 0


def wide_forest(means_BGCD: Tensor, chunks: int) -> list[Tensor]:
    """Grown in float64, so that it has the same runs as the reference's trees in float64."""
    means = means_BGCD.flatten(0, 1).double()
    grown = forest.room_for(means)
    forest.grow(grown, means, 0, chunks)
    order, *nodes = grown.tensors()
    return [order, *(x.float() for x in nodes)]


def reference_sets(
    q: Tensor, k: Tensor, chunk: int, topk: int, coarse: bool = False, offset: int = 0
) -> Tensor:
    """What the reference chooses of chunks of keys k [B, S, G, D], in float64, as `sets_of`."""
    means = chunk_means(k.double().transpose(1, 2), chunk)
    selection = "coarse_to_fine" if coarse else "flat"
    chosen = select_chunks(q.double(), means, chunk, topk, offset, selection, "reference")
    return sets_of(chosen, means.shape[2])


def exactly(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, topk: int, selection: str = "flat"
) -> Tensor:
    """The reference of both halves, of queries that are the last of the tokens."""
    means, offset = chunk_means(k.transpose(1, 2), chunk), k.shape[1] - q.shape[1]
    chosen = select_chunks(q, means, chunk, topk, offset, selection, "reference")
    return attend_chunks(q, k, v, chosen, chunk, "reference")


def check_choice(tokens: int, queries: int, topk: int, **sizes: int) -> None:
    """Chunks of one token each: their means are the keys."""
    q, k, _ = inputs(tokens, **sizes)
    means = k.transpose(1, 2).contiguous()
    part = q[:, -queries:].contiguous()
    chosen = descend(part, means, wide_forest(means, tokens), tokens - queries, 1, topk)
    got = sets_of(chosen, tokens)
    flat, expected = (
        reference_sets(part, k, 1, topk, coarse, tokens - queries) for coarse in (False, True)
    )
    assert torch.equal(got, expected)
    assert not torch.equal(got, flat)


def attention_given(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, positions: list[int], chunk: int
) -> Tensor:
    """Float64 outputs [positions, H, D] of some queries of the first sequence, given the choice."""
    outputs = []
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    for t in positions:
        own = torch.arange(t // chunk * chunk, t + 1, device=q.device)
        for h in range(heads):
            picked = chosen[0, t, h].long()
            past = picked[picked >= 0, None] * chunk + torch.arange(chunk, device=q.device)
            rows = torch.cat([past.flatten(), own])
            keys, values = (x[0, rows, h // group].double() for x in (k, v))
            weights = (keys @ q[0, t, h].double() * q.shape[3] ** -0.5).softmax(0)
            outputs.append(weights @ values)
    return torch.stack(outputs).unflatten(0, (-1, heads))
