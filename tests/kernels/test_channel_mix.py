"""The squared ReLU: plain torch, compiled loops and Triton (on a GPU or interpreted)."""

import pytest
import torch
from torch import Tensor

from rwkvx_kernels.channel_mix import squared_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = squared_relu(leaf, impl=impl)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 2049), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    torch.manual_seed(0)
    x = torch.randn(shape).to(DEVICE, dtype)
    for got, expected in zip(run(x, "triton"), run(x.double(), "reference"), strict=True):
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        assert got.dtype == dtype


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled loops are for CPUs")
@pytest.mark.parametrize("shape", [(3, 5, 7), (40, 2049), (0, 4)])  # in one thread and in several
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x.view(-1)[:3] = torch.tensor([torch.nan, -torch.inf, torch.inf])
    tolerance = torch.finfo(dtype).eps
    found = run(x, "compiled")
    for got, expected in zip(found, run(x.double(), "reference"), strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
        )
        assert got.dtype == dtype
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(
        squared_relu(strided, "compiled"), found[0], rtol=0, atol=0, equal_nan=True
    )
    kept = x.clone()
    over = squared_relu(kept, "compiled", overwrite=True)
    torch.testing.assert_close(over, found[0], rtol=0, atol=0, equal_nan=True)
    assert over.data_ptr() == kept.data_ptr()


@pytest.mark.gpu
def test_past_two_to_the_31_elements() -> None:
    """Where 32 bits of an offset end, and at the very end."""
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    draw = torch.Generator(DEVICE).manual_seed(0)
    count = 2**31 + 5000
    x = torch.randn(count, device=DEVICE, dtype=torch.bfloat16, generator=draw).requires_grad_()
    y = squared_relu(x, impl="triton")
    (dx,) = torch.autograd.grad(y, x, x.detach() + 1)
    tolerance = 2 * torch.finfo(x.dtype).eps
    for start in (0, count - 10_000, count - 3000):
        part = x.detach()[start : start + 3000].double().requires_grad_()
        exact = squared_relu(part, impl="reference")
        (dpart,) = torch.autograd.grad(exact, part, (part.detach() + 1).bfloat16().double())
        for got, expected in ((y, exact), (dx, dpart)):
            given = got[start : start + 3000].double()
            torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


def test_operator() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    squared_relu(x, impl="triton")  # registers
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rwkvx.squared_relu, (x,), test_utils=tests)


def test_float64_has_no_triton() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    with pytest.raises(ValueError, match="has no float64"):
        squared_relu(torch.zeros(2, dtype=torch.float64, device=DEVICE), impl="triton")
