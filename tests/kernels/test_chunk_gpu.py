"""Chunk attention in Triton at real sizes: `pytest -m gpu`.

Axes: B batch, T time, H query heads, G key/value heads, D head size, C chunks.
"""

import pytest
import torch
from measure import relative_error
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from choices import attention_given, reference_sets, sets_of, wide_forest

from rwkvx_kernels.chunk_attention import KeyValueCache, cached_chunk_attention, triton_ops
from rwkvx_kernels.chunk_select.trees import Trees
from rwkvx_kernels.chunk_select.triton_descent import descend
from rwkvx_kernels.chunk_select.triton_ops import select_whole

pytestmark = pytest.mark.gpu
SELECTIONS = ["flat", "coarse_to_fine"]
# Weights and their gradients are rounded to bfloat16, which has 8 bits, once each.
ROUNDING = 1e-2


def inputs(tokens: int, heads: int, groups: int, dim: int = 64) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, tokens, n, dim, device="cuda", dtype=torch.bfloat16, generator=draw)
        for n in (heads, groups, groups)
    ]


def choose(args: list[Tensor], chunk: int, topk: int, selection: str) -> tuple[Tensor, ...]:
    coarse = selection == "coarse_to_fine"
    chosen = select_whole(args[0].detach(), args[1].detach(), None, coarse, chunk, topk)
    return triton_ops.attend_triton(*args, chosen, None, chunk)[0], chosen


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("tokens", "chunk"), [(70_000, 16), (300_001, 128)])
def test_past_65536_tokens(tokens: int, chunk: int, selection: str) -> None:
    """Outputs, and the gradients of some outputs, against float64 given the same choice."""
    args = [x.requires_grad_() for x in inputs(tokens, 4, 2)]
    o, chosen = choose(args, chunk, 8, selection)
    positions = [5, 65_535, 65_536, 65_537, tokens - 1]
    weights = torch.randn(len(positions), 4, 64, device="cuda").bfloat16()
    got = [o[0, positions], *torch.autograd.grad((o[0, positions] * weights).sum(), args)]
    exact = attention_given(*args, chosen, positions, chunk)
    expected = [exact, *torch.autograd.grad((exact * weights.double()).sum(), args)]
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < ROUNDING
    assert bool((chosen[0, -1] >= 0).all())
    again, same = choose(args, chunk, 8, selection)
    assert torch.equal(o, again)
    assert torch.equal(chosen, same)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_past_two_to_the_31_elements(selection: str) -> None:
    tokens, heads, dim = (1 << 21) + 4096, 16, 64
    args = inputs(tokens, heads, heads, dim)
    assert args[0].numel() > 2**31
    o, chosen = choose(args, 128, 8, selection)
    positions = [1 << 20, 1 << 21, tokens - 1]
    exact = attention_given(*args, chosen, positions, 128)
    assert relative_error(o[0, positions], exact) < ROUNDING
    q, k, v = args
    cache = KeyValueCache(1, heads, dim, 128, k, tokens).append(0, k, v)
    step = cached_chunk_attention(q[:, -1:], cache, tokens, 8, "triton", selection)
    assert relative_error(step, o[:, -1:]) < ROUNDING


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_past_two_to_the_31_elements(selection: str) -> None:
    """Those of the last query, whose keys lie on both sides of element 2^31."""
    tokens, heads, dim = (1 << 20) + 1000, 16, 128
    args = [x.requires_grad_() for x in inputs(tokens, heads, heads, dim)]
    assert args[0].numel() > 2**31
    o, chosen = choose(args, 2048, 3, selection)
    got = torch.autograd.grad(o[0, -1].sum(), args)
    exact = attention_given(*args, chosen, [tokens - 1], 2048)
    expected = torch.autograd.grad(exact.sum(), args)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < ROUNDING


@pytest.mark.parametrize("chunks", [5_000, 40_000])
def test_choice_of_a_descent(chunks: int) -> None:
    """One level, and two; near ties may fall either way in float32."""
    q, k, _ = (x.float() for x in inputs(chunks, 4, 2))
    means, part = k.transpose(1, 2).contiguous(), q[:, -100:].contiguous()
    chosen = descend(part, means, wide_forest(means, chunks), chunks - 100, 1, 8)
    expected = reference_sets(part, k, 1, 8, True, chunks - 100)
    got = sets_of(chosen, chunks)
    assert int((got & expected).sum()) >= 0.999 * int(expected.sum())


def test_decoding_sequences_of_unequal_length() -> None:
    """A few new tokens to a million, each as if it were alone."""
    lengths, chunk = [1_000_003, 524_287, 70_000, 12_000, 9], 16
    one = inputs(max(lengths), 2, 1)
    q, k, v = (x.expand(len(lengths), -1, -1, -1) for x in one)
    cache = KeyValueCache(len(lengths), 1, 64, chunk, k, max(lengths)).append(0, k, v)
    trees = cache.trees.forest(max(lengths) // chunk)
    part = torch.cat([q[:1, n - 2 : n] for n in lengths])
    cached = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
    device_lengths = torch.tensor(lengths, device="cuda")
    got = triton_ops.decode_triton(part, *cached, trees, device_lengths, chunk, 8)
    means = cache.means_BGCD[:1].contiguous()
    alone = Trees(means.flatten(0, 1)).forest(means.shape[2])
    for i, n in enumerate(lengths):
        chosen = descend(part[i : i + 1], means, alone, n - 2, chunk, 8)
        rows = torch.full((1, n, 2, 7), -1, dtype=torch.int32, device="cuda")
        rows[:, -2:] = chosen
        exact = attention_given(one[0][:, :n], *one[1:], rows, [n - 2, n - 1], chunk)
        assert relative_error(got[i], exact) < ROUNDING
