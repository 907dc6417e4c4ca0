"""What the implementations of chunk selection share: what a chunk and a node stand for, who is in
a tree, how many nodes a query keeps.

A chunk is scored by the product of the query and the mean of its keys. Coarse-to-fine selection
descends a tree over the first P chunks: a node of level j stands for `FANOUT`^j chunks and has
`FANOUT` children of level j - 1 (level 0: a chunk). The P chunks are cut into aligned runs, each as
long as can be: RUN · GROWTH^i chunks. Those of a run are ordered by halving it again and again
along the direction of largest variance; nodes are what then stands together. The tree is a function
of the P means alone; as P grows, GROWTH runs of one length become a longer one, so that a chunk is
sorted a logarithmic number of times.

Axes: B batch, T queries, H query heads, G key/value heads, N groups (B·G), R query heads of a
group, S keys, C chunks, P chunks in a tree, M nodes of a level, D head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FANOUT = 32
# Chunks of the shortest run: what comes after the last run is scored chunk by chunk.
RUN = 256
# So many runs of equal length are sorted anew as one.
GROWTH = 4
# A level of at most so many nodes is scored whole, without descending to it.
DENSE_NODES = 1024
POWER_ITERATIONS = 5
# How much of the radius around a node's mean counts for its score.
PART_OF_RADIUS = 0.3


def chunk_means(k_SD: Tensor, chunk_size: int) -> Tensor:
    """What stands for each completed chunk, the mean of its keys: [..., S, D] -> [..., C, D].

    At least float32. A channel whose mean is not finite counts for nothing: it is 0.
    """
    complete = k_SD.shape[-2] // chunk_size
    whole = k_SD.narrow(-2, 0, complete * chunk_size).unflatten(-2, (complete, chunk_size))
    wide = torch.promote_types(k_SD.dtype, torch.float32)
    return whole.mean(dim=-2, dtype=wide).nan_to_num(0.0, 0.0, 0.0)


def node_queries(q: Tensor) -> Tensor:
    """[..., D] -> [..., D + 1]: the product with a node, its centre c and r, is q · c + |q| r.

    That is the best score that a point at most r away from c can have.
    """
    return torch.cat([q, q.norm(dim=-1, keepdim=True)], dim=-1)


def nodes_of(means_NCD: Tensor, order_NP: Tensor, size: int) -> Tensor:
    """Of nodes of `size` consecutive chunks of `order_NP`: [N, P / size, D + 1].

    With the distance of the farthest of its chunk means, a node's score would bound the score of
    each of them. But in many dimensions a query rarely points to the farthest one: a part of that
    distance is what a good chunk of a node really scores, and finds far more of the best chunks.
    """
    members = in_order(means_NCD, order_NP).unflatten(1, (-1, size))
    mean = members.mean(dim=2)
    radius = (members - mean.unsqueeze(2)).norm(dim=-1).amax(dim=2)
    return torch.cat([mean, PART_OF_RADIUS * radius.unsqueeze(-1)], dim=-1)


def in_order(means_NCD: Tensor, order_NP: Tensor) -> Tensor:
    """The means of the chunks in that order: [N, P, D]."""
    return means_NCD.gather(1, order_NP.unsqueeze(-1).expand(-1, -1, means_NCD.shape[-1]))


def beam_widths(topk: int) -> tuple[int, int]:
    """How many nodes of level 1, and of each level above, a query keeps for the next one."""
    return max(48, 4 * (topk - 1)), max(24, 4 * (topk - 1))


def kept_at(level: int, topk: int) -> int:
    """How many members of a level a query keeps: chunks of level 0, nodes above."""
    return beam_widths(topk)[level > 1] if level else topk - 1


def scored_whole(topk: int) -> int:
    """Up to so many chunks in whole runs are scored one by one: those of a query's nodes are as
    many."""
    return FANOUT * beam_widths(topk)[0]


def first_level(chunks: int) -> int:
    """Where the descent of a tree over so many chunks starts, the lowest level of few nodes or
    else the highest; 0 if it has no level of nodes."""
    level = 0
    while chunks >= FANOUT and (level == 0 or chunks > DENSE_NODES):
        chunks, level = chunks // FANOUT, level + 1
    return level


def scored_behind(chunks: int, topk: int) -> int:
    """Members that a query behind so many chunks scores, coarse to fine."""
    tree = chunks // RUN * RUN
    if tree <= scored_whole(topk):
        return chunks
    top = first_level(tree)
    scored = tree // FANOUT**top
    for level in range(top, 0, -1):
        members = tree // FANOUT ** (level - 1) if level > 1 else chunks
        parents = tree // FANOUT**level
        kept = min(kept_at(level, topk), parents)
        scored += kept * FANOUT + members - parents * FANOUT
    return scored


def regions_of(chunks: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, chunks of a run) of the runs of equal length, the longest first."""
    size = RUN
    while size * GROWTH <= chunks:
        size *= GROWTH
    start = 0
    while size >= RUN:
        stop = chunks // size * size
        if stop > start:
            yield start, stop, size
        start, size = stop, size // GROWTH


def order_by_likeness(means_NCD: Tensor, run: int) -> Tensor:
    """Order within each run of `run` chunks such that every node's chunks are alike: [N, C].

    Some chunks are halved at the median along their direction of largest variance (power
    iteration), until there are `FANOUT` of them.
    """
    groups = len(means_NCD)
    x = means_NCD.unflatten(1, (-1, run)).flatten(0, 1)
    order = torch.arange(run, device=x.device).expand(len(x), -1)
    size = run
    while size > FANOUT:
        x, order = x.reshape(-1, size, x.shape[-1]), order.reshape(-1, size)
        x_centred = x - x.mean(dim=1, keepdim=True)
        far = x_centred.square().sum(-1).argmax(dim=1)
        axis = x_centred[torch.arange(len(x), device=x.device), far].unsqueeze(-1)
        for _ in range(POWER_ITERATIONS):
            axis = x_centred.transpose(1, 2) @ (x_centred @ axis)
            axis = axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-30)
        halves = (x_centred @ axis).squeeze(-1).argsort(dim=1, stable=True)
        order = order.gather(1, halves)
        x = x.gather(1, halves.unsqueeze(-1).expand_as(x))
        size //= 2
    start = torch.arange(means_NCD.shape[1] // run, device=x.device).repeat_interleave(run) * run
    return order.reshape(groups, -1) + start


def by_group(x_BTH: Tensor, groups: int) -> Tensor:
    """[B, T, H, ...] -> [B·G, T, R, ...]."""
    return x_BTH.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)


def to_groups(q_BTHD: Tensor, groups: int) -> Tensor:
    """[B, T, H, D] -> [B·G, T, R, D], contiguous, at least float32."""
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    return by_group(q_BTHD.to(wide), groups).contiguous()


def from_groups(x_NTRD: Tensor, batch: int) -> Tensor:
    """[B·G, T, R, D] -> [B, T, H, D]."""
    return x_NTRD.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
