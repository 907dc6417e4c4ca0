"""WKV7 in Triton, on a GPU or in Triton's interpreter (tiny shapes: it is slow).

Expected values are those of the recurrence in float64; tolerances as in `measure.py`. The
interpreter rounds the factors of products as a GPU does (`tools/triton_products.py`).
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from measure import assert_as_good, relative_error, wkv7_error
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx_kernels.tools.triton_device import SM_90, pretend
from rwkvx_kernels.tools.triton_options import Options, vary
from rwkvx_kernels.wkv7 import triton_ops, wkv7

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("y", "state", "dr", "dlog_decay", "dk", "dv", "dalpha", "dbeta", "dinitial_state")
# Products of up to 64 tokens in another order, with their exponentials: measured up to 6 times
# the recurrence's own error.
FACTOR = 10.0


@pytest.fixture(params=[16, 64], ids=["chunk16", "chunk64"])
def chunk(request: pytest.FixtureRequest) -> Iterator[int]:
    """Tokens that the gradients have at once."""
    with vary("gradients", Options(request.param, 32, 4, 1)):
        yield request.param


def inputs(
    batch: int, tokens: int, heads: int = 1, key: int = 16, value: int = 24, seed: int = 0
) -> list[Tensor]:
    """r, log_decay, k, v, alpha, beta as a time mix makes them, values that float16 can hold."""
    torch.manual_seed(seed)
    r, k, kk, gate, decay = torch.randn(5, batch, tokens, heads, key)
    kk = F.normalize(kk, dim=-1)
    values = [r, -0.6065 * decay.sigmoid(), k, torch.randn(batch, tokens, heads, value), -kk]
    return [x.half().double().to(DEVICE) for x in (*values, kk * gate.sigmoid())]


def state(sequences: int, heads: int = 1, key: int = 16, value: int = 24) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(sequences, heads, value, key).double().to(DEVICE)


def run(
    args: list[Tensor],
    initial: Tensor | None,
    dtype: torch.dtype,
    impl: str,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor | None]:
    """Output, final state and the gradient of every input of a loss that weighs both."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in args]
    wide = torch.promote_types(dtype, torch.float32)
    start = None if initial is None else initial.to(wide, copy=True).requires_grad_()
    y, final = wkv7(*leaves, initial_state=start, cu_seqlens=cu_seqlens, impl=impl)
    torch.manual_seed(2)
    weight_y, weight_s = torch.randn(y.shape).to(DEVICE), torch.randn(final.shape).to(DEVICE)
    loss = (y.double() * weight_y).sum() + (final.double() * weight_s).sum()
    if loss.requires_grad:
        loss.backward()
    first = start.grad if start is not None else None
    # Without tokens, the reference does not depend on the inputs at all.
    gradients = [x.grad if y.numel() else None for x in leaves]
    return [y.detach(), final.detach(), *gradients, first]


def check(
    args: list[Tensor],
    initial: Tensor | None,
    dtype: torch.dtype = torch.float32,
    cu_seqlens: Tensor | None = None,
) -> None:
    exact = run(args, initial, torch.float64, "reference", cu_seqlens)
    reference = run(args, initial, dtype, "reference", cu_seqlens)
    got = run(args, initial, dtype, "triton", cu_seqlens)
    # Under the interpreter, products of float32 are exact.
    least = wkv7_error(dtype) if GPU or dtype != torch.float32 else 0.0
    assert_as_good(got, reference, exact, FACTOR, NAMES, least)


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63])
def test_any_length(tokens: int) -> None:
    check(inputs(1, tokens), state(1))


def test_two_sequences_of_two_heads(chunk: int) -> None:
    check(inputs(2, 34, heads=2), state(2, heads=2))


def test_without_an_initial_state() -> None:
    check(inputs(1, 20), None)


@pytest.mark.parametrize(("key", "value"), [(24, 16), (40, 33), (72, 16)])
def test_any_head_size(key: int, value: int) -> None:
    """No power of two; several tiles of key and of value channels; the split of a large K."""
    check(inputs(1, 18, 1, key, value), state(1, 1, key, value))


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if GPU else [])])
def test_narrow_numbers(dtype: torch.dtype) -> None:
    """Heads of 16 channels; the interpreter has no bfloat16."""
    check(inputs(1, 37), state(1), dtype)


@pytest.mark.parametrize("offsets", [[0, 0, 17, 18, 50], [0, 16], [0, 0]])
def test_packed(offsets: list[int], chunk: int) -> None:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    check(inputs(1, offsets[-1]), state(len(offsets) - 1), cu_seqlens=cu_seqlens)


def test_repeated_key_without_decay(chunk: int) -> None:
    """alpha = -kk, beta = kk, one key over and over: inversion by doubling explodes here."""
    args = inputs(1, 64)
    kk = args[5][:, :1] / args[5][:, :1].norm(dim=-1, keepdim=True)
    kk = kk.float().double().expand_as(args[5]).contiguous()
    args[1].zero_()
    args[4], args[5] = -kk, kk * 0.999
    check(args, state(1))


def test_one_strong_decay_among_weak_ones(chunk: int) -> None:
    """Less than exp(-40) counts as that, gradients included."""
    args = inputs(1, 70)
    args[1][:, 37, 0, :5] = -200.0
    args[1][:, 50, 0, 7] = -torch.inf
    exact, got = (
        run(args, None, torch.float64, "reference"),
        run(args, None, torch.float32, "triton"),
    )
    for name, x, y in zip(NAMES, got, exact, strict=False):
        if y is not None and x is not None:
            assert relative_error(x, y) < 1e-4, name


def test_few_tokens_without_a_gradient_go_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "wkv7_forward", None)
    args = inputs(1, triton_ops.STEP_TOKENS)
    expected = wkv7(*args, initial_state=state(1), impl="reference")
    narrow = [x.float() for x in args]
    got = wkv7(*narrow, initial_state=state(1).float(), impl="triton")
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    with pytest.raises(TypeError):
        wkv7(*[x.requires_grad_() for x in narrow], impl="triton")


def test_wrong_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r'impl="triton" has no float64'):
        wkv7(*inputs(1, 1), impl="triton")
    with pytest.raises(ValueError, match=r'impl="triton" has heads of 16 to 128 channels'):
        wkv7(*[x.float() for x in inputs(1, 1, key=12)], impl="triton")


def test_old_devices_are_refused() -> None:
    args = [x.float() for x in inputs(1, 1, key=17)]
    refused = pytest.raises(ValueError, match=r"needs compute capability 8\.0 or more, not sm_75")
    with pretend(SM_90._replace(arch=75)), refused:
        wkv7(*args, impl="triton")
