# mypy: allow-untyped-defs, allow-incomplete-defs
"""Inverted lists: of a choice of chunks (or nodes) by each query, which queries chose a chunk.

A counting sort, the same every time: sections of the pairs are counted in order by one warp each,
the counts added up, every pair put in its place. All sizes are known without looking at the choice,
so that nothing waits for the device and graphs can hold it.

Axes: B batch, T queries, H query heads, G key/value heads, N groups (batch x key/value heads) of a
call, R query heads of a group, P pairs of a group, L lists of a group, W sections. Names: i_ index,
p_ pointer, b_ tile in registers, o_ offset, m_ mask.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.sizes import ceil_div

# Pairs that a warp compares with one another at a time; sections of a group are at least so long,
# and so many of all groups are wanted, that a GPU is filled.
STEP, LEAST_SECTION, SECTIONS = 32, 256, 4096
# Lists, and sections of them, that are added up at a time; pairs that are placed at a time.
LIST_BLOCK, SECTION_BLOCK, PLACED = 128, 64, 1024
# Programs along the second axis of a launch; numbers of pairs are int32.
MOST_GROUPS, MOST_PAIRS = 65535, 2**31 - 1024


class Lists(NamedTuple):
    """The pairs of (query row, slot) of each group, sorted by what they chose (compressed rows).

    The number of a pair in its group is (t · R + r) · slots + slot.

    Attributes:
        order: [N, P] int32, pairs by list, in order of their numbers within a list.
        offsets: [N, L + 1] int32: the pairs of a list are order[offsets[i] : offsets[i + 1]]. The
            last list holds those that chose nothing.
    """

    order: Tensor
    offsets: Tensor


@triton.jit
def row_of(i_group, o_pair, tokens, H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr):
    """Rows (b · T + t) · H + h of pairs of a group (b · G + g)."""
    o_t, o_r = o_pair // (H // G * SLOTS), o_pair // SLOTS % (H // G)
    return ((i_group // G).to(tl.int64) * tokens + o_t) * H + i_group % G * (H // G) + o_r


@triton.jit
def pair_at(p_x, i_group, o_pair, tokens, H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr):
    """Where pairs of a group stand in x [B, T, H, slots]."""
    return p_x + row_of(i_group, o_pair, tokens, H, G, SLOTS) * SLOTS + o_pair % SLOTS


@triton.jit
def list_of(p_chosen, m_pair, lists):
    """The list of pairs: what they chose, or the last one."""
    b_list = tl.load(p_chosen, mask=m_pair, other=None if m_pair is None else -1).to(tl.int32)
    return tl.where((b_list >= 0) & (b_list < lists - 1), b_list, lists - 1)


@triton.jit(do_not_specialize=["first", "tokens", "pairs", "lists", "sections", "section"])
def _rank_kernel(
    p_chosen, p_ranks, p_counts, first, tokens, pairs, lists, sections, section,
    H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A section of a group's pairs: how many before it in the section chose the same, and how many
    of the section are in each list."""
    i_w, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_count = p_counts + (i_n * sections + i_w) * lists
    o_in = tl.arange(0, STEP)
    for i_l in range(0, lists, STEP):
        tl.store(p_count + i_l + o_in, 0, mask=i_l + o_in < lists)
    tl.debug_barrier()
    begin = i_w * section
    for i_pair in range(begin, tl.minimum(begin + section, pairs), STEP):
        o_pair = i_pair + o_in
        m_pair = o_pair < tl.minimum(begin + section, pairs)
        p_pair = pair_at(p_chosen, first + i_n, o_pair, tokens, H, G, SLOTS)
        b_list = tl.where(m_pair, list_of(p_pair, m_pair, lists), -1)
        b_same = (b_list[:, None] == b_list[None, :]).to(tl.int32)
        b_before = tl.sum(tl.where(o_in[None, :] < o_in[:, None], b_same, 0), axis=1)
        b_base = tl.load(p_count + b_list, mask=m_pair, other=0)
        tl.store(p_ranks + i_n * pairs + o_pair, b_base + b_before, mask=m_pair)
        tl.debug_barrier()
        b_count = b_base + tl.sum(b_same, axis=1)
        tl.store(p_count + b_list, b_count, mask=m_pair & (b_before == 0))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["lists", "sections"])
def _sum_kernel(
    p_counts, p_offsets, lists, sections, LIST_BLOCK: tl.constexpr, SECTION_BLOCK: tl.constexpr
):
    """A group: counts become those of the sections before, and offsets those of the lists."""
    i_n = tl.program_id(0).to(tl.int64)
    o_in, o_w = tl.arange(0, LIST_BLOCK), tl.arange(0, SECTION_BLOCK)
    p_offset = p_offsets + i_n * (lists + 1)
    before = tl.full((), 0, tl.int32)
    for i_l in range(0, lists, LIST_BLOCK):
        o_l = i_l + o_in
        b_sum = tl.zeros((LIST_BLOCK,), tl.int32)
        for i_w in range(0, sections, SECTION_BLOCK):
            m_x = (i_w + o_w < sections)[:, None] & (o_l < lists)[None, :]
            p_x = p_counts + (i_n * sections + i_w + o_w)[:, None] * lists + o_l[None, :]
            b_x = tl.load(p_x, mask=m_x, other=0)
            tl.store(p_x, b_sum[None, :] + tl.cumsum(b_x, axis=0) - b_x, mask=m_x)
            b_sum += tl.sum(b_x, axis=0)
        tl.store(p_offset + o_l, before + tl.cumsum(b_sum, axis=0) - b_sum, mask=o_l < lists)
        before += tl.sum(b_sum, axis=0)
    tl.store(p_offset + lists, before)


