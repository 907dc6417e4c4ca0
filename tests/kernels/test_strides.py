"""Every public kernel function takes tensors of any strides: what counts is the values.

Axes: B batch, T time, H heads, G key/value heads, D head size, C width.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from measure import relative_error
from torch import Tensor

from rwkvx_kernels.channel_mix import squared_relu
from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    attend_chunks,
    cached_chunk_attention,
    chunk_attention,
    selected_chunks,
)
from rwkvx_kernels.chunk_select import chunk_means, select_chunks
from rwkvx_kernels.linear import linear, linear_cross_entropy, low_rank
from rwkvx_kernels.time_mix import TimeMixWeights, time_mix
from rwkvx_kernels.token_shift import Norm, token_shift
from rwkvx_kernels.wkv7 import wkv7

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, G, D = 2, 37, 4, 2, 16
C = H * D
TARGETS = torch.arange(T, device=DEVICE)


def transposed(x: Tensor) -> Tensor:
    """The last two axes lie the other way round."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x


def sliced(x: Tensor) -> Tensor:
    """A part of a larger tensor."""
    return torch.cat([x, torch.full_like(x, 7)], dim=-1)[..., : x.shape[-1]]


def apart(x: Tensor) -> Tensor:
    """Elements that do not lie together."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def first_axis_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


VIEWS = [transposed, sliced, apart, first_axis_last]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def tokens(count: int) -> list[Tensor]:
    return [normal(B, T, H, D) * 0.3 for _ in range(count)]


def recurrence(impl: str) -> tuple[Callable[..., Any], list[Tensor]]:
    r, decay, k, v, alpha, beta = tokens(6)
    args = [r, -decay.sigmoid(), k, v, alpha, beta, normal(B, H, D, D)]
    return lambda *x: wkv7(*x, impl=impl), args


def mixed(impl: str) -> tuple[Callable[..., Any], list[Tensor]]:
    def call(*x: Tensor) -> Any:
        weights = TimeMixWeights(*x[8:16])
        return time_mix(*x[:6], (x[6], x[7]), weights, 1e-5, x[16], impl=impl)

    weights = [normal(C) for _ in TimeMixWeights._fields]
    weights[TimeMixWeights._fields.index("r_k")] = normal(H, D)
    return call, [*(normal(B, T, C) for _ in range(8)), *weights, normal(B, H, D, D)]


def keys() -> list[Tensor]:
    return [normal(B, T, H, D), normal(B, T, G, D), normal(B, T, G, D)]


def cached(impl: str) -> tuple[Callable[..., Any], list[Tensor]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cache = KeyValueCache(B, G, D, 16, k).append(0, k[:, :20], v[:, :20])
        cache = cache.append(20, k[:, 20:], v[:, 20:])
        parts = [cached_chunk_attention(q[:, -n:], cache, T, 2, impl=impl) for n in (1, 5, 12)]
        return [*parts, selected_chunks(q[:, -3:], cache, T, 2)]

    return call, keys()


def select(impl: str, selection: str = "flat") -> tuple[Callable[..., Any], list[Tensor]]:
    def call(q: Tensor, k: Tensor, means: Tensor) -> Any:
        return [
            chunk_means(k.transpose(1, 2), 5),
            select_chunks(q, means, 2, 4, selection=selection, impl=impl),
        ]

    return call, [normal(B, T, H, D), normal(B, T, G, D), normal(B, G, T // 2, D)]


def attend(impl: str) -> tuple[Callable[..., Any], list[Tensor]]:
    chosen = torch.full((B, T, H, 2), -1, device=DEVICE)
    chosen[:, 16:, :, 1] = 0
    return lambda *x: attend_chunks(*x[:3], x[3].long(), 16, impl=impl), [*keys(), chosen.float()]


CALLS: dict[str, tuple[list[str], Callable[[str], tuple[Callable[..., Any], list[Tensor]]]]] = {
    "wkv7": (["reference", "torch", "compiled", "triton"], recurrence),
    "time_mix": (["reference", "torch", "compiled", "triton"], mixed),
    "token_shift": (
        ["reference", "torch", "triton"],
        lambda impl: (
            lambda x, before, *mixes: token_shift(x, before, mixes, impl=impl),
            [normal(B, T, C), normal(B, C), *(normal(C) for _ in range(3))],
        ),
    ),
    "token_shift of normed tokens": (
        ["reference", "torch", "triton"],
        lambda impl: (
            lambda x, before, weight, bias, *mixes: token_shift(
                x, before, mixes, impl=impl, norm=Norm(weight, bias, 1e-5)
            ),
            [normal(B, T, C), normal(B, C), *(normal(C) for _ in range(4))],
        ),
    ),
    "squared_relu": (
        ["reference", "torch", "triton"],
        lambda impl: (
            lambda x: squared_relu(x.clone(memory_format=torch.preserve_format), impl, True),
            [normal(B, T, C)],
        ),
    ),
    "linear": (
        ["reference", "torch", "compiled"],
        lambda impl: (
            lambda x, one, w: [linear(x, w, impl=impl), linear(one, w, impl=impl), linear(one, w)],
            [normal(B, T, C), normal(1, C), normal(24, C)],
        ),
    ),
    "low_rank": (
        ["reference", "torch", "compiled"],
        lambda impl: (
            lambda x, one, a, b: [low_rank(y, a, b, "tanh", impl) for y in (x, one)],
            [normal(B, T, C), normal(1, C), normal(C, 8), normal(8, C)],
        ),
    ),
    "cross_entropy": (
        ["auto"],
        lambda _: (
            lambda x, w, weights: linear_cross_entropy(x, w, TARGETS, weights.square(), 99),
            [normal(T, D), normal(50, D), normal(T)],
        ),
    ),
    "select_chunks": (["reference", "torch", "compiled", "triton"], select),
    "attend_chunks": (["reference", "torch", "compiled", "triton"], attend),
    "chunk_attention": (
        ["reference", "torch", "compiled", "triton"],
        lambda impl: (lambda *x: chunk_attention(*x, 16, 2, impl=impl), keys()),
    ),
    "cached_chunk_attention": (["reference", "torch", "compiled", "triton"], cached),
}
CASES = [(name, impl) for name, (impls, _) in CALLS.items() for impl in impls]


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_views_give_what_contiguous_tensors_give(name: str, impl: str) -> None:
    """All arguments at once, without gradients and with them."""
    if impl == "triton" and not find_spec("triton"):
        pytest.skip("needs triton (the extra gpu)")
    if impl == "compiled" and DEVICE == "cuda":
        pytest.skip("compiled loops run on a CPU")
    torch.manual_seed(0)
    call, args = CALLS[name][1](impl)
    views = VIEWS[:1] if impl == "triton" and DEVICE == "cpu" else VIEWS  # the interpreter is slow
    expected = flat(call(*args))
    for view in views:
        given = [view(x) for x in args]
        kept = [x.clone() for x in given]
        for got, want in zip(flat(call(*given)), expected, strict=True):
            assert relative_error(got.double(), want.double()) < 1e-6, view.__name__
        assert all(map(torch.equal, given, kept)), f"{view.__name__}: an argument was written to"
    shared = [x[:1].expand_as(x) for x in args]
    for got, want in zip(
        flat(call(*shared)), flat(call(*(x.contiguous() for x in shared))), strict=True
    ):
        assert relative_error(got.double(), want.double()) < 1e-6
    if impl != "compiled" and name not in ("select_chunks", "cached_chunk_attention"):
        gradients(call, args, views[0])


def gradients(
    call: Callable[..., Any], args: list[Tensor], view: Callable[[Tensor], Tensor]
) -> None:
    made = []
    for change in (torch.Tensor.clone, view):
        leaves = [x.clone().requires_grad_() for x in args]
        results = flat(call(*map(change, leaves)))
        torch.manual_seed(1)
        sum((x * torch.randn(x.shape).to(x)).sum() for x in results).backward()
        made.append([x.grad for x in leaves])
    for got, want in zip(*made, strict=True):
        if want is not None:
            assert got is not None
            assert relative_error(got, want) < 1e-5
