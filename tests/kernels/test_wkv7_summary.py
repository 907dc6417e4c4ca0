"""Summaries of pieces of a sequence against the recurrence over the whole of it, in float64."""

from functools import reduce
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from measure import relative_error
from torch import Tensor

from rwkvx_kernels.wkv7 import wkv7, wkv7_compose, wkv7_summary

HEADS, K, V = 2, 8, 12


def inputs(batch: int, tokens: int) -> list[Tensor]:
    """r, log_decay, k, v, alpha, beta as a time mix makes them."""
    shape = (batch, tokens, HEADS)
    r, k, kk, gate, decay = (torch.randn(*shape, K).double() for _ in range(5))
    kk = F.normalize(kk, dim=-1)
    v = torch.randn(*shape, V).double()
    return [r, -0.6065 * decay.sigmoid(), k, v, -kk, kk * gate.sigmoid()]


def start(rows: int) -> Tensor:
    return torch.randn(rows, HEADS, V, K).double()


@pytest.mark.parametrize("cuts", [(0, 0), (0, 1), (0, 90), (0, 20, 21, 64, 64, 90)])
@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_pieces_compose_to_the_whole(cuts: tuple[int, ...], impl: str) -> None:
    args, state = inputs(2, cuts[-1]), start(2)
    _, expected = wkv7(*args, initial_state=state, impl="reference")
    pieces = [wkv7_summary(*[x[:, a:b] for x in args[1:]], impl=impl) for a, b in pairwise(cuts)]
    p, d = reduce(wkv7_compose, pieces)
    assert relative_error(state @ p + d, expected) < 1e-12
    for piece in pieces:  # the states follow from each other too
        state = state @ piece.p + piece.d
    assert relative_error(state, expected) < 1e-12


def test_composing_is_associative() -> None:
    a, b, c = (wkv7_summary(*inputs(1, 9)[1:]) for _ in range(3))
    left, right = wkv7_compose(wkv7_compose(a, b), c), wkv7_compose(a, wkv7_compose(b, c))
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(left, right, strict=True))


def test_packed_sequences_have_one_each() -> None:
    args, offsets = inputs(1, 40), [0, 0, 7, 40]
    got = wkv7_summary(*args[1:], cu_seqlens=torch.tensor(offsets))
    assert got.p.shape == (3, HEADS, K, K)
    for i, (a, b) in enumerate(pairwise(offsets)):
        alone = wkv7_summary(*[x[:, a:b] for x in args[1:]])
        for x, y in zip(got, alone, strict=True):
            assert relative_error(x[i : i + 1], y) < 1e-12


def test_gradients_are_those_of_the_whole() -> None:
    """Through P, D, their composition and the initial state."""

    def gradients(composed: bool) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (*args[1:], state)]
        *tokens, first = leaves
        if composed:
            left, right = (wkv7_summary(*[x[:, a:b] for x in tokens]) for a, b in cuts)
            p, d = wkv7_compose(left, right)
            final = first @ p + d
        else:
            final = wkv7(args[0], *tokens, initial_state=first, impl="reference")[1]
        return list(torch.autograd.grad((final * weight).sum(), leaves))

    args, state, weight, cuts = inputs(1, 70), start(1), start(1), [(0, 33), (33, 70)]
    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(got, expected) < 1e-12


def test_narrow_inputs_keep_wide_summaries() -> None:
    args = [x.bfloat16() for x in inputs(1, 30)]
    p, d = wkv7_summary(*args[1:])
    exact = wkv7_summary(*[x.double() for x in args[1:]])
    assert p.dtype == d.dtype == torch.float32
    assert relative_error(p, exact.p) < 1e-5
    assert relative_error(d, exact.d) < 1e-5
