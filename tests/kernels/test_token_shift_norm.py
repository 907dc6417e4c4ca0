"""Layer norm and token shift as one against both equations: compiled loops, and Triton (on a GPU
or interpreted)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.token_shift import Norm, fuses_norm, token_shift

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3  # large enough that leaving it out shows
# Sums over channels and tokens in another order.
FACTOR = 4.0
NAMES = ("x", "previous", "weight", "bias")


def inputs(batch: int, tokens: int, width: int, mixes: int, rows: int = 0) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(batch, tokens, width), (rows or batch, width), *[(width,)] * (2 + mixes)]
    x, *others = [torch.randn(shape).half().double().to(DEVICE) for shape in shapes]
    return [x + 1.5, *others]  # a mean that is not 0


def run(
    args: list[Tensor], dtype: torch.dtype, impl: str, offsets: list[int] | None = None
) -> list[Tensor]:
    """The mixed tokens, and gradients of everything."""
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in args]
    x, previous, weight, bias, *mixes = leaves
    out = token_shift(x, previous, mixes, cu_seqlens, impl, Norm(weight, bias, EPS))
    torch.manual_seed(2)
    total = sum((y.double() * torch.randn(y.shape).to(DEVICE)).sum() for y in out)
    total.backward()  # type: ignore[union-attr]
    return [*(y.detach() for y in out), *(x.grad for x in leaves)]  # type: ignore[misc]


def names(mixes: int) -> list[str]:
    each = [str(i) for i in range(mixes)]
    return [*(f"output {i}" for i in each), *NAMES, *(f"mix {i}" for i in each)]


CASES = [
    (2, 19, 24, 6, None),
    (3, 1, 16, 6, None),
    (1, 40, 130, 1, None),
    (1, 20, 16, 2, [0, 0, 0, 1, 18, 20, 20]),
    (1, 3, 16, 6, [0, 3]),
]


@pytest.fixture(params=[512, 3])
def _programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for each program, and several tokens for each of a few."""
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    monkeypatch.setattr("rwkvx_kernels.token_shift.triton_norm.PROGRAMS", request.param)


@pytest.mark.parametrize(("batch", "tokens", "width", "mixes", "offsets"), CASES)
@pytest.mark.usefixtures("_programs")
def test_outputs_and_gradients(
    batch: int, tokens: int, width: int, mixes: int, offsets: list[int] | None
) -> None:
    args = inputs(batch, tokens, width, mixes, len(offsets) - 1 if offsets else 0)
    exact = run(args, torch.float64, "reference", offsets)
    reference = run(args, torch.float32, "reference", offsets)
    got = run(args, torch.float32, "triton", offsets)
    # Gradients of vectors sum over all tokens, terms of either sign: as many roundings.
    least = batch * tokens * 2.0**-24
    assert_as_good(got, reference, exact, FACTOR, names(mixes), least)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled loops are for CPUs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "mixes", "offsets"),
    [*CASES, (2, 300, 48, 6, None), (1, 300, 48, 1, [0, 127, 127, 128, 256, 300])],  # blocks of 128
)
def test_compiled(
    dtype: torch.dtype, batch: int, tokens: int, width: int, mixes: int, offsets: list[int] | None
) -> None:
    args = inputs(batch, tokens, width, mixes, len(offsets) - 1 if offsets else 0)
    exact = run(args, torch.float64, "reference", offsets)
    got = run(args, dtype, "compiled", offsets)
    least = batch * tokens * torch.finfo(dtype).eps / 2
    if dtype == torch.float64:
        for a, b in zip(got, exact, strict=True):
            assert relative_error(a, b) < least * FACTOR
        return
    reference = run(args, dtype, "reference", offsets)
    assert_as_good(got, reference, exact, FACTOR, names(mixes), least)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled loops are for CPUs")
def test_compiled_in_threads_gives_the_same_bits() -> None:
    args = inputs(1, 700, 32, 6)
    one = run(args, torch.float32, "compiled")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = run(args, torch.float32, "compiled")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, several, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled loops are for CPUs")
