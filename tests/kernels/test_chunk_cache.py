"""The key/value cache and cached attention, and the flat selection of chunks.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

import random
from itertools import pairwise

import pytest
import torch
from measure import relative_error
from torch import Tensor

from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    cached_chunk_attention,
    chunk_attention,
)
from rwkvx_kernels.chunk_select import select_chunks

HEADS, KV_HEADS, DIM = 4, 2, 8


def inputs(tokens: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    q = torch.randn(batch, tokens, HEADS, DIM)
    k, v = (torch.randn(batch, tokens, KV_HEADS, DIM) for _ in range(2))
    return q.double(), k.double(), v.double()


def empty(batch: int, chunk: int) -> KeyValueCache:
    return KeyValueCache(batch, KV_HEADS, DIM, chunk, torch.zeros(0, dtype=torch.float64))


def read(
    args: tuple[Tensor, ...], cuts: list[int], chunk: int, topk: int, impl: str = "torch"
) -> tuple[Tensor, KeyValueCache]:
    """Read in the pieces that `cuts` = [0, ..., T] bounds."""
    q, k, v = args
    cache, parts = empty(q.shape[0], chunk), []
    for a, b in pairwise(cuts):
        cache = cache.append(a, k[:, a:b], v[:, a:b])
        parts.append(cached_chunk_attention(q[:, a:b], cache, b, topk, impl=impl))
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize(("chunk", "topk"), [(1, 3), (8, 1), (8, 3), (16, 4), (256, 2), (300, 2)])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_any_split_equals_the_whole(chunk: int, topk: int, impl: str) -> None:
    """700 tokens: the cache, of 512 at first, grows on the way."""
    args = inputs(700)
    expected = chunk_attention(*args, chunk, topk, impl="reference")
    draw = random.Random(chunk)
    cuts = sorted({0, 700, *(draw.randrange(1, 700) for _ in range(9)), 100, 101, 102})
    o, _ = read(args, cuts, chunk, topk, impl)
    assert relative_error(o, expected) < 1e-12


def test_token_by_token() -> None:
    args = inputs(70)
    expected = chunk_attention(*args, 8, 3, impl="reference")
    o, _ = read(args, list(range(71)), 8, 3)
    assert relative_error(o, expected) < 1e-12


def test_forks_do_not_disturb_one_another() -> None:
    """Two continuations of one state, then the first one again: 60 tokens in common."""
    common, left, right = inputs(60), inputs(40, seed=1), inputs(40, seed=2)
    _, cache = read(common, [0, 60], 8, 3)

    def go_on(other: tuple[Tensor, ...]) -> Tensor:
        q, k, v = other
        longer = cache.append(60, k[:, :25], v[:, :25])
        first = cached_chunk_attention(q[:, :25], longer, 85, 3)
        longer = longer.append(85, k[:, 25:], v[:, 25:])
        return torch.cat([first, cached_chunk_attention(q[:, 25:], longer, 100, 3)], dim=1)

    for other in (left, right, left, right):
        joined = tuple(torch.cat(pair, dim=1) for pair in zip(common, other, strict=True))
        expected = chunk_attention(*joined, 8, 3, impl="reference")[:, 60:]
        assert relative_error(go_on(other), expected) < 1e-12


def test_an_earlier_length_of_a_longer_cache() -> None:
    """What was written beyond a state's own length is invisible to it, chunk means included."""
    args = inputs(64)
    _, cache = read(args, [0, 64], 8, 3)
    q, k, v = (x[:, 40:43] for x in inputs(64, seed=3))
    longer = cache.append(40, k, v)
    assert longer is not cache
    joined = tuple(torch.cat([a[:, :40], b], 1) for a, b in zip(args, (q, k, v), strict=True))
    expected = chunk_attention(*joined, 8, 3, impl="reference")[:, 40:]
    assert relative_error(cached_chunk_attention(q, longer, 43, 3), expected) < 1e-12


def test_appending_is_in_place_while_nobody_else_wrote() -> None:
    q, k, v = inputs(600)
    cache = empty(2, 8).append(0, k[:, :10], v[:, :10])
    assert cache.append(10, k[:, 10:20], v[:, 10:20]) is cache
    assert cache.capacity == 512
    grown = cache.append(20, k[:, 20:], v[:, 20:])
    assert grown is not cache
    assert (cache.written, grown.written) == (20, 600)
    assert grown.capacity >= 600
    assert torch.equal(grown.k_BGSD[:, :, :600], k.transpose(1, 2))
    assert torch.equal(cache.k_BGSD[:, :, :20], k[:, :20].transpose(1, 2))


