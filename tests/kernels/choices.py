"""What coarse-to-fine selection chooses, against the reference; attention given a choice.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention import forest, reference
from rwkvx_kernels.chunk_attention.triton_descent import descend

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


def check_choice(tokens: int, queries: int, topk: int, **sizes: int) -> None:
    """Chunks of one token each: their means are the keys."""
    q, k, _ = inputs(tokens, **sizes)
    means = k.transpose(1, 2).contiguous()
    part = q[:, -queries:].contiguous()
    chosen = descend(part, means, wide_forest(means, tokens), tokens - queries, 1, topk)
    got = sets_of(chosen, tokens)
    flat, expected = (
        reference.select_chunks(part.double(), k.double(), 1, topk, coarse)
        for coarse in (False, True)
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
