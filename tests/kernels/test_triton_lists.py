"""Inverted lists of a choice, and how their segments are shared out, against sorting.

Axes: B batch, T queries, H query heads, G key/value heads.
"""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

import triton
import triton.language as tl

from rwkvx_kernels.tools import triton_lists
from rwkvx_kernels.tools.triton_lists import lists_of, segment_of, segments_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _mark_kernel(
    p_chosen, p_order, p_offsets, p_list, p_count, group, tokens, pairs, lists, segment,
    H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1)
    i_list, begin, end = segment_of(
        tl.program_id(0), p_order + i_n * pairs, p_offsets + i_n * (lists + 1), p_chosen,
        group + i_n, tokens, pairs, lists, segment, H, G, SLOTS,
    )  # fmt: skip
    for i in range(begin, end):
        tl.store(p_list + i_n * pairs + i, i_list)
        tl.store(p_count + i_n * pairs + i, tl.load(p_count + i_n * pairs + i) + 1)


@pytest.mark.parametrize("segment", [3, 40])
@pytest.mark.parametrize("favourite", [None, 0, 3])
def test_lists_and_segments(
    segment: int, favourite: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs in order within each list; every place of a list in one program's hands."""
    monkeypatch.setattr(triton_lists, "LEAST_SECTION", 32)
    torch.manual_seed(segment)
    chosen = torch.randint(-1, 7, (2, 19, 4, 2), device=DEVICE, dtype=torch.int32)
    if favourite is not None:  # a list far longer than the others
        chosen[torch.rand(chosen.shape, device=DEVICE) < 0.8] = favourite
    groups, lists, part = 2, 6, range(1, 4)
    got = lists_of(chosen, groups, lists, part)
    assert got is not None
    by_group = chosen.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)[1:4]
    of_pair = torch.where((by_group >= 0) & (by_group < lists - 1), by_group, lists - 1)
    assert torch.equal(got.order.long(), of_pair.argsort(dim=1, stable=True))
    counts = torch.stack([x.bincount(minlength=lists) for x in of_pair.long()])
    assert torch.equal(got.offsets[:, 1:].long(), counts.cumsum(1))
    in_order = of_pair.gather(1, got.order.long())
    owner, times = torch.full_like(in_order, lists - 1), torch.zeros_like(in_order)
    pairs = in_order.shape[1]
    _mark_kernel[(segments_of(got, segment), 3)](
        chosen, *got, owner, times, 1, 19, pairs, lists, segment, H=4, G=groups, SLOTS=2
    )
    assert torch.equal(owner, in_order)
    assert torch.equal(times, (in_order < lists - 1).to(times.dtype))


def test_nothing_to_choose() -> None:
    chosen = torch.empty((1, 5, 2, 3), dtype=torch.int32, device=DEVICE)
    assert lists_of(chosen[..., :0], 1, 4, range(1)) is None
    assert lists_of(chosen, 1, 1, range(1)) is None
