"""Coarse-to-fine selection in Triton, on a GPU or in its interpreter, against the reference.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

from itertools import pairwise

import pytest
import torch
from choices import check_choice, exactly, inputs, wide_forest
from measure import LargestTensor, assert_as_good, relative_error

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx_kernels import dispatch
from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    api,
    cached_chunk_attention,
    chunk_attention,
    triton_ops,
)
from rwkvx_kernels.chunk_select import common, forest, triton_decode, triton_descent
from rwkvx_kernels.chunk_select.trees import Trees
from rwkvx_kernels.chunk_select.triton_descent import descend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COARSE = "coarse_to_fine"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few nodes are kept and two levels descended, so that small trees are pruned at each."""
    monkeypatch.setattr(common, "beam_widths", lambda topk: (4, 2))
    monkeypatch.setattr(common, "DENSE_NODES", 8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 32 chunks, of which a query keeps one node: pruned after 64 chunks."""
    monkeypatch.setattr(common, "beam_widths", lambda topk: (1, 1))
    monkeypatch.setattr(common, "RUN", 32)


@pytest.mark.usefixtures("narrow")
def test_choice() -> None:
    """Behind 508 chunks: the trees of 256 and then of 512; runs of two lengths behind 1,280."""
    check_choice(518, 10, 2)
    check_choice(1300, 3, 9, heads=2, groups=2, batch=2, dim=20)


@pytest.mark.usefixtures("narrow")
def test_choice_by_two_levels() -> None:
    """1,024 + 256 · 3 chunks: two nodes of the upper level, and nodes without parent."""
    check_choice(1793, 3, 4)
    check_choice(2900, 3, 4, heads=1, groups=1)


def test_choice_with_the_usual_beam() -> None:
    check_choice(2700, 5, 8, heads=1, groups=1, dim=40)


@pytest.mark.usefixtures("narrow")
def test_tiles_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are held for 64 queries at once, whatever stands before them."""
    monkeypatch.setattr(triton_descent, "TILE_SCORES", 1)
    check_choice(560, 66, 3, heads=1, groups=1, dim=4)
    q, k, _ = inputs(1100, heads=1, groups=1, dim=4)
    means = k.transpose(1, 2).contiguous()
    trees = Trees(means[0]).forest(1100)
    with LargestTensor() as largest:
        descend(q[:, -70:].contiguous(), means, trees, 1030, 1, 3)
    assert largest.elements <= 64 * 4 * common.FANOUT * 4 < 70 * 1100  # at times counted in bytes


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("cuts", [[700], [256, 300, 1023, 1025, 1800], list(range(0, 1801, 100))])
def test_growing_is_building(cuts: list[int]) -> None:
    """In pieces, with copies of less and of more room, and for every tree that it stands for."""
    torch.manual_seed(0)
    means = torch.randn(2, 1800, 5).double()
    whole = forest.room_for(means)
    forest.grow(whole, means, 0, 1800)
    room, grown = forest.room_for(means[:, : max(cuts[0], 256)]), 0
    for chunks in [*cuts, 1800]:
        old, room = room, forest.room_for(means[:, : max(chunks, 256)])
        room.fill(old, grown, torch.tensor([0, 1]))
        forest.grow(room, means, grown, chunks)
        grown = chunks
    for length in (256, 1024, 1280, 1792):
        built = Trees(means).tree(length)
        for kept in (whole, room):
            start = 0
            for i, run in reversed(list(enumerate(forest.run_lengths(length)))):
                stop = length // run * run
                assert torch.equal(kept.order_SNC[i, :, start:stop], built.order_NP[:, start:stop])
                for level in range(1, len(built.nodes) + 1):
                    nodes = built.level(level)
                    part = slice(start // common.FANOUT**level, stop // common.FANOUT**level)
                    got = kept.nodes[level - 1][i][:, part, : nodes.shape[2]]
                    assert torch.allclose(got, nodes[:, part])
                start = stop


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("chunk", "heads", "dim"), [(16, 2, 24), (32, 1, 16)])
def test_outputs_and_gradients(chunk: int, heads: int, dim: int) -> None:
    args = inputs(chunk * 66 + 5, heads, 1, dim)
    results = []
    for impl, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in args]
        o = chunk_attention(*leaves, chunk, 2, impl=impl, selection=COARSE)
        torch.manual_seed(9)
        (o * torch.randn(o.shape).to(o)).sum().backward()
        results.append([o.detach(), *(x.grad for x in leaves)])
    assert_as_good(*results, 4.0, ("o", "dq", "dk", "dv"))
    flat = chunk_attention(*args, chunk, 2, impl="reference")
    assert relative_error(results[0][0][:, chunk * 64 :], flat[:, chunk * 64 :]) > 1e-3


