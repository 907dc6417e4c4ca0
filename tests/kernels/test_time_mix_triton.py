"""The time mix in Triton, on a GPU or in Triton's interpreter (tiny shapes: it is slow).

Expected values are those of the equations in float64; tolerances as in `measure.py`.
"""

import pytest
import torch
from measure import assert_as_good, relative_error
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx_kernels.time_mix import (
    TimeMixWeights,
    time_mix,
    triton_finish,
    triton_keys,
    triton_ops,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 64e-5
TOKENS = ("r", "w", "k", "v", "a", "g", "mix", "v_first")
NAMES = ("y", "state", *(f"d{x}" for x in (*TOKENS, *TimeMixWeights._fields, "start")))
# The recurrence in chunks errs up to 6 times as much as token by token (test_wkv7_triton.py); on a
# GPU its products have 3 bits less than float32.
FACTOR = 50.0 if DEVICE == "cuda" else 10.0
# Results are rounded to bfloat16, which has 8 bits, once each.
ROUNDING = 1e-2


def inputs(
    batch: int,
    tokens: int,
    heads: int = 2,
    size: int = 16,
    sequences: int = 0,
    residual: bool = True,
) -> list[Tensor | None]:
    """Tokens, weights and the initial state, of values that float16 can hold."""
    torch.manual_seed(tokens)
    width = heads * size
    args: list[Tensor | None] = [torch.randn(batch, tokens, width) for _ in TOKENS]
    args += [torch.randn(width) for _ in TimeMixWeights._fields]
    args[len(TOKENS) + TimeMixWeights._fields.index("r_k")] = torch.randn(heads, size)
    args.append(torch.randn(sequences or batch, heads, size, size))
    if not residual:
        for name in ("mix", "v_first"):
            args[TOKENS.index(name)] = None
        args[len(TOKENS) + TimeMixWeights._fields.index("v0")] = None
    return [x if x is None else x.half().double().to(DEVICE) for x in args]


def call(
    args: list[Tensor | None], impl: str, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    *tokens, mix, v_first = args[:8]
    residual = None if mix is None else (mix, v_first)
    weights = TimeMixWeights(*args[8:-1])
    return time_mix(*tokens, residual, weights, EPS, args[-1], cu_seqlens, impl=impl)


def run(
    args: list[Tensor | None], dtype: torch.dtype, impl: str, cu_seqlens: Tensor | None = None
) -> list[Tensor | None]:
    """Output, final state and the gradient of every input of a loss that weighs both."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x if x is None else x.to(dtype, copy=True).requires_grad_() for x in args[:-1]]
    leaves.append(args[-1].to(wide, copy=True).requires_grad_())
    y, final = call(leaves, impl, cu_seqlens)
    torch.manual_seed(2)
    weight_y, weight_s = torch.randn(y.shape).to(DEVICE), torch.randn(final.shape).to(DEVICE)
    ((y.double() * weight_y).sum() + (final.double() * weight_s).sum()).backward()
    return [y.detach(), final.detach(), *(x if x is None else x.grad for x in leaves)]


def check(
    args: list[Tensor | None],
    dtype: torch.dtype = torch.float32,
    cu_seqlens: Tensor | None = None,
) -> None:
    exact = run(args, torch.float64, "reference", cu_seqlens)
    reference = run(args, dtype, "reference", cu_seqlens)
    assert_as_good(run(args, dtype, "triton", cu_seqlens), reference, exact, FACTOR, NAMES)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size", "residual"),
    [(2, 37, 2, 16, True), (1, 5, 3, 24, False), (1, 90, 1, 40, True)],
)
def test_outputs_and_gradients(
    batch: int, tokens: int, heads: int, size: int, residual: bool
) -> None:
    """More tokens than one step of a program and than all its steps; sizes of no power of two."""
    check(inputs(batch, tokens, heads, size, residual=residual))


def test_float16() -> None:
    check(inputs(1, 20), torch.float16)


@pytest.mark.parametrize("offsets", [[0, 0, 17, 18, 30, 30], [0, 16]])
def test_packed(offsets: list[int]) -> None:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    check(inputs(1, offsets[-1], sequences=len(offsets) - 1), cu_seqlens=cu_seqlens)


def test_keys_of_zeros_have_finite_gradients() -> None:
    args = inputs(1, 3)
    args[TOKENS.index("k")][:, 1] = 0.0  # type: ignore[index]
    check(args)


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 4], [0, 0, 8]])
@pytest.mark.parametrize(("size", "residual"), [(16, True), (24, False)])
def test_few_tokens_without_a_gradient_are_one_launch(
    monkeypatch: pytest.MonkeyPatch, offsets: list[int] | None, size: int, residual: bool
) -> None:
    monkeypatch.setattr(triton_ops, "time_mix_forward", None)
    batch, tokens = (2, 2) if offsets is None else (1, offsets[-1])
    sequences = batch if offsets is None else len(offsets) - 1
    args = inputs(batch, tokens, 2, size, sequences, residual)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    exact = call(args, "reference", cu_seqlens)
    narrow = [x if x is None else x.float() for x in args]
    reference = call(narrow, "reference", cu_seqlens)
    got = call(narrow, "triton", cu_seqlens)
    assert_as_good(got, reference, exact, 4.0, ("y", "state"))


def test_only_the_output_or_only_the_state_is_used() -> None:
    for index in (0, 1):
        grads = []
        for dtype, impl in ((torch.float64, "reference"), (torch.float32, "triton")):
            leaves = [x.to(dtype).requires_grad_() for x in inputs(1, 9)]
            call(leaves, impl)[index].sum().backward()
            grads.append(leaves[TOKENS.index("v")].grad)
        assert relative_error(grads[1], grads[0]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_sizes(dtype: torch.dtype, size: int) -> None:
    check(inputs(1, 2000, 4, size), dtype)


def narrow(tokens: int, heads: int, size: int = 16, sequences: int = 1) -> list[Tensor | None]:
    """In bfloat16, every head and sequence as the others, without a value residual.

    All six of a token are one tensor, and so are all weights: more does not fit.
    """
    draw = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=draw)

    x = normal(1, tokens, 1, size).expand(sequences, -1, heads, -1).flatten(2).contiguous()
    weight = normal(1, size).expand(heads, -1).contiguous()
    flat = weight.flatten()
    weights = [weight if name == "r_k" else flat for name in TimeMixWeights._fields]
    weights[TimeMixWeights._fields.index("v0")] = None  # type: ignore[call-overload]
    state = normal(1, 1, size, size).float().expand(sequences, heads, -1, -1).contiguous()
    return [*[x] * 6, None, None, *weights, state]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "sequences"), [(2**20 + 40, 128, 16, 1), (1, 16, 64, 2**15 + 1)]
)
def test_past_two_to_the_31_elements(tokens: int, heads: int, size: int, sequences: int) -> None:
    """The last head of the last sequence is as if it were alone: in chunks, and in one launch."""
    args = narrow(tokens, heads, size, sequences)
    assert max(args[0].numel(), args[-1].numel()) > 2**31  # type: ignore[union-attr]
    y, final = call(args, "triton")
    alone, end = call(narrow(tokens, 1, size), "triton")
    assert relative_error(y[-1:, -1000:, -size:], alone[:, -1000:]) < ROUNDING
    assert relative_error(final[-1:, -1:], end) < ROUNDING


@pytest.mark.gpu
def test_gradients_past_two_to_the_31_elements() -> None:
    """Of what stands around the recurrence, whose own have a test in test_wkv7_gpu.py."""
    tokens, heads, size = 2**20 + 40, 128, 16
    results = []
    for count in (heads, 1):
        args = narrow(tokens, count, size)
        x, r_k = args[0], args[len(TOKENS) + TimeMixWeights._fields.index("r_k")]
        flat = r_k.flatten()  # type: ignore[union-attr]
        finish, last = triton_finish.gradients(x, [x] * 5, [r_k, flat, flat], EPS)  # type: ignore[list-item, arg-type]
        later = [finish[3], *[x] * 7]
        new, first = triton_keys.gradients([x] * 5, [], [flat] * 4, r_k, later)  # type: ignore[list-item, arg-type]
        results.append([t[..., -1000:, -size:].clone() for t in (*finish[:3], *new, last, first)])
    for got, alone in zip(*results, strict=True):
        assert relative_error(got, alone) < ROUNDING


def test_operators() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for residual, offsets in ((True, None), (False, [0, 3, 18])):
        args = [
            x
            for x in inputs(1, 18, sequences=2 if offsets else 1, residual=residual)
            if x is not None
        ]
        args = [x.float().requires_grad_() for x in args]
        count = 8 if residual else 6
        weights = args[count:-1]
        if residual:  # v0 comes last
            weights.append(weights.pop(2))
        cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
        given = (args[:count], weights, EPS, args[-1], cu_seqlens)
        torch.library.opcheck(torch.ops.rwkvx.time_mix, (*given, True), test_utils=tests)
        torch.library.opcheck(torch.ops.rwkvx.time_mix_step, given, test_utils=tests[::2])


def test_a_state_of_another_batch_size_is_refused() -> None:
    args = [x.float() for x in inputs(2, 3, sequences=3)]
    with pytest.raises(ValueError, match="a state of 3 sequences, but there are 2"):
        call(args, "triton")
