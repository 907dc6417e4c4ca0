"""Launches and bytes of WKV7 on a GPU, counted without one: against what any kernel must move."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from counting import counted
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from rwkvx_kernels.token_shift.triton_mixes import backward as shift_backward
from rwkvx_kernels.token_shift.triton_mixes import forward as shift_forward
from rwkvx_kernels.wkv7.triton_ops import backward, forward

SIZE = 64


def inputs(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """r, log_decay, k, v, alpha, beta and the state."""
    x = torch.empty((batch, tokens, heads, SIZE), dtype=dtype, device="meta")
    state = torch.empty((batch, heads, SIZE, SIZE), device="meta")
    return [x, x.float(), x, x, x, x, state]


def run(args: list[Tensor], training: bool) -> tuple[list[str], int]:
    """Names of the launches; bytes of all tensors that each was given, read or written once."""
    moved = 0
    with counted() as counts:
        launch = JITFunction.run

        def run(kernel: Any, *given: Any, **named: Any) -> None:
            nonlocal moved
            launch(kernel, *given, **named)
            moved += sum(x.nbytes for x in given if isinstance(x, Tensor))

        with patch.object(JITFunction, "run", run), patch.object(InterpretedFunction, "run", run):
            *tensors, state = args
            _, final, *kept = forward(tensors, state, None, training)
            if training:
                backward(tensors, kept, None, tensors[3], final)
    return counts.kernels, moved


@pytest.mark.parametrize(("batch", "tokens"), [(1, 65_536), (1, 16_384), (8, 4096)])
def test_launches(batch: int, tokens: int) -> None:
    args = inputs(batch, tokens, 16, torch.bfloat16)
    assert len(run(args, False)[0]) <= 3
    assert len(run(args, True)[0]) <= 7


def test_a_full_device_reads_once() -> None:
    names, _ = run(inputs(16, 2048, 16, torch.bfloat16), False)
    assert names == ["_segment_kernel"]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 65_536), (8, 4096)])
def test_bytes_of_a_forward_pass(batch: int, tokens: int) -> None:
    """Inputs read once and outputs written once are the floor; here at most twice that."""
    args = inputs(batch, tokens, 16, torch.bfloat16)
    floor = sum(x.nbytes for x in args) + args[3].nbytes + args[-1].nbytes
    _, moved = run(args, False)
    assert floor <= moved <= 2 * floor


def test_bytes_of_forward_and_backward() -> None:
    """The floor: forward, and backward the inputs again, dY, and a gradient of every input.

    2.19 times that: the carry goes through the tokens twice, the gradients once more.
    """
    args = inputs(1, 65_536, 16, torch.bfloat16)
    once = sum(x.nbytes for x in args)
    floor = once + args[3].nbytes + args[3].nbytes + 2 * once
    _, moved = run(args, True)
    assert floor <= moved <= 2.2 * floor


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(packed: bool) -> None:
    """Of a time mix with its token shift, forward and backward: no value goes to the host."""
    x = torch.empty((1, 4096, 4 * SIZE), dtype=torch.bfloat16, device="meta")
    vector, state = x[0, 0], torch.empty((3 if packed else 1, 4, SIZE, SIZE), device="meta")
    offsets = torch.empty(4, dtype=torch.int64, device="meta") if packed else None
    heads = x.unflatten(2, (4, SIZE))
    with counted() as counts:
        previous, mixes = state.new_empty(len(state), 4 * SIZE, dtype=x.dtype), [vector] * 6
        shifted = shift_forward(x, previous, mixes, offsets, x.dtype)
        shift_backward(x, previous, mixes, offsets, shifted)
        tensors = [heads, heads.float(), *[heads] * 4]
        _, final, *kept = forward(tensors, state, offsets, True)
        backward(tensors, kept, offsets, heads, final)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")
    assert counts.kernels
    assert not [name for name in counts.kernels if any(word in name for word in waits)]
