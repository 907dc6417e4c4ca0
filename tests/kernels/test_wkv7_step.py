"""The Triton kernel for one or a few tokens, on a GPU or in Triton's interpreter."""

import pytest
import torch
from measure import assert_as_good
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx_kernels.wkv7 import wkv7
from rwkvx_kernels.wkv7.triton_ops import wkv7_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KEY, VALUE = 3, 24, 40
# The interpreter does no arithmetic in bfloat16.
NARROW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def inputs(batch: int, tokens: int, sequences: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens)
    keys = torch.randn(5, batch, tokens, HEADS, KEY)
    r, k, beta, alpha = (x.to(dtype) for x in (keys[0], keys[1], keys[2] / 5, keys[3] / 5))
    v = torch.randn(batch, tokens, HEADS, VALUE).to(dtype)
    state = torch.randn(sequences, HEADS, VALUE, KEY)
    return [x.to(DEVICE) for x in (r, -keys[4].sigmoid(), k, v, alpha, beta, state)]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_batch(tokens: int, dtype: torch.dtype) -> None:
    *args, state = inputs(2, tokens, 2, dtype)
    start = state.clone()
    exact = wkv7(*[x.double() for x in args], initial_state=state.double(), impl="reference")
    reference = wkv7(*args, initial_state=state, impl="reference")
    assert_as_good(wkv7_step(*args, state, None), reference, exact, 4.0, ("y", "state"))
    assert torch.equal(state, start)


@pytest.mark.parametrize("offsets", [[0, 1, 2, 3], [0, 0, 4, 5]])
def test_packed(offsets: list[int]) -> None:
    *args, state = inputs(1, offsets[-1], 3, torch.float32)
    cu_seqlens = torch.tensor(offsets, device=DEVICE)
    wide = [x.double() for x in (*args, state)]
    exact = wkv7(*wide, cu_seqlens=cu_seqlens, impl="reference")
    reference = wkv7(*args, state, cu_seqlens=cu_seqlens, impl="reference")
    assert_as_good(wkv7_step(*args, state, cu_seqlens), reference, exact, 4.0, ("y", "state"))