def test_compiled_reads_strided_tokens_and_keeps_a_nan_to_its_readers() -> None:
    x, previous, weight, bias, *mixes = inputs(1, 9, 16, 2)
    norm = Norm(weight, bias, EPS)
    strided = torch.stack([x, x], dim=-1)[..., 0].requires_grad_()
    out = token_shift(strided, previous, mixes, impl="compiled", norm=norm)
    torch.autograd.backward(out, [torch.ones_like(y) for y in out])
    leaf = x.clone().requires_grad_()
    plain = token_shift(leaf, previous, mixes, impl="compiled", norm=norm)
    torch.autograd.backward(plain, [torch.ones_like(y) for y in plain])
    assert torch.equal(strided.grad, leaf.grad)  # type: ignore[arg-type]
    x[0, 4, 3] = torch.nan
    for y, good in zip(
        token_shift(x, previous, mixes, impl="compiled", norm=norm), plain, strict=True
    ):
        assert y.isnan().any(-1)[0].nonzero().flatten().tolist() == [4, 5]
        assert torch.equal(y[:, :4], good[:, :4])


def test_other_forms_norm_first() -> None:
    args = inputs(2, 7, 16, 3)
    x, previous, weight, bias, *mixes = args
    plain = token_shift(F.layer_norm(x, (16,), weight, bias, EPS), previous, mixes)
    for impl in ("torch", "reference"):
        for got, want in zip(run(args, torch.float64, impl), plain, strict=False):
            assert relative_error(got, want) < 1e-14
    assert not fuses_norm(x, "torch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("_programs")
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    args = inputs(1, 11, 20, 6)
    exact, reference = (run(args, x, "reference") for x in (torch.float64, dtype))
    assert_as_good(run(args, dtype, "triton"), reference, exact, FACTOR, names(6))


def test_normed_tokens_are_rounded_as_the_state_is() -> None:
    """So that a sequence in two parts, with the last normed token in between, is the whole one."""
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    x, previous, *vectors = (t.half() for t in inputs(2, 9, 16, 1))
    norm, mixes = Norm(*vectors[:2], EPS), vectors[2:]
    (whole,) = token_shift(x, previous, mixes, impl="triton", norm=norm)
    zero = torch.zeros_like(mixes[0])
    (normed,) = token_shift(x, previous, [zero], impl="triton", norm=norm)
    assert relative_error(normed, norm(x).double()) < 2 * 2.0**-11
    (rest,) = token_shift(x[:, 5:], normed[:, 4], mixes, impl="triton", norm=norm)
    assert torch.equal(rest, whole[:, 5:])


@pytest.mark.parametrize("impl", ["triton", "compiled"])
def test_autocast_mixes_in_its_dtype(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    elif DEVICE == "cuda":
        pytest.skip("compiled loops are for CPUs")
    dtype = torch.float16 if impl == "triton" else torch.bfloat16
    x, previous, weight, bias, *mixes = (t.float() for t in inputs(2, 5, 16, 2))
    norm = Norm(weight, bias, EPS)
    wide = token_shift(x, previous, mixes, impl=impl, norm=norm)
    with torch.autocast(DEVICE, dtype):
        narrow = token_shift(x, previous, mixes, impl=impl, norm=norm)
    for got, expected in zip(narrow, wide, strict=True):
        assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize(("batch", "tokens", "offsets"), [(2, 0, None), (1, 0, [0, 0, 0])])
def test_no_tokens(batch: int, tokens: int, offsets: list[int] | None) -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    *out, dx, dprevious, dweight, dbias, dmix = run(
        inputs(batch, tokens, 16, 1, 2), torch.float32, "triton", offsets
    )
    assert [len(x.flatten()) for x in (*out, dx)] == [0, 0]
    assert all(not x.any() for x in (dprevious, dweight, dbias, dmix))


@pytest.mark.usefixtures("_programs")
def test_one_token_that_is_not_a_number() -> None:
    """Spoils itself and, through the shift, the next one: forward and backward."""
    x, previous, weight, bias, mix = (t.float() for t in inputs(1, 12, 16, 1))
    x[0, 5, 3] = torch.nan
    x.requires_grad_()
    (out,) = token_shift(x, previous, [mix], impl="triton", norm=Norm(weight, bias, EPS))
    out.sum().backward()
    spoilt = out.isnan().any(2)[0].nonzero().flatten().tolist()
    assert spoilt == [5, 6]
    assert x.grad is not None
    assert x.grad.isnan().any(2)[0].nonzero().flatten().tolist() == [5]


@pytest.mark.usefixtures("_programs")
def test_gradients_are_the_same_bits_every_time() -> None:
    args = inputs(1, 30, 40, 6)
    for a, b in zip(*(run(args, torch.float32, "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_wide_tokens_are_normed_first() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    args = inputs(1, 3, 2049, 1)
    assert fuses_norm(args[0].float()[..., :2048], "triton")
    assert not fuses_norm(args[0].float(), "triton")
    exact, reference = (run(args, x, "reference") for x in (torch.float64, torch.float32))
    assert_as_good(run(args, torch.float32, "triton"), reference, exact, FACTOR, names(1))


def test_a_norm_that_does_not_fit_is_refused() -> None:
    x, previous, weight, bias, mix = inputs(1, 5, 16, 1)
    for norm in (Norm(weight[:8], bias, EPS), Norm(weight, bias[:, None], EPS)):
        with pytest.raises(ValueError, match=r"weight and bias of the norm must be \[16\]"):
            token_shift(x, previous, [mix], norm=norm)


@pytest.mark.gpu
@pytest.mark.parametrize("offsets", [None, [0, 1, 1, 65_535, 65_537, 70_000]])
def test_past_65536_tokens(offsets: list[int] | None) -> None:
    args = inputs(1, 70_000, 768, 6, len(offsets) - 1 if offsets else 0)
    exact, reference = (run(args, x, "reference", offsets) for x in (torch.float64, torch.bfloat16))
    got = run(args, torch.bfloat16, "triton", offsets)
    assert_as_good(got, reference, exact, FACTOR, names(6))


def counts(call: Callable[[], object]) -> tuple[list[str], int]:
    """Names of the launches; bytes of all tensors that each was given, read or written once."""
    from counting import counted
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    moved = 0
    with counted() as found, pytest.MonkeyPatch.context() as patch:
        launch = JITFunction.run

        def run(kernel: object, *given: object, **named: object) -> None:
            nonlocal moved
            launch(kernel, *given, **named)
            moved += sum(x.nbytes for x in given if isinstance(x, Tensor))

        patch.setattr(JITFunction, "run", run)
        patch.setattr(InterpretedFunction, "run", run)
        call()
    return found.kernels, moved


@pytest.mark.parametrize(("mixes", "tokens"), [(1, 16_384), (6, 16_384), (6, 131_072)])
def test_launches_and_bytes(mixes: int, tokens: int) -> None:
    """Tokens and mixes cross memory once each, and 1/8 of them more as sums of 32 tokens."""
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    from rwkvx_kernels.token_shift import triton_norm

    x = torch.empty(1, tokens, 1024, dtype=torch.bfloat16, device="meta")
    previous, vector = x[:, 0], x[0, 0]
    norm, given = Norm(vector, vector, EPS), [vector] * mixes
    vectors = (4 + mixes) * vector.nbytes
    launches, moved = counts(lambda: triton_norm.forward(x, previous, norm, given, None, x.dtype))
    assert launches == ["_norm_forward_kernel"]
    assert moved <= (1 + mixes) * x.nbytes + vectors
    dout = [torch.empty_like(x)] * mixes
    launches, moved = counts(lambda: triton_norm.backward(x, previous, norm, given, None, dout))
    assert launches.count("_norm_backward_kernel") == 1
    assert len(launches) <= 2 + 1 + 2 + mixes  # zeros of dprevious, the sum, a copy of each vector
    partial = (2 + mixes) * 4 / 2 / 32  # float32 beside bfloat16
    assert moved <= (2 + mixes + partial) * x.nbytes + vectors
