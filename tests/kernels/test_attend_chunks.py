"""Attention to a choice that anybody made: against one softmax per query, gathered by hand.

Axes: B batch, T queries, S tokens, H query heads, G key/value heads, D head size, K chunks chosen.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from measure import FLOOR, LargestTensor, assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    attend_chunks,
    cached_chunk_attention,
    chunk_attention,
    torch_form,
)
from rwkvx_kernels.chunk_select import chunk_means, select_chunks
from rwkvx_kernels.dispatch import UnsupportedError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "dq", "dk", "dv")
IMPLS = ["reference", "torch", *(["triton"] if find_spec("triton") else [])]
HEADS, GROUPS, DIM = 4, 2, 16


def inputs(queries: int, tokens: int, batch: int = 1, dim: int = DIM) -> list[Tensor]:
    torch.manual_seed(tokens)
    q = torch.randn(batch, queries, HEADS, dim)
    k, v = (torch.randn(batch, tokens, GROUPS, dim) for _ in range(2))
    return [x.to(DEVICE) for x in (q, k, v)]


def any_choice(queries: int, tokens: int, chunk: int, slots: int, batch: int = 1) -> Tensor:
    """Random chunks before each query's own, each once, among -1 in any place."""
    torch.manual_seed(slots)
    own = torch.arange(tokens - queries, tokens) // chunk
    ranks = torch.rand(batch, queries, HEADS, tokens // chunk + slots).argsort(dim=-1)[..., :slots]
    return ranks.masked_fill(ranks >= own[:, None, None], -1).to(DEVICE)


def by_hand(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk: int) -> Tensor:
    """One softmax over what each query reads, in the dtype given."""
    first, group = k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    o = []
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        own = torch.arange((first + t) // chunk * chunk, first + t + 1)
        past = [
            torch.arange(c * chunk, (c + 1) * chunk) for c in chosen[b, t, h].tolist() if c >= 0
        ]
        rows = torch.cat([own, *past]).to(q.device)
        keys, values = k[b, rows, h // group], v[b, rows, h // group]
        o.append((keys @ q[b, t, h] * q.shape[3] ** -0.5).softmax(0) @ values)
    return torch.stack(o).view(q.shape)


def with_gradients(attend: Any, args: list[Tensor], *rest: Any) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in args]
    o = attend(*leaves, *rest)
    torch.manual_seed(1)
    (o * torch.randn(o.shape).to(o)).sum().backward()
    return [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("queries", "tokens", "chunk", "slots", "batch"),
    [(70, 70, 16, 3, 2), (5, 83, 16, 4, 1), (40, 40, 16, 0, 1), (20, 600, 256, 2, 1)],
)
def test_any_choice(
    queries: int, tokens: int, chunk: int, slots: int, batch: int, impl: str
) -> None:
    """Whole sequences and their last tokens; slots that are empty, all or some of them."""
    if impl == "triton" and tokens > 100:
        pytest.skip("takes long in the interpreter")
    args, chosen = inputs(queries, tokens, batch), any_choice(queries, tokens, chunk, slots, batch)
    exact = with_gradients(by_hand, [x.double() for x in args], chosen, chunk)
    reference = with_gradients(by_hand, args, chosen, chunk)
    got = with_gradients(attend_chunks, args, chosen, chunk, impl)
    assert_as_good(got, reference, exact, 4.0, NAMES)
    if impl != "triton":
        wide = with_gradients(attend_chunks, [x.double() for x in args], chosen, chunk, impl)
        assert_as_good(wide, exact, exact, 1e3, NAMES)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled loops run on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_choice_compiled(dtype: torch.dtype) -> None:
    args, chosen = [x.to(dtype) for x in inputs(60, 70, 2)], any_choice(60, 70, 16, 3, 2)
    exact = by_hand(*(x.double() for x in args), chosen, 16)
    got = attend_chunks(*args, chosen, 16, impl="compiled")
    assert got.dtype == dtype
    assert relative_error(got, exact) < 10 * FLOOR[dtype]
    with pytest.raises(UnsupportedError, match=r"has no torch\.float16"):
        attend_chunks(*(x.half() for x in args), chosen, 16, impl="compiled")
    with pytest.raises(UnsupportedError, match="has no gradients"):
        attend_chunks(args[0].requires_grad_(), *args[1:], chosen, 16, impl="compiled")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_chunk_that_stands_twice_counts_twice(impl: str) -> None:
    args, chosen = inputs(40, 40), torch.full((1, 40, HEADS, 4), -1, device=DEVICE)
    chosen[:, 20:] = torch.tensor([-1, 0, 0, -1], device=DEVICE)
    exact = by_hand(*(x.double() for x in args), chosen, 16)
    assert relative_error(attend_chunks(*args, chosen, 16, impl=impl), exact) < 1e-6


def test_composed_of_the_two_halves() -> None:
    q, k, v = inputs(150, 150)
    chosen = select_chunks(q, chunk_means(k.transpose(1, 2), 16), 16, 4)
    assert chosen.shape == (1, 150, HEADS, 3)
    expected = chunk_attention(q, k, v, 16, 4)
    assert relative_error(attend_chunks(q, k, v, chosen.to(torch.int32), 16), expected) < 1e-6


def test_what_cannot_be_chosen_is_refused() -> None:
    q, k, v = inputs(40, 40)
    chosen = torch.zeros(1, 40, HEADS, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"chosen must be integers \[1, 40, 4, 'K'\]"):
        attend_chunks(q, k, v, chosen[:, :5], 16)
    with pytest.raises(ValueError, match="the last of 30 tokens"):
        attend_chunks(q, k[:, :30], v[:, :30], chosen, 16)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="do not lie before the query's own"):
            attend_chunks(q, k, v, chosen, 16)


def readers(chosen: Tensor, token: int, chunk: int, first: int) -> Tensor:
    """Which queries [B, T, H] read a token."""
    position = torch.arange(first, first + chosen.shape[1], device=chosen.device).view(1, -1, 1)
    own = (position // chunk == token // chunk) & (position >= token)
    return own | (chosen == token // chunk).any(dim=-1)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("impl", [*IMPLS, *(["compiled"] if DEVICE == "cpu" else [])])
@pytest.mark.parametrize("chunk", [16, 256])
def test_what_is_not_finite_spoils_its_readers_alone(
    chunk: int, impl: str, where: str, bad: float
) -> None:
    """Through both halves: the same choice as others make, and every other output as without."""
    if impl == "triton" and chunk > 16:
        pytest.skip("takes long in the interpreter")
    tokens, token, topk = 5 * chunk + 3, chunk + 4, 3
    q, k, v = inputs(tokens, tokens)
    args = {"q": q, "k": k.clone(), "v": v.clone()}
    args[where][0, token, :, 3] = bad
    means = chunk_means(args["k"].transpose(1, 2), chunk)
    assert means.isfinite().all()
    chosen = select_chunks(q, means, chunk, topk, impl=impl)
    spoiled = readers(chosen, token, chunk, 0)
    assert 0.1 < float(spoiled.double().mean()) < 0.9
    clean = attend_chunks(q, k, v, chosen, chunk, impl="reference")
    got = chunk_attention(*args.values(), chunk, topk, impl=impl)
    assert relative_error(got[~spoiled], clean[~spoiled]) < 1e-6
    if bad != bad:
        assert got[spoiled].isnan().any(dim=-1).all()
    cache = KeyValueCache(1, GROUPS, DIM, chunk, k).append(0, args["k"], args["v"])
    for count in (1, 7, chunk + 2):
        part = cached_chunk_attention(q[:, -count:], cache, tokens, topk, impl=impl)
        fine = ~spoiled[:, -count:]
        assert relative_error(part[fine], clean[:, -count:][fine]) < 1e-6


@pytest.mark.skipif(DEVICE == "cuda", reason="products of a CPU")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("mkl", [False, True])
@pytest.mark.parametrize("queries", [1000, 30])  # many of a chunk, and few
def test_products_of_any_processor(
    queries: int, mkl: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a cache in bfloat16, whatever the processor multiplies fast; NaN in its readers."""
    monkeypatch.setattr(torch_form, "mkl_is_fast", lambda: mkl)
    monkeypatch.setattr(torch_form, "multiplies_bfloat16", lambda: narrow)
    chunk, tokens, topk, dim = 256, 1500, 3, 24  # 24: the scale is no power of two
    q, k, v = (x.bfloat16() for x in inputs(queries, tokens, dim=dim))
    exact = (x.double() for x in (q, k, v))
    means = chunk_means(k.transpose(1, 2), chunk)
    chosen = select_chunks(q, means, chunk, topk, tokens - queries)
    expected = attend_chunks(*exact, chosen, chunk, impl="reference")
    token = 600
    v[0, token, :, 3] = torch.nan
    spoiled = readers(chosen, token, chunk, tokens - queries)
    cache = KeyValueCache(1, GROUPS, dim, chunk, k).append(0, k, v)
    got = cached_chunk_attention(q, cache, tokens, topk, impl="torch")
    assert 0 < int(spoiled.sum()) < spoiled.numel()
    assert got[spoiled][:, 3].isnan().all()
    assert relative_error(got[~spoiled], expected[~spoiled]) < FLOOR[torch.bfloat16]


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_queries_that_do_not_read_it(impl: str, where: str) -> None:
    args = dict(zip("qkv", inputs(70, 70), strict=True))
    chosen, token = any_choice(70, 70, 16, 2), 20
    fine = ~readers(chosen, token, 16, 0).all(dim=-1)[0]
    fine = fine & ~readers(chosen, token, 16, 0).any(dim=-1)[0]
    expected = with_gradients(attend_chunks, list(args.values()), chosen, 16, "reference")
    args[where] = args[where].clone()
    args[where][0, token] = torch.nan
    leaves = [x.requires_grad_() for x in args.values()]
    o = attend_chunks(*leaves, chosen, 16, impl)
    torch.manual_seed(1)
    weights = torch.randn(o.shape).to(o)
    (o[:, fine] * weights[:, fine]).sum().backward()
    got = leaves[0].grad
    assert fine.any()
    assert got is not None
    assert expected[1] is not None
    assert relative_error(got[:, fine], expected[1][:, fine]) < 1e-5


@pytest.mark.parametrize("selection", ["flat", "coarse_to_fine"])
@pytest.mark.parametrize("impl", [*IMPLS, *(["compiled"] if DEVICE == "cpu" else [])])
def test_more_chunks_than_there_are_cost_nothing(impl: str, selection: str) -> None:
    """Top 100,000 of a few chunks: the same output in the same memory, whole, cached, decoded."""
    chunks = 3 if impl == "triton" else 7  # the interpreter is slow
    q, k, v = (x[:, :, :1] for x in inputs(16 * chunks, 16 * chunks))
    cache = KeyValueCache(1, 1, DIM, 16, k).append(0, k, v)
    found = []
    for topk in (chunks, 100_000):
        with LargestTensor() as largest:
            parts = [
                cached_chunk_attention(q[:, -count:], cache, 16 * chunks, topk, impl, selection)
                for count in (1, 20)
            ]
            parts.append(chunk_attention(q, k, v, 16, topk, impl=impl, selection=selection))
        found.append((torch.cat(parts, dim=1), largest.elements))
    assert relative_error(found[1][0], found[0][0]) < 1e-6
    # Triton kernels are compiled for 16 slots or more.
    assert found[1][1] <= found[0][1] * (17 / chunks if impl == "triton" else 1)
