"""Launches and memory of chunk attention on a GPU, counted without one."""

from itertools import repeat

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from counting import Counts, counted

from rwkvx_kernels.chunk_attention.triton_ops import attend_sequences, gradients_of_sequences
from rwkvx_kernels.chunk_select.common import (
    DENSE_NODES,
    RUN,
    beam_widths,
    first_level,
    scored_behind,
    scored_whole,
)
from rwkvx_kernels.chunk_select.reference import visited_chunks
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


@pytest.mark.parametrize(("batch", "heads", "groups"), [(70_000, 1, 1), (2, 70_000, 70_000)])
def test_more_heads_than_programs_along_an_axis(batch: int, heads: int, groups: int) -> None:
    q, do = (torch.empty((batch, 40, heads, 16), device="meta") for _ in range(2))
    k, v = (torch.empty((batch, 40, groups, 16), device="meta") for _ in range(2))
    counts, _, _ = call([q, k, v, do], 16, 2)
    assert all(0 < x < 1 << 31 for grid in counts.grids for x in grid[:1])
    assert all(0 < x < 1 << 16 for grid in counts.grids for x in grid[1:])


def test_a_long_context_scores_about_as_many_nodes() -> None:
    """Coarse to fine: behind a million tokens in chunks of 16 a query scores what one behind 64K
    does and the children of one more level; whatever the length, no more than three levels."""
    near, far = scored_behind((1 << 16) // 16, 8), scored_behind((1 << 20) // 16, 8)
    below, above = (32 * x for x in beam_widths(8))
    assert near < far <= near + above
    assert max(map(scored_behind, range(1 << 17), repeat(8))) <= DENSE_NODES + above + below + RUN
    # In chunks of 128, where 64K are 512 chunks, all of which are scored.
    assert scored_behind((1 << 20) // 128, 8) < 0.25 * (1 << 20) / 128


@pytest.mark.parametrize("chunks", [300, 1536, 1800, 4100, 33_000])
def test_what_is_counted_is_what_is_visited(chunks: int) -> None:
    """A query of the reference visits the counted members of the lowest level."""
    means = torch.randn(1, chunks, 2, generator=torch.Generator().manual_seed(chunks))
    visited = visited_chunks(means[:, :1], means, torch.tensor([chunks]), 8)
    tree = chunks // RUN * RUN if chunks // RUN * RUN > scored_whole(8) else 0
    above = 0
    if tree:
        top = first_level(tree)
        above = tree // 32**top
        for level in range(top, 1, -1):
            above += 32 * beam_widths(8)[1] + tree // 32 ** (level - 1) % 32
    assert scored_behind(chunks, 8) == int(visited.sum()) + above
