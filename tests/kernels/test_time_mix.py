"""The time mix between its projections: compiled, and with gradients, against the equations.

Axes: B batch, T time, C width, H heads, N head size.
"""

import itertools
from math import exp

import pytest
import torch
from measure import assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.time_mix import TimeMixWeights, time_mix

EPS = 64e-5


def inputs(batch: int, tokens: int, heads: int = 3, size: int = 16) -> list[Tensor]:
    """Eight tensors of tokens [B, T, C] (the last two of the value residual), then the weights."""
    torch.manual_seed(0)
    width = heads * size
    given = [torch.randn(batch, tokens, width).double() for _ in range(8)]
    weights = [torch.randn(width).double() for _ in TimeMixWeights._fields]
    weights[TimeMixWeights._fields.index("r_k")] = torch.randn(heads, size).double()
    return given + weights


def run(
    args: list[Tensor], state: Tensor, cu_seqlens: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """time_mix of what `inputs` gives."""
    *tokens, mix, v_first = args[:8]
    weights = TimeMixWeights(*args[8:])
    return time_mix(*tokens, (mix, v_first), weights, EPS, state, cu_seqlens, impl=impl)


def states(sequences: int, heads: int = 3, size: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(sequences, heads, size, size).double()


def by_hand(args: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token and head by head, from the paper."""
    r, w, k, v, a, g, mix, v_first, w0, a0, v0, k_k, k_a, r_k, weight, bias = args
    log_decay, a = -exp(-0.5) / (1 + (-w0 - w).exp()), 1 / (1 + (-a0 - a).exp())
    gate = 1 / (1 + (-v0 - mix).exp())
    v = (1 - gate) * v + gate * v_first
    heads, size = r_k.shape
    out, state = torch.zeros_like(r), state.clone()
    for n, t, h in itertools.product(range(len(r)), range(r.shape[1]), range(heads)):
        part = slice(h * size, (h + 1) * size)
        kk = k[n, t, part] * k_k[part]
        kk = kk / kk.norm()
        key = k[n, t, part] * (1 + (a[n, t, part] - 1) * k_a[part])
        s = state[n, h]
        removed = torch.outer(s @ -kk, kk * a[n, t, part])
        s = s * log_decay[n, t, part].exp() + removed + torch.outer(v[n, t, part], key)
        state[n, h] = s
        y = s @ r[n, t, part]
        y = (y - y.mean()) / (y.var(correction=0) + EPS).sqrt() * weight[part] + bias[part]
        bonus = (r[n, t, part] * key * r_k[h]).sum() * v[n, t, part]
        out[n, t, part] = (y + bonus) * g[n, t, part]
    return out, state


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("impl", ["reference", "torch", "compiled"])
def test_equals_the_equations(tokens: int, impl: str) -> None:
    args, start = inputs(2, tokens), states(2)
    kept = start.clone()
    for got, expected in zip(run(args, start, impl=impl), by_hand(args, start), strict=True):
        assert relative_error(got, expected) < 1e-12
    assert torch.equal(start, kept)


@pytest.mark.parametrize(("heads", "size"), [(1, 5), (2, 64), (12, 64)])
def test_float32_errs_as_the_reference(heads: int, size: int) -> None:
    args = [x.float() for x in inputs(1, 70, heads, size)]
    start = states(1, heads, size).float()
    exact = run([x.double() for x in args], start.double(), impl="reference")
    reference = run(args, start, impl="reference")
    assert_as_good(run(args, start), reference, exact, 4.0, ("y", "state"))


def test_bfloat16_keeps_its_dtype() -> None:
    args = [x.bfloat16() for x in inputs(1, 40)]
    start = states(1).float()
    exact = run([x.double() for x in args], start.double(), impl="reference")
    reference = run(args, start, impl="reference")
    got = run(args, start)
    assert got[0].dtype == torch.bfloat16
    assert_as_good(got, reference, exact, 2.0, ("y", "state"))


def test_packed() -> None:
    offsets = [0, 10, 10, 43, 60]
    args, start = inputs(1, 60), states(4)
    got = run(args, start, torch.tensor(offsets))
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        part = [x[:, a:b] for x in args[:8]] + args[8:]
        y, final = by_hand(part, start[i : i + 1])
        assert relative_error(got[0][:, a:b], y) < 1e-12
        assert relative_error(got[1][i : i + 1], final) < 1e-12


def test_gradients_flow_into_everything() -> None:
    args = [x.requires_grad_() for x in inputs(1, 9, heads=1, size=4)]
    start = states(1, heads=1, size=4).requires_grad_()

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(list(tensors[:-1]), tensors[-1])

    assert torch.autograd.gradcheck(call, (*args, start))


def test_the_first_block_has_no_value_residual() -> None:
    """A gate that is shut and no gate are the same; one of the two alone is refused."""
    args, start = inputs(1, 5), states(1)
    args[6].fill_(-1e4)
    weights = TimeMixWeights(*args[8:])
    for impl in ("reference", "torch", "compiled"):
        got = time_mix(*args[:6], None, weights._replace(v0=None), EPS, start, impl=impl)
        assert relative_error(got[0], run(args, start, impl=impl)[0]) < 1e-12
    with pytest.raises(ValueError, match="needs v0"):
        time_mix(*args[:6], None, weights, EPS, start)


def test_shapes_that_do_not_fit() -> None:
    args = inputs(1, 4)
    with pytest.raises(ValueError, match="one shape"):
        run([args[0][:, :3], *args[1:]], states(1))
    with pytest.raises(ValueError, match="do not fit C = 48"):
        run(args, states(1, heads=2))