@pytest.mark.usefixtures("tiny")
def test_pieces_and_forks() -> None:
    """Read in pieces, long ones and single tokens, into a cache that grows; and from a fork."""
    q, k, v = inputs(16 * 100 + 3, 2, 1, 16)
    end = q.shape[1]
    exact = chunk_attention(
        *(x.double() for x in (q, k, v)), 16, 2, impl="reference", selection=COARSE
    )
    cache = KeyValueCache(1, 1, 16, 16, k, 1030).append(0, k[:, :1030], v[:, :1030])
    cuts = [1030, 1033, 1060, 1550, 1551, end]
    for _ in range(2):
        for a, b in pairwise(cuts):
            cache = cache.append(a, k[:, a:b], v[:, a:b])
            part = q[:, max(a, b - 20) : b]  # the others are as good as these
            got = cached_chunk_attention(part, cache, b, 2, "triton", COARSE)
            assert relative_error(got, exact[:, b - part.shape[1] : b]) < 1e-6
        cuts = [1590, end]  # a fork: what stands there is written by the first


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("split", [64, 512])
def test_decoding_sequences_of_unequal_length(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind two levels, one, two runs, none; chunks behind the lengths are another's."""
    monkeypatch.setattr(triton_decode, "MOST_SPLIT", split)
    monkeypatch.setattr(triton_decode, "LEAST_BLOCK", 32)
    q, k, v = inputs(4 * 1400, 2, 1, 12, batch=5)
    cache = KeyValueCache(5, 1, 12, 4, k).append(0, k, v)
    means = cache.means_BGCD
    cached = (cache.k_BGSD, cache.v_BGSD, means, wide_forest(means, 1400))
    lengths = [4 * 1400, 4 * 1027 + 1, 4 * 600 - 1, 4 * 256 + 1, 9]
    part = torch.cat([q[i : i + 1, n - 2 : n] for i, n in enumerate(lengths)])
    got = triton_ops.decode_triton(part, *cached, torch.tensor(lengths, device=DEVICE), 4, 3)
    for i, n in enumerate(lengths):
        wide = [q[i : i + 1, n - 2 : n], k[i : i + 1, :n], v[i : i + 1, :n]]
        exact, flat = (exactly(*(x.double() for x in wide), 4, 3, s) for s in (COARSE, "flat"))
        assert relative_error(got[i : i + 1], exact) < 1e-6
        assert i > 2 or relative_error(exact, flat) > 1e-3


@pytest.mark.usefixtures("narrow")
def test_choice_repeats_and_ignores_neighbours() -> None:
    """Queries alone choose what they choose among others, and again."""
    q, k, _ = inputs(600, heads=2, groups=1)
    means = k.transpose(1, 2).contiguous()
    trees = Trees(means[0]).forest(600)
    whole, again = (descend(q[:, -9:].contiguous(), means, trees, 591, 1, 4) for _ in range(2))
    assert torch.equal(whole, again)
    part = descend(q[:, -6:-4].contiguous(), means, trees, 594, 1, 4)
    assert torch.equal(part, whole[:, -6:-4])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("slots", [1, 3, 31, 39])
def test_nodes_are_kept_as_the_best_are(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two levels, nodes without parent among them; of equal ones the first."""
    monkeypatch.setattr(common, "beam_widths", lambda topk: (slots, 2))
    q, k, _ = inputs(1300, heads=2, groups=1)
    means = k.transpose(1, 2).contiguous()
    means[:, :, 64:128] = means[:, :, :64]
    keep, best, levels = triton_descent.keep_members, triton_descent.best_members, []

    def both(q, table, trees, level, kept, scores, *place):  # type: ignore[no-untyped-def]
        found = keep(q, table, trees, level, kept, scores, *place)
        children = None
        if kept is not None:
            children = scores[..., : kept.shape[3] * common.FANOUT].contiguous()
        expected = best(q, table, trees, level, kept, children, *place)
        assert torch.equal(found.sort().values, expected.sort().values)
        assert int((found >= 0).sum()) > 0
        levels.append(level)
        return found

    monkeypatch.setattr(triton_descent, "keep_members", both)
    descend(q[:, -3:].contiguous(), means, wide_forest(means, 1300), 1297, 1, 3)
    assert levels == [2, 1]


@pytest.mark.usefixtures("narrow")
def test_not_a_number_chooses_something() -> None:
    q, k, _ = inputs(600, heads=1, groups=1)
    q[0, -3] = torch.nan
    means = k.transpose(1, 2).contiguous()
    trees = Trees(means[0]).forest(600)
    chosen = descend(q[:, -5:].contiguous(), means, trees, 595, 1, 4)
    assert bool(((chosen >= 0) & (chosen < 600)).all())


@pytest.mark.usefixtures("tiny")
def test_operators() -> None:
    q, k, v = inputs(16 * 65 + 3, 1, 1, 16)
    few = [x[:, :20].contiguous().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.rwkvx.select_chunks_whole, (*few[:2], None, True, 16, 2))
    cache = KeyValueCache(1, 1, 16, 16, k).append(0, k, v)
    trees = cache.trees.forest(65)
    cached = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD, trees)
    part, length = q[:, -2:].contiguous(), q.shape[1]
    torch.library.opcheck(torch.ops.rwkvx.select_chunks, (part, *cached[2:], length - 2, 16, 2))
    lengths = torch.tensor([length], device=DEVICE)
    torch.library.opcheck(torch.ops.rwkvx.chunk_attention_decode, (part, *cached, lengths, 16, 2))


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda device: True)
    called = []
    monkeypatch.setattr(api, "_triton", lambda q, *args: called.append(args[-1]) or q)
    chunk_attention(*inputs(40), 16, 2, selection=COARSE)
    assert called == [COARSE]
