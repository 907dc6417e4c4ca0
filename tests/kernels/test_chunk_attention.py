"""Top-k chunk attention: the fast form against full score matrices in float64, and against itself.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import LargestTensor, assert_as_good, relative_error
from torch import Tensor

from rwkvx_kernels.chunk_attention import chunk_attention

NAMES = ("o", "dq", "dk", "dv")
# Online softmax over pieces: exponentials and sums in another order than one softmax.
FACTOR = 4.0


class Case(NamedTuple):
    tokens: int
    chunk: int
    topk: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2

    def inputs(self, seed: int = 0, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D] and k, v [B, T, G, D], float64 values that float32 can hold."""
        torch.manual_seed(seed)
        q = torch.randn(self.batch, self.tokens, self.heads, dim)
        k, v = (torch.randn(self.batch, self.tokens, self.kv_heads, dim) for _ in range(2))
        return q.double() * 1.5, k.double(), v.double()


CASES = [
    Case(1, 4, 2),
    Case(3, 8, 3),  # less than a chunk
    Case(8, 8, 3),
    Case(64, 8, 3),
    Case(64, 8, 3, batch=1),  # keys in chunks without a copy
    Case(67, 8, 3),  # no multiple of the chunk
    Case(67, 8, 1),  # own chunk only
    Case(67, 8, 3, heads=3, kv_heads=3),  # as many key heads as query heads
    Case(67, 8, 3, heads=4, kv_heads=1),
    Case(50, 1, 4),
    Case(100, 16, 50),  # more than there are chunks
    Case(333, 16, 4, batch=1),
    Case(700, 256, 2, batch=1),  # large chunks have a path of their own
    Case(1100, 300, 3, heads=2, kv_heads=1, batch=1),
    Case(0, 8, 3),
]