@triton.jit(do_not_specialize=["first", "tokens", "pairs", "lists", "sections", "section"])
def _place_kernel(
    p_chosen, p_ranks, p_counts, p_offsets, p_order,
    first, tokens, pairs, lists, sections, section,
    H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Pairs into the order of their lists."""
    i_n = tl.program_id(1).to(tl.int64)
    o_pair = tl.program_id(0) * PLACED + tl.arange(0, PLACED)
    m_pair = o_pair < pairs
    p_pair = pair_at(p_chosen, first + i_n, o_pair, tokens, H, G, SLOTS)
    b_list = list_of(p_pair, m_pair, lists)
    b_place = tl.load(p_ranks + i_n * pairs + o_pair, mask=m_pair, other=0)
    b_place += tl.load(p_offsets + i_n * (lists + 1) + b_list, mask=m_pair, other=0)
    p_count = p_counts + (i_n * sections + o_pair // section) * lists + b_list
    b_place += tl.load(p_count, mask=m_pair, other=0)
    tl.store(p_order + i_n * pairs + b_place, o_pair, mask=m_pair)


def lists_of(chosen: Tensor, groups: int, lists: int, part: range) -> Lists | None:
    """Invert chosen [B, T, H, slots], contiguous, for G groups in each row of the batch.

    Args:
        lists: of each group; numbers outside 0 ... lists - 2 choose nothing.
        part: groups of all B · G to do, `MOST_GROUPS` at most, of `MOST_PAIRS` at most each.

    Returns:
        None if nothing can be chosen.
    """
    _, tokens, heads, slots = chosen.shape
    if slots == 0 or lists < 2:
        return None
    pairs, count = tokens * (heads // groups) * slots, len(part)
    most = min(SECTIONS // count, pairs // max(LEAST_SECTION, lists))
    section = ceil_div(ceil_div(pairs, max(1, most)), STEP) * STEP
    sections = ceil_div(pairs, section)
    new: dict[str, Any] = {"dtype": torch.int32, "device": chosen.device}
    ranks, order = (torch.empty((count, pairs), **new) for _ in range(2))
    counts = torch.empty((count, sections, lists), **new)
    offsets = torch.empty((count, lists + 1), **new)
    sizes = (part.start, tokens, pairs, lists, sections, section)
    constants = {"H": heads, "G": groups, "SLOTS": slots}
    _rank_kernel[(sections, count)](
        chosen, ranks, counts, *sizes, **constants, STEP=STEP, num_warps=1
    )
    _sum_kernel[(count,)](
        counts, offsets, lists, sections,
        LIST_BLOCK=LIST_BLOCK, SECTION_BLOCK=SECTION_BLOCK, num_warps=8,
    )  # fmt: skip
    _place_kernel[(ceil_div(pairs, PLACED), count)](
        chosen, ranks, counts, offsets, order, *sizes, **constants, PLACED=PLACED, num_warps=4
    )
    return Lists(order, offsets)


def segments_of(lists: Lists, segment: int) -> int:
    """Programs for segments of at most so many pairs: see `segment_of`."""
    return lists.offsets.shape[1] - 1 + (lists.order.shape[1] - 1) // segment


@triton.jit
def later_segment(
    i_place, p_order, p_offset, p_chosen, i_group, tokens, lists, segment,
    H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The segment, not the first one of its list, that starts at a place from `i_place`, a multiple
    of `segment`, up to the next multiple: a list, and places begin ... end - 1; end <= begin where
    there is none. There is one at most: a list's segments start that far apart, and any other list
    that starts between has its first one there."""
    p_pair = pair_at(p_chosen, i_group, tl.load(p_order + i_place), tokens, H, G, SLOTS)
    i_list = list_of(p_pair, None, lists)
    start, end = tl.load(p_offset + i_list), tl.load(p_offset + i_list + 1)
    begin = start + tl.cdiv(i_place - start, segment) * segment
    end = tl.where((begin > start) & (i_list < lists - 1), end, 0)
    return i_list, begin, tl.minimum(end, begin + segment)


@triton.jit
def segment_of(
    i_program, p_order, p_offset, p_chosen, i_group, tokens, pairs, lists, segment,
    H: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What a program works on: a list, and places begin ... end - 1; none if end <= begin.

    Every list but the last is cut into segments of so many pairs. Some programs have the first one
    of a list; evenly among them stand those of the others (`later_segment`).
    """
    programs = lists + (pairs - 1) // segment
    i_list = (i_program.to(tl.int64) * lists // programs).to(tl.int32)
    if (i_program + 1).to(tl.int64) * lists // programs > i_list:
        begin = tl.load(p_offset + i_list)
        end = tl.minimum(tl.load(p_offset + i_list + 1), begin + segment)
        end = tl.where(i_list < lists - 1, end, 0)
    else:
        i_list, begin, end = later_segment(
            (i_program - i_list + 1) * segment, p_order, p_offset, p_chosen, i_group, tokens,
            lists, segment, H, G, SLOTS,
        )  # fmt: skip
    return i_list, begin, end
