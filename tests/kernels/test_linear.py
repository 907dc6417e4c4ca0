"""Products with weights: every routine gives what float64 gives, and gradients flow."""

import numba
import pytest
import torch
from measure import relative_error

from rwkvx_kernels.linear import linear, low_rank, numba_products, torch_form
from rwkvx_kernels.tools.numba_loops import COMMON
from rwkvx_kernels.tools.numba_scalars import as_array


@pytest.mark.parametrize("shape", [(1, 1, 48), (48,), (1, 2, 48), (3, 7, 48), (1, 0, 48)])
@pytest.mark.parametrize("outputs", [64, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_float64(shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(outputs, 48).to(dtype)
    got = linear(x, weight)
    expected = x.double() @ weight.double().T
    assert got.dtype == dtype
    assert got.shape == expected.shape
    rounding = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}
    assert relative_error(got, expected) < rounding[dtype]


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 3, 27])
def test_rows_in_either_order(
    rows: int, dtype: torch.dtype, far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row once, by whichever part, in the order of this processor and of others."""
    monkeypatch.setattr(numba_products, "FAR_ROWS", far)
    product = numba.njit(numba_products.product_rows.py_func, **COMMON)
    torch.manual_seed(0)
    weight, x, scale = (torch.randn(rows, 48) * 9).to(dtype), torch.randn(48), torch.rand(rows)
    expected = weight.double() @ x.double()
    for scales, wanted in ((scale[:0], expected), (scale, expected * scale.double())):
        y = torch.full((rows,), torch.nan)
        for part in range(2):
            product(as_array(weight), scales.numpy(), x.numpy(), y.numpy(), part, 2)
        assert relative_error(y, wanted) < 1e-6


@pytest.mark.parametrize("tokens", [2, 600])
def test_bfloat16_without_instructions_for_it(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_form, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    x, weight = torch.randn(1, tokens, 48).bfloat16(), torch.randn(64, 48).bfloat16()
    expected = x.double() @ weight.double().T
    got = linear(x, weight)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, expected) < 2e-3


def test_of_a_part_of_a_larger_tensor() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 48)[:, -1:], torch.randn(64, 100)[:, :48]
    expected = x.double() @ weight.double().T
    assert relative_error(linear(x, weight), expected) < 1e-6
    assert relative_error(linear(x[:1], weight), expected[:1]) < 1e-6


@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_flow(tokens: int) -> None:
    x = torch.randn(1, tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x, weight))
    narrow = x.detach().float().requires_grad_()
    linear(narrow, weight.detach().float()).sum().backward()
    assert narrow.grad is not None
    assert relative_error(narrow.grad, weight.detach().sum(0).expand(1, tokens, 6)) < 1e-6


@pytest.mark.parametrize("activation", ["none", "tanh", "sigmoid"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank(activation: str, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 48).to(dtype)
    down, up = (torch.randn(48, 8) / 7).to(dtype), torch.randn(8, 64).to(dtype)
    apply = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation]
    expected = apply(x.double() @ down.double()) @ up.double()
    got = low_rank(x, down, up, activation)
    assert got.dtype == dtype
    assert relative_error(got, expected) < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]


def test_low_rank_has_gradients() -> None:
    torch.manual_seed(0)
    shapes = ((1, 1, 6), (6, 2), (2, 4))
    x, down, up = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *args: low_rank(*args, "tanh"), (x, down, up))
    narrow = [z.detach().bfloat16().requires_grad_() for z in (x, down, up)]
    low_rank(*narrow, "tanh").sum().backward()
    assert all(z.grad is not None and bool(z.grad.any()) for z in narrow)
