"""Flat selection in Triton, on a GPU or in its interpreter: rounding, ties, what is not finite.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

import pytest
import torch
from choices import sets_of
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx_kernels.chunk_select import api, chunk_means, select_chunks
from rwkvx_kernels.chunk_select.triton_means import means_of
from rwkvx_kernels.dispatch import Facts, UnsupportedError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a score, relative to the sum of its products' sizes: two parts of 8 bits of each mean, where
# the queries have 8 bits; of both, without the product of the second parts; three parts, and the
# sums of float32. A conversion that cuts off, as the interpreter's, loses twice as much.
ROUNDING = {torch.bfloat16: 2.0**-15, torch.float16: 3 * 2.0**-15, torch.float32: 2.0**-20}


def scores_of(q: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Exact scores of past chunks, of one token each, -inf for the others, and the sizes of their
    products: [B, H, T, C]."""
    q, keys = q.double().transpose(1, 2), means.double()
    past = torch.ones(q.shape[2], keys.shape[2], device=q.device).tril(-1).bool()
    size = q.abs() @ keys.abs().transpose(2, 3)
    return (q @ keys.transpose(2, 3)).masked_fill(~past, -torch.inf), size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 40])
def test_only_near_ties_fall_otherwise(dtype: torch.dtype, dim: int) -> None:
    """Every fourth key is nearly the one before: rows with such a pair at the end of the list may
    choose the other one of it, all others are exact."""
    torch.manual_seed(dim)
    tokens, slots = 210, 3
    q = torch.randn(1, tokens, 2, dim, device=DEVICE).to(dtype)
    means = torch.randn(1, 2, tokens, dim, device=DEVICE)
    nearly = 1 + 2.0**-19 * torch.randn(1, 1, 1, dim).to(means)
    means[:, :, 1::4] = means[:, :, ::4][:, :, : len(range(1, tokens, 4))] * nearly
    scores, size = scores_of(q, means)
    chosen = select_chunks(q, means, 1, slots + 1, impl="triton")
    assert torch.equal(chosen, select_chunks(q, means, 1, slots + 1, impl="triton"))
    got = sets_of(chosen, tokens)
    best = scores.topk(slots, dim=-1).indices
    exact = torch.zeros_like(got).scatter(-1, best, True) & (scores > -torch.inf)
    assert torch.equal(got.sum(-1), exact.sum(-1))
    given_up = scores.masked_fill(~(exact & ~got), -torch.inf).amax(-1)
    taken = scores.masked_fill(~(got & ~exact), torch.inf).amin(-1)
    otherwise = (got != exact).any(-1)
    rounding = ROUNDING[dtype] * size.amax(-1)
    assert (given_up - taken)[otherwise].le(2 * rounding[otherwise]).all()
    ordered = scores.sort(dim=-1, descending=True).values
    near = ordered[..., slots - 1] - ordered[..., slots] <= 2 * rounding
    assert not (otherwise & ~near).any()
    # Both kinds were there.
    assert int((~near).sum()) > 100
    if dtype != torch.float32:  # three parts are all there is of float32
        assert int(otherwise.sum()) > 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 7, 17])
def test_equal_scores_go_to_the_smaller_chunk(dtype: torch.dtype, slots: int) -> None:
    """Small integers, whose scores are exact; 17 are more than one list holds."""
    torch.manual_seed(slots)
    tokens = 150
    q = torch.randint(-1, 2, (1, tokens, 1, 16), device=DEVICE).to(dtype)
    means = torch.randint(-1, 2, (1, 1, tokens, 16), device=DEVICE).float()
    scores, _ = scores_of(q, means)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    best = best.masked_fill(scores.gather(-1, best) == -torch.inf, -1).transpose(1, 2)
    chosen = select_chunks(q, means, 1, slots + 1, impl="triton")
    assert torch.equal(chosen.long(), best)
    tied = scores.sort(dim=-1, descending=True).values
    assert int((tied[..., slots - 1] == tied[..., slots])[..., 30:].sum()) > 20


def test_queries_that_are_not_finite_leave_the_others_alone() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 60, 2, 16, device=DEVICE)
    means = torch.randn(1, 1, 60, 16, device=DEVICE)
    expected = select_chunks(q, means, 1, 4, impl="triton")
    q[0, 30, 0], q[0, 40, 1, 3], q[0, 41, 1, 3] = torch.nan, torch.inf, -torch.inf
    chosen = select_chunks(q, means, 1, 4, impl="triton")
    same = (chosen == expected).all(dim=-1)
    same[0, 30, 0] = same[0, 40, 1] = same[0, 41, 1] = True
    assert same.all()
    assert bool(((chosen >= 0) & (chosen < 42))[0, [30, 40, 41]].all())


@pytest.mark.parametrize(("tokens", "chunk"), [(100, 16), (70, 7), (3, 16), (16, 16), (300, 80)])
def test_means(tokens: int, chunk: int) -> None:
    """Of keys of any strides; what is not finite counts for nothing."""
    torch.manual_seed(tokens)
    k = torch.randn(2, 3, tokens, 24, device=DEVICE).transpose(1, 2)
    k[0, 1, 0, 3], k[1, 2, 1, 4] = torch.nan, torch.inf
    expected = chunk_means(k.double().transpose(1, 2), chunk)
    got = means_of(k, chunk)
    assert got.shape == expected.shape
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "offset"), [(0, 0), (1, 0), (5, 0), (1, 16), (3, 15)])
def test_nothing_and_one_chunk(tokens: int, offset: int) -> None:
    q = torch.randn(2, tokens, 4, 16, device=DEVICE)
    means = torch.randn(2, 2, 1, 16, device=DEVICE)
    chosen = select_chunks(q, means, 16, 4, offset, impl="triton")
    own = (offset + torch.arange(tokens, device=DEVICE)) // 16
    expected = torch.full((2, tokens, 4, 3), -1, device=DEVICE)
    expected[..., 0] = torch.where(own > 0, 0, -1)[None, :, None]
    assert torch.equal(chosen.long(), expected)


def test_heads_beyond_the_table() -> None:
    q, means = torch.randn(1, 20, 1, 200, device=DEVICE), torch.randn(1, 1, 2, 200, device=DEVICE)
    with pytest.raises(UnsupportedError, match="heads of 200") as error:
        select_chunks(q, means, 10, 2, impl="triton")
    assert "\n" not in str(error.value)
    assert select_chunks(q, means, 10, 2).shape == (1, 20, 1, 1)
    facts = Facts(torch.device("cuda"))
    if DEVICE == "cpu":
        assert api.choose(facts, "flat", "auto", 200).impl == "torch"
        assert api.choose(facts, "flat", "auto", 64).impl == "triton"
