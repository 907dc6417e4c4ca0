"""The loss without all logits at once is the loss with them."""

import pytest
import torch
import torch.nn.functional as F
from measure import LargestTensor, assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.linear import linear_cross_entropy
from rwkvx_kernels.linear.cross_entropy import MOST_LOGITS

NAMES = ("loss", "dx", "dweight")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Logits and gradients are rounded to bfloat16, which has 8 bits, once each.
ROUNDING = 1e-2


def inputs(tokens: int = 37, width: int = 12, vocabulary: int = 50) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    return [x, weight, torch.randint(vocabulary, (tokens,)), torch.rand(tokens)]


def run(
    args: list[Tensor], most: int | None, dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> list[Tensor]:
    """Loss and gradients; with None of plain torch."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in args[:2]]
    weights = args[3].to(dtype)
    if most is None:
        losses = F.cross_entropy(leaves[0] @ leaves[1].T, args[2], reduction="none")
        loss = (losses * weights).sum()
    else:
        loss = linear_cross_entropy(*leaves, args[2], weights, most, impl)
    (loss * 3).backward()
    return [loss.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("most", [1, 50, 170, 37 * 50 - 1, 37 * 50])
def test_any_tile_gives_loss_and_gradients(most: int) -> None:
    args = inputs()
    exact, reference = run(args, None, torch.float64), run(args, None)
    assert_as_good(run(args, most), reference, exact, 4.0, NAMES)
    assert_as_good(run(args, most, torch.float64), exact, exact, 4.0, NAMES)


@pytest.mark.parametrize("vocabulary", [50, 64, 9000])
def test_triton_in_one_pass(vocabulary: int) -> None:
    """Less than a block, a whole one, more than one."""
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    args = [x.to(DEVICE) for x in inputs(vocabulary=vocabulary)]
    exact, reference = run(args, None, torch.float64), run(args, None)
    got = run(args, 10 * vocabulary, impl="triton")
    assert_as_good(got, reference, exact, 4.0, NAMES)


def test_triton_spoils_no_other_token() -> None:
    """A token that is NaN, and a target that is no column."""
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    from rwkvx_kernels.linear.triton_entropy import losses_and_gradients

    logits, targets = torch.randn(4, 20, device=DEVICE), torch.tensor([3, 5, 20, 7], device=DEVICE)
    logits[1, 4] = float("nan")
    exact = F.cross_entropy(logits[[0, 3]], targets[[0, 3]], reduction="none")
    losses = losses_and_gradients(logits, targets, torch.ones(4, device=DEVICE))
    torch.testing.assert_close(losses[[0, 3]], exact)
    assert losses[1:3].isnan().all()


def test_autocast_makes_the_product_narrow() -> None:
    args = inputs()
    results = []
    for most in (10**6, 170):
        leaves = [x.clone().requires_grad_() for x in args[:2]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*leaves, *args[2:], most)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)
        results.append([loss.detach(), *(x.grad for x in leaves)])
    exact = run(args, None, torch.float64)
    assert_as_good(results[1], results[0], exact, 1.5, NAMES)
    assert relative_error(results[1][1], exact[1]) > 1e-3  # it was narrow


def test_memory_is_that_of_a_tile() -> None:
    args = inputs(tokens=400, width=4, vocabulary=100)
    leaves = [x.requires_grad_() for x in args[:2]]
    with LargestTensor() as largest:
        linear_cross_entropy(*leaves, *args[2:], 1000).backward()
    assert largest.elements <= 1600  # of x; all logits would be 40,000


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    args = inputs()
    x = args[0].requires_grad_()
    linear_cross_entropy(x, *args[1:], 100).backward()
    assert x.grad is not None
    assert args[1].grad is None


def test_shapes_that_do_not_fit() -> None:
    x, weight, targets, weights = inputs()
    with pytest.raises(ValueError, match="targets and weights"):
        linear_cross_entropy(x, weight, targets[:-1], weights)


@pytest.mark.gpu
def test_past_two_to_the_31_elements_on_a_gpu() -> None:
    """Of x and of the logits, in bfloat16; against float64, some tokens at a time."""
    tokens, width, vocabulary, part = 2**20 + 40, 2048, 2048, 2**15
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=draw)

    targets = torch.randint(vocabulary, (tokens,), device="cuda", generator=draw)
    weights = torch.rand(tokens, device="cuda", generator=draw)
    args = [normal(tokens, width), normal(vocabulary, width) / width**0.5, targets, weights]
    loss, dx, dweight = run(args, MOST_LOGITS, torch.bfloat16)
    expected = [torch.zeros_like(x, dtype=torch.float64) for x in (loss, dweight)]
    for start in range(0, tokens, part):
        rows = slice(start, start + part)
        some = [args[0][rows], args[1], targets[rows], weights[rows].bfloat16()]
        exact = run(some, None, torch.float64)
        assert relative_error(dx[rows], exact[1]) < ROUNDING
        for total, x in zip(expected, exact[::2], strict=True):
            total += x
    assert relative_error(loss, expected[0]) < ROUNDING
    assert relative_error(dweight, expected[1]) < ROUNDING
