"""Coarse-to-fine selection: the tree over chunk means, and the descent against the reference.

Axes: B batch, T time, H query heads, G key/value heads, D head size, N groups, C chunks.
"""

from itertools import pairwise

import pytest
import torch
from measure import LargestTensor, relative_error
from torch import Tensor

from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    cached_chunk_attention,
    chunk_attention,
    selected_chunks,
)
from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.common import FANOUT, RUN, node_queries
from rwkvx_kernels.chunk_select.numba_largest import largest
from rwkvx_kernels.chunk_select.reference import ordered_chunks
from rwkvx_kernels.chunk_select.tree import ChunkTree
from rwkvx_kernels.chunk_select.trees import Trees

COARSE = "coarse_to_fine"


def inputs(tokens: int, batch: int = 1, seed: int = 0, dim: int = 6) -> tuple[Tensor, ...]:
    """q [B, T, 4, D], k and v [B, T, 2, D] in float64."""
    torch.manual_seed(seed)
    q = torch.randn(batch, tokens, 4, dim)
    k, v = (torch.randn(batch, tokens, 2, dim) for _ in range(2))
    return q.double(), k.double(), v.double()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few nodes are kept and two levels descended, so that small trees are pruned at each."""
    monkeypatch.setattr(common, "beam_widths", lambda topk: (4, 2))
    monkeypatch.setattr(common, "DENSE_NODES", 8)


def check_tree(built: ChunkTree, means: Tensor) -> None:
    """Every chunk once, within its run; every node the mean and 0.3 of the farthest distance."""
    assert torch.equal(built.order_NP.sort(dim=1)[0][0], torch.arange(built.chunks))
    for level in range(1, len(built.nodes) + 1):
        size, nodes = FANOUT**level, built.level(level)
        assert nodes.shape[1] == built.chunks // size
        for node in range(nodes.shape[1]):
            members = built.order_NP[0, node * size : (node + 1) * size]
            assert int(members.max() - members.min()) < max(size, built.chunks)
            own = means[0, members]
            farthest = torch.cdist(own.mean(0)[None], own).amax()
            assert torch.allclose(nodes[0, node, :-1], own.mean(0))
            assert torch.allclose(nodes[0, node, -1], 0.3 * farthest)


def test_tree_by_hand() -> None:
    """1,024 + 2 · 256 chunks: one run of each length that there can be, none across another."""
    means = torch.randn(1, 1600, 5).double()
    built = Trees(means).tree(1600)
    assert built.chunks == 1536
    check_tree(built, means)
    assert torch.equal(built.order_NP, ordered_chunks(means, 1536))
    for start, stop in ((0, 1024), (1024, 1280), (1280, 1536)):
        part = built.order_NP[0, start:stop]
        assert (int(part.min()), int(part.max())) == (start, stop - 1)


def test_likes_stand_together() -> None:
    """Eight kinds of chunks in random order: every node of 32 chunks is of one kind."""
    torch.manual_seed(0)
    kind = torch.arange(RUN) % 8
    kind = kind[torch.randperm(RUN)]
    means = torch.randn(8, 16)[kind] * 10 + torch.randn(RUN, 16) * 0.01
    built = Trees(means[None]).tree(RUN)
    nodes = kind[built.order_NP[0]].view(-1, FANOUT)
    assert (nodes == nodes[:, :1]).all()


@pytest.mark.parametrize("steps", [[1536], [256, 1300, 1536], list(range(256, 1537, 256))])
def test_growing_is_building(steps: list[int]) -> None:
    means = torch.randn(2, 1600, 5).double()
    grow = Trees(means).tree
    for chunks in steps:
        grown = grow(chunks)
    whole = Trees(means).tree(1536)
    assert torch.equal(grown.order_NP, whole.order_NP)
    for a, b in zip(grown.nodes, whole.nodes, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_node_queries_bound_what_is_in_the_node() -> None:
    """With the whole radius; and a point that far away reaches the bound."""
    q, points = torch.randn(7, 5).double(), torch.randn(40, 5).double()
    centre = points.mean(0)
    radius = torch.cdist(centre[None], points).amax()
    bound = node_queries(q) @ torch.cat([centre, radius[None]])
    assert (bound >= (q @ points.T).amax(1)).all()
    reached = centre + radius * q / q.norm(dim=1, keepdim=True)
    assert torch.allclose(bound, (q * reached).sum(1))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("tokens", "chunk", "topk"), [(600, 1, 3), (1100, 2, 8)])
def test_equals_reference_with_gradients(tokens: int, chunk: int, topk: int) -> None:
    results = []
    for impl in ("torch", "reference", "auto"):
        leaves = [x.requires_grad_() for x in inputs(tokens)]
        o = chunk_attention(*leaves, chunk, topk, impl=impl, selection=COARSE)
        o.square().sum().backward()
        results.append([o.detach(), *(x.grad for x in leaves)])
    for got, expected, usual in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-12
        assert relative_error(usual, expected) < 1e-12


@pytest.mark.usefixtures("narrow")
def test_pruning_changes_what_is_read() -> None:
    """The tests here would not notice a selection that is always flat."""
    args = inputs(600)
    flat, coarse = (chunk_attention(*args, 1, 3, selection=s) for s in ("flat", COARSE))
    # The same chunks, up to the order in which they are summed.
    assert relative_error(coarse[:, :256], flat[:, :256]) < 1e-15
    assert relative_error(coarse[:, 256:], flat[:, 256:]) > 1e-3


def test_few_chunks_are_scored_whole() -> None:
    args = inputs(1000)
    flat, coarse = (chunk_attention(*args, 1, 3, selection=s) for s in ("flat", COARSE))
    assert relative_error(coarse, flat) < 1e-13


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("tokens", [700, 2900])
def test_two_levels_equal_reference(tokens: int) -> None:
    q, k, v = inputs(tokens)
    cache = KeyValueCache(1, 2, 6, 1, k).append(0, k, v)
    both = [
        cached_chunk_attention(q[:, -50:], cache, tokens, 4, impl, COARSE)
        for impl in ("torch", "compiled", "reference")
    ]
    assert relative_error(both[0], both[2]) < 1e-12
    assert relative_error(both[1], both[2]) < 1e-12
    flat = cached_chunk_attention(q[:, -50:], cache, tokens, 4)
    assert relative_error(both[0], flat) > 1e-3


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("cuts", [[0, 300, 301, 900, 1290], [0, 520, *range(525, 545), 1290]])
def test_any_split_equals_the_whole(cuts: list[int]) -> None:
    """A query's chunks are its own, whatever it is computed with: runs end at 256, 512, ..."""
    q, k, v = inputs(1290, batch=2)
    expected = chunk_attention(q, k, v, 1, 4, selection=COARSE)
    cache, parts = KeyValueCache(2, 2, 6, 1, k), []
    for a, b in pairwise(cuts):
        cache = cache.append(a, k[:, a:b], v[:, a:b])
        parts.append(cached_chunk_attention(q[:, a:b], cache, b, 4, selection=COARSE))
    assert relative_error(torch.cat(parts, dim=1), expected) < 1e-12


