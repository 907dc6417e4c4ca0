"""WKV7: the fast form against the recurrence itself in float64.

Axes: B batch, T time, H heads, K key channels, V value channels (V != K, so that no transposed
state can hide).
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from measure import FLOOR, assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.wkv7 import wkv7

HEADS, K, V = 2, 16, 24
LENGTHS = [0, 1, 3, 5, 63, 64, 65, 100, 1000]
NAMES = ("y", "state", "dr", "dlog_decay", "dk", "dv", "dalpha", "dbeta", "dinitial_state")
# The chunked form sums products of up to 64 tokens in another order, scaled by exponentials of sums
# of up to 64 log decays. Measured: 2 to 7 times the recurrence's own error, at any length.
FACTOR = 10.0


def inputs(
    batch: int, tokens: int, steepest: float = 0.6065, dtype: torch.dtype = torch.float64, seed=0
) -> list[Tensor]:
    """r, log_decay, k, v, alpha, beta as a time mix makes them, values that `dtype` can hold."""
    torch.manual_seed(seed)
    shape = (batch, tokens, HEADS, K)
    r, k, kk, gate, decay = (torch.randn(shape, dtype=torch.float64) for _ in range(5))
    v = torch.randn(*shape[:3], V, dtype=torch.float64)
    kk = F.normalize(kk, dim=-1)
    values = [r, -steepest * decay.sigmoid(), k, v, -kk, kk * gate.sigmoid()]
    return [x.to(dtype).double() for x in values]


def state(sequences: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(sequences, HEADS, V, K).double()


def run(
    args: list[Tensor],
    initial: Tensor | None,
    dtype: torch.dtype = torch.float64,
    impl: str = "torch",
    cu_seqlens: Tensor | None = None,
) -> list[Tensor | None]:
    """Output, final state and the gradient of every input of a loss that weighs both."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in args]
    start = None if initial is None else initial.to(wide, copy=True).requires_grad_()
    y, final = wkv7(*leaves, initial_state=start, cu_seqlens=cu_seqlens, impl=impl)
    torch.manual_seed(2)
    weight_y, weight_s = torch.randn(y.shape).double(), torch.randn(final.shape).double()
    loss = (y * weight_y).sum() + (final * weight_s).sum()
    if loss.requires_grad:  # without tokens and without a state, nothing depends on anything
        loss.backward()
    first = start.grad if start is not None else None
    return [y.detach(), final.detach(), *(x.grad for x in leaves), first]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("with_state", [True, False])
def test_float64_equals_reference(tokens: int, with_state: bool) -> None:
    args = inputs(2, tokens)
    start = state(2) if with_state else None
    expected = run(args, start, impl="reference")
    got = run(args, start)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize("tokens", [1, 3, 63, 100, 1000])
