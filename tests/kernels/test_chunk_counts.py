"""Launches and memory of chunk attention on a GPU, counted without one."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from counting import Counts, counted

from rwkvx_kernels.chunk_attention.triton_ops import attend_sequences, gradients_of_sequences
from rwkvx_kernels.chunk_select.triton_ops import select_sequences

FORWARD, BOTH = 8, 16  # launches at most, at 8K and below


def inputs(tokens: int, groups: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    heads = (16, groups, groups, 16)
    return [torch.empty((1, tokens, n, 64), dtype=dtype, device="meta") for n in heads]


def call(args: list[Tensor], chunk: int = 128, topk: int = 8) -> tuple[Counts, int, list[Tensor]]:
    """Selection, attention and gradients: counts, launches of the forward pass, what came out."""
    q, k, v, do = args
    with counted() as counts:
        chosen = select_sequences(q, k, False, chunk, topk)
        o, lse = attend_sequences(q, k, v, chosen, chunk)
        forward = len(counts.kernels)
        made = [o, *gradients_of_sequences(do, o, lse, q, k, v, chosen, chunk)]
    return counts, forward, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "chunk", "topk"), [(8192, 128, 8), (4096, 64, 9), (1, 16, 3)])
@pytest.mark.parametrize("groups", [16, 2])
def test_few_launches(tokens: int, chunk: int, topk: int, groups: int, dtype: torch.dtype) -> None:
    counts, forward, _ = call(inputs(tokens, groups, dtype), chunk, topk)
    assert forward <= FORWARD, counts.kernels
    assert len(counts.kernels) <= BOTH, counts.kernels


def test_launches_do_not_grow_with_the_batch() -> None:
    one, many = (
        call([x.expand(n, -1, -1, -1).contiguous() for x in inputs(2048)])[0] for n in (1, 4)
    )
    assert len(one.kernels) == len(many.kernels)


@pytest.mark.parametrize("groups", [16, 4])
def test_memory_of_a_long_sequence(groups: int) -> None:
    """Half a million tokens: beside inputs and outputs, at most their size."""
    args = inputs(512 * 1024, groups)
    counts, _, made = call(args)
    outputs = sum(x.nbytes for x in made)
    extra = counts.peak - outputs
    assert 0 < extra <= sum(x.nbytes for x in args) + outputs


def test_memory_of_the_longest_sequence() -> None:
    """Four million tokens in small chunks: as many pairs as no list can hold, in parts."""
    args = inputs(4 << 20)
    counts, _, made = call(args, 16, 65)
    outputs = sum(x.nbytes for x in made)
    assert counts.peak - outputs <= sum(x.nbytes for x in args) + outputs
    assert counts.kernels.count("_pairs_kernel") > 16
