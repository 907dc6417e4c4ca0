"""Launches of one decoded token on a GPU, and the bytes that they read, counted without one."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from cases_one_token import attended, attention, empty, memory, weights
from counting import counted
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from rwkvx_kernels.one_token import BlockWeights, Memory, embed, logits, read_block
from rwkvx_kernels.token_shift import Norm

WIDTH, SIZE = 768, 64


def run(own: BlockWeights, held: Memory, rows: int) -> tuple[list[str], int]:
    """Names of the launches; bytes of the weights that each was given, once for each launch."""
    known = {id(x) for x in own.tensors() if x is not None}
    moved = 0
    with counted() as counts:
        launch = JITFunction.run

        def run(kernel: Any, *given: Any, **named: Any) -> None:
            nonlocal moved
            launch(kernel, *given, **named)
            seen = {id(x): x for x in given if isinstance(x, Tensor) and id(x) in known}
            moved += sum(x.nbytes for x in seen.values())

        with patch.object(JITFunction, "run", run), patch.object(InterpretedFunction, "run", run):
            x = empty(rows, WIDTH)
            read_block(x, x, own, held)
    return counts.kernels, moved


def reading(own: BlockWeights) -> int:
    """Bytes of all weights, once: the floor."""
    return sum(x.nbytes for x in own.tensors() if x is not None)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("int8", [True, False])
def test_a_time_mix_is_five_launches(rows: int, first: bool, int8: bool) -> None:
    own = weights(torch.bfloat16, WIDTH, SIZE, first, int8)
    names, moved = run(own, memory(torch.bfloat16, rows, WIDTH, SIZE), rows)
    assert names == ["_read_kernel", "_heads_kernel", "_add_kernel", "_read_kernel", "_add_kernel"]
    assert moved == reading(own)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("conv", [0, 1, 4])
@pytest.mark.parametrize(
    ("chunk", "topk", "chunks"), [(2048, 3, 512), (128, 9, 64), (128, 17, 8192), (16, 1, 9)]
)
def test_an_attention_is_seven_launches(
    rows: int, conv: int, chunk: int, topk: int, chunks: int
) -> None:
    """Whatever the length of the text: a million tokens in chunks of 128 are 8,192 chunks."""
    own = attention(weights(torch.bfloat16, WIDTH, SIZE), 2 * SIZE, conv)
    held = attended(torch.bfloat16, rows, own, chunk, topk, chunks)
    names, moved = run(own, held, rows)
    assert names == [
        *("_read_kernel", "_place_kernel", "_part_kernel", "_join_kernel", "_add_kernel"),
        *("_read_kernel", "_add_kernel"),
    ]
    assert moved == reading(own)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("chunks", "levels"), [(2048, 1), (32768, 1), (2**16, 2), (2**21, 3)])
def test_coarse_to_fine_is_a_launch_more_for_each_level(
    rows: int, chunks: int, levels: int
) -> None:
    """Four million tokens in chunks of 128 have one level of nodes to descend from."""
    own = attention(weights(torch.bfloat16, WIDTH, SIZE), 2 * SIZE, 4)
    names, moved = run(own, attended(torch.bfloat16, rows, own, 128, 8, chunks, True), rows)
    assert names == [
        *("_read_kernel", "_place_kernel", *["_score_kernel"] * levels, "_part_kernel"),
        *("_join_kernel", "_add_kernel", "_read_kernel", "_add_kernel"),
    ]
    assert moved == reading(own)


@pytest.mark.parametrize(("coarse", "launches"), [(False, 9), (True, 10)])
def test_a_long_list_of_chunks_is_joined_apart(coarse: bool, launches: int) -> None:
    own = attention(weights(torch.bfloat16, WIDTH, SIZE), WIDTH, 0)
    names, _ = run(own, attended(torch.bfloat16, 1, own, 16, 100, 20000, coarse), 1)
    assert names.count("_merge_kernel") == 1
    assert len(names) == launches


def test_one_launch_before_the_blocks_and_one_after() -> None:
    own = weights(torch.bfloat16, WIDTH, SIZE)
    norm = Norm(*own.ln1, 1e-5)
    with counted() as counts:
        x = embed(empty(1, dtype=torch.int64), empty(100, WIDTH, dtype=torch.bfloat16), norm)
        logits(x, norm, empty(100, WIDTH, dtype=torch.bfloat16), None, torch.bfloat16)
    assert counts.kernels == ["_embed_kernel", "_read_kernel"]