def test_float32_errs_as_the_reference(tokens: int) -> None:
    args = inputs(2, tokens, dtype=torch.float32)
    exact = run(args, state(2), impl="reference")
    reference = run(args, state(2), torch.float32, "reference")
    assert_as_good(run(args, state(2), torch.float32), reference, exact, FACTOR, NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_cost_their_own_rounding_only(dtype: torch.dtype) -> None:
    """State and arithmetic are float32: the only errors are roundings of results to `dtype`."""
    args = inputs(1, 100, dtype=dtype)
    exact = run(args, state(1), impl="reference")
    reference = run(args, state(1), dtype, "reference")
    got = run(args, state(1), dtype)
    assert_as_good(got, reference, exact, FACTOR, NAMES)
    assert got[0] is not None
    assert got[0].dtype == dtype
    assert got[1] is not None
    assert got[1].dtype == torch.float32
    assert relative_error(got[1], exact[1]) < 1e-5  # type: ignore[arg-type]


def test_log_decay_may_stay_wide() -> None:
    """exp(-0.001) is 1 in bfloat16: a decay close to one needs float32."""
    args = inputs(1, 200, steepest=0.002, dtype=torch.float32)
    narrow = [x.bfloat16() for x in args]
    narrow[1] = args[1].float()
    exact, _ = wkv7(*[x.double() for x in narrow], impl="reference")
    y, _ = wkv7(*narrow)
    assert relative_error(y, exact) < 4e-3


@pytest.mark.parametrize("grad", [True, False])
def test_no_gradient_gives_the_same(grad: bool) -> None:
    args = inputs(2, 200)
    with torch.set_grad_enabled(grad):
        y, final = wkv7(*[x.requires_grad_(grad) for x in args], initial_state=state(2))
    expected, end = wkv7(*[x.detach() for x in args], initial_state=state(2), impl="reference")
    assert relative_error(y.detach(), expected) < 1e-12
    assert relative_error(final.detach(), end) < 1e-12


@pytest.mark.parametrize("cuts", [[1], [64], [100], [7, 8, 130], list(range(10, 200, 10))])
def test_the_final_state_continues(cuts: list[int]) -> None:
    args = inputs(2, 200)
    whole, end = wkv7(*args, initial_state=state(2))
    current, parts = state(2), []
    for a, b in zip([0, *cuts], [*cuts, 200], strict=True):
        y, current = wkv7(*[x[:, a:b] for x in args], initial_state=current)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-12
    assert relative_error(current, end) < 1e-12


def test_gradients_cross_a_split() -> None:
    args = inputs(1, 90)
    expected = run(args, state(1), impl="reference")
    leaves = [x.clone().requires_grad_() for x in args]
    start = state(1).requires_grad_()
    left, middle = wkv7(*[x[:, :37] for x in leaves], initial_state=start)
    right, final = wkv7(*[x[:, 37:] for x in leaves], initial_state=middle)
    y = torch.cat([left, right], dim=1)
    torch.manual_seed(2)
    weight_y, weight_s = torch.randn(y.shape).double(), torch.randn(final.shape).double()
    ((y * weight_y).sum() + (final * weight_s).sum()).backward()
    for name, x, e in zip(NAMES[2:], [*leaves, start], expected[2:], strict=True):
        assert x.grad is not None
        assert e is not None
        assert relative_error(x.grad, e) < 1e-12, name


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 150],
        [0, 0, 30, 30, 31, 150, 150],
        [0, 64, 128, 150],
        [0, 2, 4, 6],
        [0, 70, 140],
        [0, 0],
        [0],
    ],
)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_sequences(offsets: list[int], with_state: bool) -> None:
    args = inputs(1, offsets[-1])
    start = state(len(offsets) - 1) if with_state else None
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    got = run(args, start, cu_seqlens=cu_seqlens)
    reference = run(args, start, impl="reference", cu_seqlens=cu_seqlens)
    for name, a, b in zip(NAMES, got, reference, strict=True):
        if b is not None:
            assert a is not None
            assert relative_error(a, b) < 1e-12, name
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        alone = None if start is None else start[i : i + 1]
        y, final = wkv7(*[x[:, a:b] for x in args], initial_state=alone, impl="reference")
        assert relative_error(got[0][:, a:b], y) < 1e-12  # type: ignore[index]
        assert relative_error(got[1][i : i + 1], final) < 1e-12  # type: ignore[index]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("values", [1, 24, 33])
def test_without_gradients(tokens: int, values: int) -> None:
    """The compiled recurrence; it must not write into the state that it is given."""
    args, start = inputs(2, tokens), torch.randn(2, HEADS, values, K).double()
    args[3] = torch.randn(2, tokens, HEADS, values).double()
    kept = start.clone()
    exact = wkv7(*args, initial_state=start, impl="reference")
    for got, expected in zip(wkv7(*args, initial_state=start), exact, strict=True):
        assert relative_error(got, expected) < 1e-12
    assert torch.equal(start, kept)
    narrow, first = [x.float() for x in args], start.float()
    same = [x.double() for x in narrow]  # float32 values may differ from the draws
    exact = wkv7(*same, initial_state=first.double(), impl="reference")
    reference = wkv7(*narrow, initial_state=first, impl="reference")
    assert_as_good(wkv7(*narrow, initial_state=first), reference, exact, 4.0, NAMES[:2])


def test_packed_without_gradients() -> None:
    offsets = [0, 0, 30, 30, 31, 150, 150]
    args, start = inputs(1, 150), state(6)
    got = wkv7(*args, initial_state=start, cu_seqlens=torch.tensor(offsets))
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        y, final = wkv7(*[x[:, a:b] for x in args], start[i : i + 1], impl="reference")
        assert relative_error(got[0][:, a:b], y) < 1e-12
        assert relative_error(got[1][i : i + 1], final) < 1e-12


@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_batch_neighbours_do_not_matter(tokens: int) -> None:
    args, start = inputs(3, tokens), state(3)
    y, final = wkv7(*args, initial_state=start)
    changed = [x.clone() for x in args]
    for x in changed:
        x[1:] *= 0.5
    y_changed, final_changed = wkv7(*changed, initial_state=start)
    assert torch.equal(y[0], y_changed[0])
    assert torch.equal(final[0], final_changed[0])
    alone, final_alone = wkv7(*[x[:1] for x in args], initial_state=start[:1])
    assert relative_error(alone, y[:1]) < 1e-12
    assert relative_error(final_alone, final[:1]) < 1e-12


