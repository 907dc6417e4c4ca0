"""WKV7 in Triton at real sizes: `pytest -m gpu`."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from measure import assert_as_good, relative_error, wkv7_error
from torch import Tensor

from rwkvx_kernels.wkv7 import wkv7

pytestmark = pytest.mark.gpu
NAMES = ("y", "state", "dr", "dlog_decay", "dk", "dv", "dalpha", "dbeta")


def inputs(tokens: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> Tensor:
        shape = (1, tokens, heads, size)
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    kk = F.normalize(normal(), dim=-1)
    decay = -0.6065 * normal().sigmoid()
    return [normal(), decay, normal(), normal(), -kk, kk * normal().sigmoid()]


def run(args: list[Tensor], impl: str, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in args]
    y, final = wkv7(*leaves, cu_seqlens=cu_seqlens, impl=impl)
    generator = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device="cuda")
    dfinal = torch.randn(final.shape, generator=generator, device="cuda")
    loss = (y.double() * dy).sum() + (final.double() * dfinal).sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_gradients(dtype: torch.dtype, size: int) -> None:
    """Against the recurrence in float64; the reference's own error is one rounding of results."""
    args = inputs(2000, 4, size, dtype)
    exact = run([x.double() for x in args], "reference")
    reference = run(args, "reference")
    # Of the decays' gradients, differences of larger sums, float32 loses more than its reference.
    factor = 50.0 if dtype == torch.float32 else 10.0
    least = wkv7_error(dtype)
    assert_as_good(run(args, "triton"), reference, exact, factor, NAMES, least)


def test_packed_sequences_equal_those_alone() -> None:
    args = inputs(3000, 4, 64, torch.bfloat16)
    offsets = [0, 1, 1, 500, 2953, 3000]
    together = run(args, "triton", torch.tensor(offsets, device="cuda"))
    for i, (a, b) in enumerate(pairwise(offsets)):
        y, final = wkv7(*[x[:, a:b] for x in args], impl="reference")
        assert relative_error(together[0][:, a:b], y) < 1e-2
        assert relative_error(together[1][i : i + 1], final) < 1e-2


def test_past_65536_tokens() -> None:
    args = inputs(70_000, 2, 64, torch.float32)
    whole, end = wkv7(*args, impl="triton")
    _, middle = wkv7(*[x[:, :65_000] for x in args], impl="triton")
    y, final = wkv7(*[x[:, 65_000:] for x in args], initial_state=middle, impl="triton")
    assert relative_error(whole[:, 65_000:], y) < 1e-4
    assert relative_error(end, final) < 1e-4


def test_past_two_to_the_31_elements() -> None:
    tokens, heads, size = 2**20 + 40, 128, 16
    one = inputs(tokens, 1, size, torch.bfloat16)
    args = [x.expand(1, tokens, heads, size) for x in one]
    assert args[0].numel() > 2**31
    y, final = wkv7(*args, impl="triton")
    # Fewer heads are cut into more segments: the same sums in another order.
    expected, end = wkv7(*one, impl="triton")
    assert relative_error(y[:, -1000:, -1:], expected[:, -1000:]) < 1e-2
    assert relative_error(final[:, -1:], end) < wkv7_error(torch.bfloat16)
