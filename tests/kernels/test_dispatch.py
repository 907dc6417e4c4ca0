"""Choosing an implementation, and packed-sequence offsets."""

from importlib.util import find_spec

import pytest
import torch

from rwkvx_kernels import chunk_attention, wkv7
from rwkvx_kernels.dispatch import check_cu_seqlens, resolve_impl

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (the extra gpu)")
def test_auto_takes_what_there_is() -> None:
    assert resolve_impl("auto", CPU, ("reference", "cpu")) == "cpu"
    assert resolve_impl("auto", CPU, ("reference", "cpu", "triton")) == "cpu"
    assert resolve_impl("auto", CUDA, ("reference", "cpu", "triton")) == "triton"
    assert resolve_impl("auto", CUDA, ("reference", "cpu")) == "cpu"


@pytest.mark.parametrize("family", [wkv7, chunk_attention], ids=["wkv7", "chunk_attention"])
def test_every_family_says_what_it_chose(family) -> None:  # type: ignore[no-untyped-def]
    assert family.chosen_impl("cpu") == "cpu"
    assert family.chosen_impl("cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        family.chosen_impl("cpu", "fast")


def test_an_explicit_request_is_never_replaced() -> None:
    assert resolve_impl("reference", CUDA, ("reference", "cpu", "triton")) == "reference"
    with pytest.raises(NotImplementedError, match="not there yet"):
        resolve_impl("triton", CUDA, ("reference", "cpu"))


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    available = ("reference", "cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_impl("triton", CPU, available) == "triton"
    assert resolve_impl("auto", CPU, available) == "cpu"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert resolve_impl("triton", CUDA, available) == "triton"
    with pytest.raises(ValueError, match=r'impl="triton" needs tensors on a GPU, these are on cpu'):
        resolve_impl("triton", CPU, available)


def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkvx_kernels.dispatch.HAS_TRITON", False)
    assert resolve_impl("auto", CUDA, ("reference", "cpu", "triton")) == "cpu"
    with pytest.raises(ModuleNotFoundError, match=r"pip install .rwkvx\[gpu\]"):
        resolve_impl("triton", CUDA, ("reference", "cpu", "triton"))


@pytest.mark.parametrize("offsets", [[0, 5], [0, 0, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5]])
def test_good_offsets(offsets: list[int]) -> None:
    for dtype in (torch.int32, torch.int64):
        assert check_cu_seqlens(torch.tensor(offsets, dtype=dtype), 1, 5) == offsets


@pytest.mark.parametrize(
    ("offsets", "batch", "message"),
    [
        ([1, 5], 1, "must rise from 0 to T = 5"),
        ([0, 4], 1, "must rise"),
        ([0, 3, 2, 5], 1, "must rise"),
        ([[0, 5]], 1, "1-D integer"),
        ([0.0, 5.0], 1, "1-D integer"),
        ([0, 5], 2, "batch size 1, got 2"),
    ],
)
def test_bad_offsets(offsets: list[int], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(torch.tensor(offsets), batch, 5)


def test_autocast_changes_nothing() -> None:
    """The operations choose their own dtypes: a bfloat16 state would forget within 256 tokens."""
    torch.manual_seed(0)
    r, k, v, x = (torch.randn(1, 40, 2, 8) for _ in range(4))
    decay = -torch.rand(1, 40, 2, 8)
    expected = wkv7.wkv7(r, decay, k, v, -x * 0.1, x * 0.1)
    attended = chunk_attention.chunk_attention(r, k, v, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = wkv7.wkv7(r, log_decay=decay, k=k, v=v, alpha=-x * 0.1, beta=x * 0.1)
        o = chunk_attention.chunk_attention(q=r, k=k, v=v, chunk_size=4, topk=2)
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])
    assert torch.equal(o, attended)