@pytest.mark.parametrize("steepest", [1.0, 5.0, 30.0, 200.0])
def test_strong_decays_stay_finite_and_right(steepest: float) -> None:
    """Chunk-parallel forms divide by decays: exp(200) overflows float32."""
    args = inputs(1, 130, steepest=steepest, dtype=torch.float32)
    exact = run(args, state(1), impl="reference")
    reference = run(args, state(1), torch.float32, "reference")
    got = run(args, state(1), torch.float32)
    # Every form but the recurrence gets the gradient of a log decay as a difference of sums of
    # r dr and k dk. Where decays are strong it is far smaller than these, and so is its precision.
    index = NAMES.index("dlog_decay")
    size = float((args[0] * exact[2]).norm() + (args[2] * exact[4]).norm())
    error = float((got[index].double() - exact[index]).norm())
    assert error <= FACTOR * FLOOR[torch.float32] * size
    keep = [i for i in range(len(NAMES)) if i != index]
    parts = ([x[i] for i in keep] for x in (got, reference, exact))
    assert_as_good(*parts, FACTOR, [NAMES[i] for i in keep])


def test_one_strong_decay_among_weak_ones() -> None:
    args = inputs(1, 130, dtype=torch.float32)
    args[1][:, 70, 0] = -200.0
    args[1][:, 20, 1, :3] = -torch.inf
    exact, end = wkv7(*args, impl="reference")
    y, final = wkv7(*[x.float() for x in args])
    assert relative_error(y, exact) < 1e-5
    assert relative_error(final, end) < 1e-5


@pytest.mark.parametrize("tokens", [32, 64, 256])
def test_repeated_key_without_decay(tokens: int) -> None:
    """alpha = -kk, beta = kk, one key over and over: inversion by doubling explodes here."""
    args = inputs(1, tokens, dtype=torch.float32)
    kk = args[5][:, :1] / args[5][:, :1].norm(dim=-1, keepdim=True)
    kk = kk.float().double().expand_as(args[5]).contiguous()
    args[1].zero_()
    args[4], args[5] = -kk, kk * 0.999
    exact = run(args, state(1), impl="reference")
    reference = run(args, state(1), torch.float32, "reference")
    got = run(args, state(1), torch.float32)  # with gradients: chunks of 64
    assert_as_good(got, reference, exact, FACTOR, NAMES)


def test_the_first_step_by_hand() -> None:
    r, log_decay, k, v, alpha, beta = (x[:1, :1, :1] for x in inputs(1, 1))
    start = state(1)[:, :1]
    y, final = wkv7(r, log_decay, k, v, alpha, beta, initial_state=start)
    s = start[0, 0]
    step = torch.diag(log_decay[0, 0, 0].exp()) + torch.outer(alpha[0, 0, 0], beta[0, 0, 0])
    expected = s @ step + torch.outer(v[0, 0, 0], k[0, 0, 0])
    assert relative_error(final[0, 0], expected) < 1e-14
    assert relative_error(y[0, 0, 0], expected @ r[0, 0, 0]) < 1e-14


def test_the_initial_state_is_not_written_to() -> None:
    for tokens in (1, 3, 100):
        start = state(2)
        wkv7(*inputs(2, tokens), initial_state=start)
        assert torch.equal(start, state(2))


@pytest.mark.parametrize("position", range(1, 6))
def test_shapes_are_checked(position: int) -> None:
    args = inputs(1, 4)
    args[position] = args[position][:, :3]
    with pytest.raises(ValueError, match=r"must (have the shape of|be) "):
        wkv7(*args)


def test_bad_arguments() -> None:
    args = inputs(1, 4)
    with pytest.raises(ValueError, match="r must be"):
        wkv7(*[x[0] for x in args])
    with pytest.raises(ValueError, match=r"k is torch\.float32, but r is torch\.float64"):
        wkv7(*args[:2], args[2].float(), *args[3:])
    with pytest.raises(ValueError, match="floating-point"):
        wkv7(*[x.long() for x in args])
    with pytest.raises(ValueError, match="log_decay must be <= 0"):
        wkv7(args[0], -args[1], *args[2:])
    for bad in (state(2), state(1).transpose(2, 3), state(1).float()):
        with pytest.raises(ValueError, match="initial_state must be"):
            wkv7(*args, initial_state=bad)
    with pytest.raises(ValueError, match="initial_state must be"):
        wkv7(*args, initial_state=state(1), cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="unknown impl"):
        wkv7(*args, impl="cuda")
