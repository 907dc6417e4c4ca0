"""The Triton kernels of chunk attention, on a GPU or in Triton's interpreter, against float64.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

from typing import NamedTuple

import pytest
import torch
from choices import reference_sets, sets_of
from measure import assert_as_good, attention_error, relative_error
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    cached_chunk_attention,
    chunk_attention,
    triton_backward,
    triton_ops,
)
from rwkvx_kernels.chunk_select import chunk_means, select_chunks, triton_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter does no arithmetic in bfloat16.
NARROW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
NAMES = ("o", "dq", "dk", "dv")
# Online softmax over blocks; weights and their gradients are rounded to the input's dtype before
# they meet values and keys, once each.
FACTOR = 4.0


class Case(NamedTuple):
    tokens: int
    chunk: int
    topk: int
    heads: int = 2
    groups: int = 1
    dim: int = 16
    batch: int = 1

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Chunk means far enough apart for one choice in every dtype."""
        torch.manual_seed(self.tokens + self.chunk)
        q = torch.randn(self.batch, self.tokens, self.heads, self.dim)
        k, v = (torch.randn(self.batch, self.tokens, self.groups, self.dim) for _ in range(2))
        chunk = torch.arange(self.tokens) // self.chunk
        k[..., 0] += (chunk * 7 % 11)[None, :, None] * 2.0
        q[..., 0] = q[..., 0].abs() + 0.5
        return tuple(x.to(DEVICE, dtype) for x in (q * 0.7, k * 0.7, v))


CASES = [
    Case(51, 16, 2, batch=2),  # no multiple of the chunk
    Case(100, 32, 2, heads=4, groups=2, dim=24),
    Case(70, 16, 1),  # own chunk only: nothing is ever chosen
    Case(20, 48, 3),  # less than a chunk: nothing to choose from
    Case(120, 48, 2, heads=1),  # a chunk that is no power of two
    Case(50, 16, 9, heads=1, dim=40),  # more than there are chunks
    Case(2, 16, 2),
    Case(0, 16, 2),
]


def run(args: tuple[Tensor, ...], case: Case, impl: str, wide: bool = False) -> list[Tensor | None]:
    """Output and gradients of a weighted sum of it."""
    leaves = [x.detach().to(torch.float64 if wide else x.dtype).requires_grad_() for x in args]
    o = chunk_attention(*leaves, case.chunk, case.topk, impl=impl)
    torch.manual_seed(9)
    (o * torch.randn(o.shape).to(args[0].dtype).to(o)).sum().backward()
    return [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    args = case.inputs()
    if not case.tokens:
        assert run(args, case, "triton")[0].shape == args[0].shape  # type: ignore[union-attr]
        return
    exact = run(args, case, "reference", wide=True)
    got, reference = run(args, case, "triton"), run(args, case, "reference")
    least = attention_error(torch.float32) if DEVICE == "cuda" else 0.0
    assert_as_good(got, reference, exact, FACTOR, NAMES, least)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    case = Case(67, 16, 2)
    args = case.inputs(dtype)
    exact = run(args, case, "reference", wide=True)
    got = run(args, case, "triton")
    assert all(x is not None and x.dtype == dtype for x in got)
    assert_as_good(got, run(args, case, "reference"), exact, FACTOR, NAMES)


@pytest.mark.parametrize("share", [1.0, 0.4], ids=["groups", "queries"])
def test_where_memory_asks_for_parts(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups one after the other, then queries too; a chunk that every query reads, whose list is
    longer than a program takes."""
    case = Case(150, 16, 2, groups=2)
    q, k, v = case.inputs()
    k[:, 16:32] += 3 * q[:, -1, :1].mean(dim=1)[:, None, None]
    exact = run((q, k, v), case, "reference", wide=True)
    ours = run((q, k, v), case, "reference")
    monkeypatch.setattr(triton_ops, "LEAST_BYTES", int(share * 150 * (16 * 4 + 8)))
    monkeypatch.setattr(triton_ops, "PART_OF_INPUTS", 0.0)
    monkeypatch.setattr(triton_backward, "LEAST_SEGMENT", 32)
    work = triton_ops.works(triton_ops.shape_of(q, k, 16, 1), 4, 0, 0)
    assert [len(x.parts) for x in work] == [2] * (1 if share == 1 else 4)
    assert_as_good(run((q, k, v), case, "triton"), ours, exact, FACTOR, NAMES)


def test_packed_sequences() -> None:
    case = Case(90, 16, 2)
    args, cu_seqlens = case.inputs(), torch.tensor([0, 40, 40, 90], device=DEVICE)
    outputs = [
        chunk_attention(*args, 16, 2, cu_seqlens=cu_seqlens, impl=impl)
        for impl in ("triton", "reference")
    ]
    assert relative_error(*outputs) < 1e-6


@pytest.mark.parametrize("topk", [2, 4])
def test_selection(topk: int) -> None:
    """Every query's choice in one go, against sorting all scores."""
    case = Case(150, 16, topk, heads=2)
    q, k, _ = case.inputs()
    chosen = select_chunks(q, chunk_means(k.transpose(1, 2), 16), 16, topk, impl="triton")
    assert torch.equal(sets_of(chosen, 9), reference_sets(q, k, 16, topk))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_cached(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, split over chunks, and longer pieces; what is behind the length is not read."""
    monkeypatch.setattr(triton_decode, "MOST_SPLIT", 2)
    monkeypatch.setattr(triton_decode, "LEAST_BLOCK", 2)
    q, k, v = Case(150, 16, 3, heads=4, groups=2, batch=2).inputs()
    cache = KeyValueCache(2, 2, 16, 16, k).append(0, k, v)
    length = 130
    part = q[:, length - tokens : length]
    got = cached_chunk_attention(part, cache, length, 3, impl="triton")
    wide = [x[:, :length].double() for x in (q, k, v)]
    exact = chunk_attention(*wide, 16, 3, impl="reference")[:, -tokens:]
    assert relative_error(got, exact) < 1e-6


def test_decoding_sequences_of_unequal_length() -> None:
    q, k, v = Case(100, 16, 3, heads=2, batch=3).inputs()
    cache = KeyValueCache(3, 1, 16, 16, k).append(0, k, v)
    cached = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD, [])
    lengths = [100, 7, 49]
    part = torch.cat([q[i : i + 1, n - 2 : n] for i, n in enumerate(lengths)])
    got = triton_ops.decode_triton(part, *cached, torch.tensor(lengths, device=DEVICE), 16, 3)
    for i, n in enumerate(lengths):
        wide = [x[i : i + 1, :n].double() for x in (q, k, v)]
        exact = chunk_attention(*wide, 16, 3, impl="reference")[:, -2:]
        assert relative_error(got[i : i + 1], exact) < 1e-6


def test_results_repeat_bit_for_bit() -> None:
    case = Case(40, 16, 2)
    first, second = (run(case.inputs(), case, "triton") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 24}, "multiple of 16"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_there_is_not_is_said(options: dict, message: str) -> None:
    dtype = options.pop("dtype", torch.float32)
    q, k, v = Case(40, 16, 2).inputs(dtype)
    with pytest.raises(NotImplementedError, match=message):
        chunk_attention(q, k, v, **{"chunk_size": 16, "topk": 2, "impl": "triton", **options})