def run(
    args: tuple[Tensor, ...], case: Case, dtype: torch.dtype = torch.float64, impl: str = "torch"
) -> list[Tensor | None]:
    """Output and gradients of a weighted sum of it."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in args]
    o = chunk_attention(*leaves, case.chunk, case.topk, impl=impl)
    torch.manual_seed(9)
    (o * torch.randn(o.shape).to(dtype)).sum().backward()
    return [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_reference(case: Case) -> None:
    args = case.inputs()
    expected = run(args, case, impl="reference")
    got = run(args, case)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        if case.tokens:
            assert a is not None
            assert b is not None
            assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_without_gradients(case: Case) -> None:
    args = case.inputs()
    expected = chunk_attention(*args, case.chunk, case.topk, impl="reference")
    with torch.no_grad():
        assert relative_error(chunk_attention(*args, case.chunk, case.topk), expected) < 1e-12


def separated(case: Case) -> tuple[Tensor, ...]:
    """Inputs whose chunk scores differ by far more than any rounding: one choice of chunks.

    The mean keys of the chunks are different unit vectors times growing lengths.
    """
    q, k, v = case.inputs()
    chunk = torch.arange(case.tokens) // case.chunk
    mean = torch.zeros_like(k)
    mean[..., 0] = (chunk * 7 % 11)[None, :, None] * 0.5
    last = case.tokens // case.chunk * case.chunk
    centred = k.clone()
    for start in range(0, last, case.chunk):
        part = k[:, start : start + case.chunk]
        centred[:, start : start + case.chunk] = part - part.mean(1, keepdim=True)
    q[..., 0] = q[..., 0].abs() + 0.5
    return tuple(x.bfloat16().double() for x in (q, centred + mean, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(83, 8, 3), Case(700, 256, 2, batch=1)], ids=str)
def test_narrow_dtypes_err_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    args = separated(case)
    exact = run(args, case, impl="reference")
    reference = run(args, case, dtype, "reference")
    got = run(args, case, dtype)
    assert all(x is not None and x.dtype == dtype for x in got)
    assert_as_good(got, reference, exact, FACTOR, NAMES)


@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("chunk", [4, 13, 256])
def test_short_inputs_are_dense_causal_attention(chunk: int, topk: int) -> None:
    """All completed chunks are chosen while T <= topk · chunk."""
    case = Case(topk * chunk if chunk < 256 else 300, chunk, max(topk, 2 if chunk == 256 else 1))
    q, k, v = case.inputs()
    q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q_t, k_t, v_t, is_causal=True, enable_gqa=True)
    got = chunk_attention(q, k, v, case.chunk, case.topk)
    assert relative_error(got, expected.transpose(1, 2)) < 1e-12


def test_what_is_attended_by_hand() -> None:
    """Five chunks of 2 tokens, top 2: query 9 reads chunk 4 causally and its best past chunk."""
    k = torch.zeros(1, 10, 1, 2, dtype=torch.float64)
    k[0, 2, 0], k[0, 3, 0] = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])  # chunk 1: mean 2
    k[0, 6, 0, 0] = 3.5  # chunk 3: mean 1.75, though it holds the best single key
    q = torch.zeros_like(k)
    q[..., 0] = 1.0
    v = torch.eye(10, dtype=torch.float64)[None, :, None, :2]
    wide = torch.arange(10, dtype=torch.float64)
    v[0, :, 0, 0] = wide
    o = chunk_attention(q, k, v, 2, 2)
    score = torch.tensor([1.0, 3.0, 0.0, 0.0]) * 2**-0.5  # tokens 2, 3 of chunk 1; 8, 9 its own
    weights = score.double().softmax(0)
    assert o[0, 9, 0, 0] == pytest.approx(float((weights * torch.tensor([2, 3, 8, 9])).sum()))
    own = torch.tensor([1.0, 3.0, 0.0]).double().mul(2**-0.5).softmax(0)
    assert o[0, 8, 0, 0] == pytest.approx(float((own * torch.tensor([2, 3, 8])).sum()))


@pytest.mark.parametrize("case", [Case(67, 8, 3), Case(700, 256, 2, batch=1)], ids=str)
def test_the_future_changes_nothing(case: Case) -> None:
    """Token 40 on is replaced: outputs before it stay, bit for bit where tiles are the same."""
    args, other = case.inputs(), case.inputs(seed=5)
    mixed = tuple(torch.cat([a[:, :40], b[:, 40:]], 1) for a, b in zip(args, other, strict=True))
    o, o_mixed = (chunk_attention(*x, case.chunk, case.topk) for x in (args, mixed))
    assert relative_error(o_mixed[:, :40], o[:, :40]) < 1e-13
    assert not torch.allclose(o_mixed[:, 41:], o[:, 41:])


@pytest.mark.parametrize("offsets", [[0, 90], [0, 0, 30, 30, 31, 90, 90], [0, 16, 48, 90]])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_packed_sequences(offsets: list[int], impl: str) -> None:
    case = Case(90, 8, 3, batch=1)
    leaves = [x.requires_grad_() for x in case.inputs()]
    o = chunk_attention(*leaves, 8, 3, cu_seqlens=torch.tensor(offsets), impl=impl)
    o.square().sum().backward()
    for a, b in pairwise(offsets):
        parts = [x[:, a:b].detach().requires_grad_() for x in leaves]
        alone = chunk_attention(*parts, 8, 3, impl="reference")
        alone.square().sum().backward()
        assert relative_error(o[:, a:b].detach(), alone.detach()) < 1e-12
        for whole, part in zip(leaves, parts, strict=True):
            if a < b:
                assert relative_error(whole.grad[:, a:b], part.grad) < 1e-12  # type: ignore


@pytest.mark.parametrize("case", [Case(67, 8, 3, batch=3), Case(700, 256, 2, batch=2)], ids=str)
def test_rows_of_a_batch_equal_single_rows(case: Case) -> None:
    args = case.inputs()
    o = chunk_attention(*args, case.chunk, case.topk)
    for row in range(case.batch):
        alone = chunk_attention(*[x[row : row + 1] for x in args], case.chunk, case.topk)
        assert relative_error(o[row : row + 1], alone) < 1e-13


@pytest.mark.parametrize("grad", [False, True])
def test_scores_are_never_held_at_once(grad: bool) -> None:
    """No tensor of T · T or T · T/B elements (per head), forward or backward."""
    tokens, chunk = 8192, 4
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 1, 4).requires_grad_(grad) for _ in range(3))
    with LargestTensor() as largest:
        o = chunk_attention(q, k, v, chunk, 2)
        if grad:
            o.sum().backward()
    assert largest.elements <= tokens * tokens // chunk // 4


@pytest.mark.parametrize("topk", [2, 9])
def test_the_reference_sees_what_the_measure_must_see(topk: int) -> None:
    args = Case(256, 4, topk, batch=1).inputs()
    with LargestTensor() as largest:
        chunk_attention(*args, 4, topk, impl="reference")
    assert largest.elements >= 256 * 256 * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": (1, 8, 2, 8), "v": (1, 8, 2, 8)}, ValueError, "batch"),
        ({"k": (2, 7, 2, 8)}, ValueError, r"must be \[B, T, H, D\]"),
        ({"k": (2, 8, 3, 8), "v": (2, 8, 3, 8)}, ValueError, "no multiple"),
        ({"k": (2, 7, 2, 8), "v": (2, 7, 2, 8)}, ValueError, "q has 8 tokens"),
        ({"q": (2, 8, 4)}, ValueError, "must be"),
        ({"chunk_size": 0}, ValueError, ">= 1"),
        ({"topk": 0}, ValueError, ">= 1"),
        ({"impl": "flash"}, ValueError, "unknown impl"),
        ({"selection": "tree"}, NotImplementedError, "selection"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    shapes: dict = {"q": (2, 8, 4, 8), "k": (2, 8, 2, 8), "v": (2, 8, 2, 8)}
    shapes |= {name: x for name, x in change.items() if name in shapes}
    options = {name: x for name, x in change.items() if name not in shapes}
    tensors = {name: torch.zeros(x) for name, x in shapes.items()}
    with pytest.raises(error, match=message):
        chunk_attention(**tensors, **{"chunk_size": 4, "topk": 2, **options})


def test_dtypes_are_checked() -> None:
    q, k, v = Case(8, 4, 2).inputs()
    with pytest.raises(ValueError, match="share a float dtype"):
        chunk_attention(q, k.float(), v, 4, 2)
    with pytest.raises(ValueError, match="share a float dtype"):
        chunk_attention(q.long(), k.long(), v.long(), 4, 2)