def test_growth_is_geometric() -> None:
    """A token at a time must not copy everything every time."""
    cache, copies = empty(1, 16), 0
    token = torch.zeros(1, 1, KV_HEADS, DIM, dtype=torch.float64)
    for length in range(3000):
        longer = cache.append(length, token, token)
        copies += longer is not cache
        cache = longer
    assert copies <= 7


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1, 1, 2, 2]])
def test_rows(rows: list[int]) -> None:
    args = inputs(50, batch=3)
    _, cache = read(args, [0, 37], 8, 3)
    index = torch.tensor(rows)
    picked = cache.rows(37, index)
    q, k, v = (x[index, 37:] for x in args)
    got = cached_chunk_attention(q, picked.append(37, k, v), 50, 3)
    expected = chunk_attention(*args, 8, 3, impl="reference")[index, 37:]
    assert relative_error(got, expected) < 1e-12
    assert cache.written == 37


def test_bfloat16_cache() -> None:
    """Means are float32; scores and sums are as without a cache."""
    args = tuple(x.bfloat16() for x in inputs(90))
    whole = chunk_attention(*args, 8, 3)
    q, k, v = args
    cache = KeyValueCache(2, KV_HEADS, DIM, 8, k)
    parts = []
    for a, b in [(0, 33), (33, 34), (34, 90)]:
        cache = cache.append(a, k[:, a:b], v[:, a:b])
        parts.append(cached_chunk_attention(q[:, a:b], cache, b, 3))
    o = torch.cat(parts, dim=1)
    assert o.dtype == torch.bfloat16
    assert cache.means_BGCD.dtype == torch.float32
    assert relative_error(o, whole) < 4e-3  # one rounding of the output
    assert cache.bytes_per_token() == KV_HEADS * DIM * (2 * 2 + 4 / 8)


def test_bad_lengths() -> None:
    q, k, v = inputs(10)
    cache = empty(2, 8).append(0, k, v)
    for tokens, length in ((10, 11), (10, 9)):
        with pytest.raises(ValueError, match="cache has 10"):
            cached_chunk_attention(q[:, :tokens], cache, length, 2)
    with pytest.raises(NotImplementedError, match="triton"):
        cached_chunk_attention(q, cache, 10, 2, impl="triton")
    assert cached_chunk_attention(q[:, :0], cache, 10, 2).shape == (2, 0, HEADS, DIM)


def brute_force(q: Tensor, means: Tensor, offset: int, chunk: int, slots: int) -> list[list[set]]:
    """Chosen chunks of query rows [N][T·R] by sorting all scores."""
    groups, tokens, heads, _ = q.shape
    scores = torch.einsum("ntrd,ncd->ntrc", q, means)
    found = []
    for n in range(groups):
        rows = []
        for t in range(tokens):
            past = (offset + t) // chunk
            for r in range(heads):
                order = scores[n, t, r, :past].argsort(descending=True)
                rows.append(set(order[:slots].tolist()))
        found.append(rows)
    return found


@pytest.mark.parametrize(
    ("chunks", "slots"), [(5, 7), (9, 1), (131, 1), (1297, 5), (5095, 3), (8193, 8)]
)
@pytest.mark.parametrize("impl", ["torch", "compiled"])
def test_selection_is_the_exact_top(impl: str, chunks: int, slots: int) -> None:
    """Streamed over tiles of chunks, with the top of group maxima first: the same as sorting."""
    torch.manual_seed(chunks)
    q, means = torch.randn(2, 6, 2, 2).double(), torch.randn(2, chunks, 2).double()
    chunk = 2
    offset = 2 * chunks - 5  # the last queries stand at the end; earlier ones lack the last chunks
    chosen = select_chunks(q, means.unsqueeze(1), chunk, slots + 1, offset, impl=impl).flatten(1, 2)
    expected = brute_force(q, means, offset, chunk, slots)
    for n in range(2):
        for row in range(12):
            assert set(chosen[n, row].tolist()) - {-1} == expected[n][row]


@pytest.mark.parametrize("impl", ["torch", "compiled"])
def test_selection_with_tied_scores(impl: str) -> None:
    """Equal scores: as many distinct chunks as wanted, none of them twice, none to come."""
    q, means = torch.ones(1, 40, 1, 2), torch.ones(1, 1, 5000, 2)
    chosen = select_chunks(q, means, 2, 9, 9000, impl=impl)
    for row, picked in enumerate(chosen[0, :, 0].tolist()):
        assert len(set(picked)) == 8
        assert all(0 <= c < (9000 + row) // 2 for c in picked)