@pytest.mark.usefixtures("narrow")
def test_forks_and_rows_keep_their_trees() -> None:
    common, other = inputs(600, batch=3), inputs(500, batch=3, seed=1)
    q, k, v = common
    cache = KeyValueCache(3, 2, 6, 1, k).append(0, k, v)
    cached_chunk_attention(q[:, -1:], cache, 600, 4, selection=COARSE)
    for start, index in ((600, None), (300, None), (600, [2, 0])):
        rows = torch.arange(3) if index is None else torch.tensor(index)
        joined = [torch.cat([a[:, :start], b], 1)[rows] for a, b in zip(common, other, strict=True)]
        fork = cache if index is None else cache.rows(start, rows)
        fork = fork.append(start, other[1][rows], other[2][rows])
        got = cached_chunk_attention(other[0][rows], fork, start + 500, 4, selection=COARSE)
        expected = chunk_attention(*joined, 1, 4, selection=COARSE)[:, start:]
        assert relative_error(got, expected) < 1e-12


def test_a_needle_is_found_among_likes() -> None:
    """Forty phrases repeated 50 times with a little noise, and one chunk that is like none."""
    torch.manual_seed(0)
    phrases = torch.randn(40, 32)
    means = phrases.repeat(50, 1) + 0.02 * torch.randn(2000, 32)
    means[777] = 1.5 * torch.randn(32)
    q = torch.randn(1, 64, 1, 32)
    q[0, -1, 0] = means[777]
    k = torch.cat([means, torch.zeros(64, 32)])[None, :, None]
    cache = KeyValueCache(1, 1, 32, 1, k).append(0, k, k)
    found = [selected_chunks(q, cache, 2064, 8, s)[0, :, 0] for s in ("flat", COARSE)]
    assert 777 in found[1][-1]
    flat, coarse = ((q[0, :, 0, None] * k[0, x, 0]).sum(-1) for x in found)
    assert float((coarse >= flat.amin(1, keepdim=True)).double().mean()) > 0.9


