"""Gradients of the compiled recurrence on a CPU, against the recurrence itself in float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.wkv7 import wkv7
from rwkvx_kernels.wkv7.numba_gradients import KEYS, PIECE

HEADS, V = 2, 24
NAMES = ("y", "state", "dr", "dlog_decay", "dk", "dv", "dalpha", "dbeta", "dinitial_state")
LENGTHS = [0, 1, 2, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5]
# Token by token as the reference, sums in another order.
FACTOR = 4.0


def inputs(batch: int, tokens: int, keys: int, steepest: float = 0.6065) -> list[Tensor]:
    """r, log_decay, k, v, alpha, beta as a time mix makes them, in float64."""
    shape = (batch, tokens, HEADS, keys)
    r, k, kk, gate, decay = (torch.randn(shape, dtype=torch.float64) for _ in range(5))
    v, kk = torch.randn(*shape[:3], V, dtype=torch.float64), F.normalize(kk, dim=-1)
    return [r, -steepest * decay.sigmoid(), k, v, -kk, kk * gate.sigmoid()]


def run(
    args: list[Tensor],
    dtype: torch.dtype,
    impl: str,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> list[Any]:
    """Output, final state and the gradient of every input of a loss that weighs both."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in args]
    wide = torch.promote_types(dtype, torch.float32)
    first = None if start is None else start.to(wide, copy=True).requires_grad_()
    y, final = wkv7(*leaves, initial_state=first, cu_seqlens=cu_seqlens, impl=impl)
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in (y, final)]
    loss = (y * weights[0]).sum() + (final * weights[1]).sum()
    if loss.requires_grad:
        loss.backward()
    gradients = [x.grad for x in (*leaves, *([] if first is None else [first]))]
    return [y.detach(), final.detach(), *gradients]


def check(args: list[Tensor], start: Tensor | None, cu_seqlens: Tensor | None = None) -> None:
    """In float64, and in float32 as good as the reference in float32."""
    exact = run(args, torch.float64, "reference", start, cu_seqlens)
    for name, x, y in zip(
        NAMES, run(args, torch.float64, "compiled", start, cu_seqlens), exact, strict=False
    ):
        assert relative_error(x, torch.zeros_like(x) if y is None else y) < 1e-12, name
    results = (run(args, torch.float32, i, start, cu_seqlens) for i in ("compiled", "reference"))
    if args[0].numel():
        assert_as_good(*results, exact, FACTOR, NAMES[: len(exact)])


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("keys", [KEYS, 3 * KEYS])
@pytest.mark.parametrize("with_state", [True, False])
def test_equals_the_reference(tokens: int, keys: int, with_state: bool) -> None:
    start = torch.randn(2, HEADS, V, keys, dtype=torch.float64) if with_state else None
    check(inputs(2, tokens, keys), start)


@pytest.mark.parametrize("lengths", [[5], [0, 7, 0], [PIECE, 1, 2 * PIECE + 3], [3] * 9])
def test_packed_sequences(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    start = torch.randn(len(lengths), HEADS, V, KEYS, dtype=torch.float64)
    check(inputs(1, sum(lengths), KEYS), start, offsets)


@pytest.mark.parametrize("steepest", [0.0, 30.0, 1000.0])
def test_any_decay(steepest: float) -> None:
    """None at all, with one key over and over; and those that leave nothing."""
    args = inputs(1, 70, KEYS, steepest)
    if not steepest:
        args[4], args[5] = -args[4][:, :1].expand_as(args[4]), args[4][:, :1].expand_as(args[4])
    check(args, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    """Read as float32: results err by their own rounding."""
    args = [x.to(dtype).double() for x in inputs(1, 50, KEYS)]
    exact, got = (run(args, torch.float64, "reference"), run(args, dtype, "compiled"))
    rounding = torch.finfo(dtype).eps
    for name, x, y in zip(NAMES, got, exact, strict=False):
        assert relative_error(x, y) < rounding, name


def test_only_what_is_used_has_a_gradient() -> None:
    """The output alone, the final state alone, and one input of six."""
    args = [x.requires_grad_() for x in inputs(1, 40, KEYS)]
    for part in (0, 1):
        exact = torch.autograd.grad(
            wkv7(*args, impl="reference")[part].sum(), args, allow_unused=True
        )
        got = torch.autograd.grad(wkv7(*args, impl="compiled")[part].sum(), args, allow_unused=True)
        for x, y in zip(got, exact, strict=True):
            assert relative_error(x, torch.zeros_like(x) if y is None else y) < 1e-12
    alone = [x.detach() for x in args]
    alone[2].requires_grad_()
    wkv7(*alone, impl="compiled")[0].sum().backward()
    (exact_k,) = torch.autograd.grad(wkv7(*args, impl="reference")[0].sum(), args[2])
    assert relative_error(alone[2].grad, exact_k) < 1e-12


def test_nan_spoils_its_readers_alone() -> None:
    """Outputs before it, and gradients of another head, stay as they are."""
    args = inputs(1, 40, KEYS)
    clean = run(args, torch.float32, "compiled")
    args[3][0, 20, 0, 0] = torch.nan
    spoiled = run(args, torch.float32, "compiled")
    assert torch.equal(spoiled[0][:, :20], clean[0][:, :20])
    del clean[1], spoiled[1]  # states have their heads elsewhere
    for x, before in zip(spoiled, clean, strict=True):
        assert torch.equal(x[:, :, 1], before[:, :, 1])


def test_auto_takes_it_where_it_can() -> None:
    """The same bits as by name; other heads go through products."""
    for keys, impl in ((KEYS, "compiled"), (KEYS // 2, "torch")):
        args = inputs(1, 20, keys)
        got, named = (run(args, torch.float32, x) for x in ("auto", impl))
        for x, y in zip(got, named, strict=True):
            assert torch.equal(x, y)
