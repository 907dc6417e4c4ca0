"""The token shift: plain torch and Triton (on a GPU or interpreted) against the equation."""

from itertools import pairwise

import pytest
import torch
from measure import assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.token_shift import token_shift

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums over tokens in another order.
FACTOR = 4.0
# Results are rounded to bfloat16, which has 8 bits, once each.
ROUNDING = 1e-2


def inputs(batch: int, tokens: int, width: int, mixes: int, rows: int = 0) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(batch, tokens, width), (rows or batch, width), *[(width,)] * mixes]
    return [torch.randn(shape).half().double().to(DEVICE) for shape in shapes]


def by_hand(args: list[Tensor], offsets: list[int] | None) -> list[Tensor]:
    x, previous, *mixes = args
    before = torch.empty_like(x)
    if offsets is None:
        before[:, 0], before[:, 1:] = previous, x[:, :-1]
    else:
        for row, (a, b) in enumerate(pairwise(offsets)):
            for t in range(a, b):
                before[0, t] = previous[row] if t == a else x[0, t - 1]
    return [(1 - mix) * x + mix * before for mix in mixes]


def run(
    args: list[Tensor], dtype: torch.dtype, impl: str, offsets: list[int] | None
) -> list[Tensor]:
    """The mixed tokens, and gradients of everything."""
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in args]
    out = token_shift(*leaves[:2], leaves[2:], cu_seqlens, impl=impl)
    torch.manual_seed(2)
    sum((y.double() * torch.randn(y.shape).to(DEVICE)).sum() for y in out).backward()
    return [*(y.detach() for y in out), *(x.grad for x in leaves)]


CASES = [
    (2, 19, 24, 6, None),
    (3, 1, 16, 6, None),
    (1, 40, 130, 1, None),
    (1, 20, 16, 2, [0, 0, 0, 1, 18, 20, 20]),
    (1, 3, 16, 6, [0, 3]),
]


@pytest.mark.parametrize(("batch", "tokens", "width", "mixes", "offsets"), CASES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_outputs_and_gradients(
    batch: int, tokens: int, width: int, mixes: int, offsets: list[int] | None, impl: str
) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    args = inputs(batch, tokens, width, mixes, len(offsets) - 1 if offsets else 0)
    exact = run(args, torch.float64, "reference", offsets)
    for y, expected in zip(exact, by_hand(args, offsets), strict=False):
        assert relative_error(y, expected) < 1e-14
    reference = run(args, torch.float32, "reference", offsets)
    names = [f"output {i}" for i in range(mixes)] + [f"gradient {i}" for i in range(mixes + 2)]
    assert_as_good(run(args, torch.float32, impl, offsets), reference, exact, FACTOR, names)


def test_triton_in_float16_and_under_autocast() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    args = inputs(1, 7, 16, 6)
    exact, reference = (run(args, d, "reference", None) for d in (torch.float64, torch.float16))
    names = [str(i) for i in range(14)]
    assert_as_good(run(args, torch.float16, "triton", None), reference, exact, FACTOR, names)
    wide = [x.float() for x in args]
    with torch.autocast(DEVICE, torch.float16):
        narrow = token_shift(*wide[:2], wide[2:], impl="triton")
    for got, expected in zip(narrow, token_shift(*wide[:2], wide[2:]), strict=True):
        assert torch.equal(got, expected.half())


@pytest.mark.gpu
@pytest.mark.parametrize("offsets", [None, [0, 1, 1, 65_535, 65_537, 70_000]])
def test_past_65536_tokens(offsets: list[int] | None) -> None:
    args = inputs(1, 70_000, 768, 6, len(offsets) - 1 if offsets else 0)
    exact, reference = (
        run(args, dtype, "reference", offsets) for dtype in (torch.float64, torch.bfloat16)
    )
    names = [str(i) for i in range(14)]
    assert_as_good(run(args, torch.bfloat16, "triton", offsets), reference, exact, FACTOR, names)


@pytest.mark.gpu
def test_past_two_to_the_31_elements() -> None:
    """The last tokens, and the gradients of mixes, to which all tokens add, against float64."""
    tokens, width, tail = 2**20 + 40, 2048, 1000
    draw = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=draw)

    leaves = [normal(1, tokens, width), normal(1, width), normal(width), normal(width)]
    leaves = [x.requires_grad_() for x in leaves]
    out = token_shift(*leaves[:2], leaves[2:], impl="triton")
    dout = [normal(1, tokens, width) for _ in out]
    dx, _, *dmixes = torch.autograd.grad(out, leaves, dout)
    assert dx.numel() > 2**31 or DEVICE == "cpu"
    expected = [torch.zeros(width, dtype=torch.float64, device=DEVICE) for _ in dmixes]
    for end in range(tokens, 0, -tail):
        part = slice(max(0, end - tail), end)
        previous = leaves[0][:, part.start - 1] if part.start else leaves[1]
        wide = [x.detach().double().requires_grad_() for x in (leaves[0][:, part], *leaves[2:])]
        exact = token_shift(wide[0], previous.detach().double(), wide[1:], impl="reference")
        grads = torch.autograd.grad(exact, wide, [d[:, part].double() for d in dout])
        for total, dmix in zip(expected, grads[1:], strict=True):
            total += dmix
        if end == tokens:
            for got, right in zip([*out, dx], [*exact, grads[0]], strict=True):
                assert relative_error(got[:, part].detach(), right) < ROUNDING
    for got, right in zip(dmixes, expected, strict=True):
        assert relative_error(got, right) < ROUNDING


def test_operator() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    x, previous, *mixes = (t.float().requires_grad_() for t in inputs(1, 5, 16, 2, rows=2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    token_shift(x, previous[:1], mixes, impl="triton")  # registers
    for rows, offsets in ((previous[:1], None), (previous, torch.tensor([0, 2, 5], device=DEVICE))):
        given = (x, rows.detach().requires_grad_(), mixes, offsets, torch.float32)
        torch.library.opcheck(torch.ops.rwkvx.token_shift, given, test_utils=tests)


def test_what_does_not_fit_is_refused() -> None:
    x, previous, *mixes = inputs(1, 5, 16, 7)
    with pytest.raises(ValueError, match="one to 6 mixes, got 7"):
        token_shift(x, previous, mixes)
    with pytest.raises(ValueError, match=r"previous must be \[1, 16\], got \[1, 8\]"):
        token_shift(x, previous[:, :8], mixes[:2])
    with pytest.raises(ValueError, match=r"mixes \[C\]"):
        token_shift(x, previous, [mixes[0][:8]])