def test_scores_are_never_held_at_once() -> None:
    """2,600 queries before 1,300 chunks."""
    q, k, v = (x.float() for x in inputs(2600, dim=4))
    with LargestTensor() as largest, torch.no_grad():
        chunk_attention(q, k, v, 2, 2, selection=COARSE)
    assert largest.elements <= 2600 * 4 * 1300 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "wanted"), [(5, 9), (40, 7), (129, 3), (504, 24), (1000, 7), (1000, 70)]
)
def test_largest_of_a_row(dtype: torch.dtype, count: int, wanted: int) -> None:
    """Random scores, and scores of which many are equal."""
    torch.manual_seed(0)
    for scores in (torch.randn(50, 1088).to(dtype), torch.randint(4, (50, 1088)).to(dtype)):
        index = torch.full((wanted + 1,), 7)
        scratch = [torch.empty(2, 1088, dtype=dtype), torch.empty(1088, dtype=torch.int64)]
        for row in range(50):
            arrays = [x.numpy() for x in (index, *scratch)]
            largest(scores.numpy(), row, count, wanted, *arrays)
            got = index[:wanted][index[:wanted] >= 0]
            assert got.max() < count
            assert len(set(got.tolist())) == len(got) == min(count, wanted)
            expected = scores[row, :count].topk(min(count, wanted)).values
            assert torch.equal(scores[row, got].sort(descending=True).values, expected)


@pytest.mark.parametrize(("count", "wanted"), [(100, 48), (900, 48), (1000, 7), (1000, 70)])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_largest_among_nan(count: int, wanted: int, odd: float) -> None:
    """Nothing is written beyond what is wanted, and every place is one of the row."""
    torch.manual_seed(0)
    for share in (0.01, 0.3, 0.9, 1.0):
        scores = torch.randn(50, 1088).masked_fill(torch.rand(50, 1088) < share, odd)
        index = torch.full((2000,), -7)
        scratch = [torch.empty(2, 1088), torch.empty(1088, dtype=torch.int64)]
        for row in range(50):
            arrays = [x.numpy() for x in (scores, index, *scratch)]
            largest(arrays[0], row, count, wanted, *arrays[1:])
            assert (index[wanted:] == -7).all()
            assert (index[:wanted] >= 0).all()
            assert (index[:wanted] < count).all()


def test_leaves_are_the_means_in_order() -> None:
    means = torch.randn(2, 1600, 5)
    grow = Trees(means).tree
    for chunks in (300, 800, 1536):
        built = grow(chunks)
        order = built.order_NP.unsqueeze(-1).expand(-1, -1, 5)
        members = torch.cat(built.leaves, dim=1).transpose(2, 3).flatten(1, 2)
        assert torch.equal(members, means.gather(1, order))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("topk", [3, 8])
def test_nan_chooses_something(topk: int) -> None:
    """And writes nowhere else; the other queries are not concerned."""
    q, k, v = (x.float() for x in inputs(1200))
    q[0, 1100] = torch.nan
    with torch.no_grad():
        o = chunk_attention(q, k, v, 1, topk, selection=COARSE)
    assert o[0, 1100].isnan().all()
    assert o[0, 1101:].isfinite().all()
