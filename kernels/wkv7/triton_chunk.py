# mypy: allow-untyped-defs, allow-incomplete-defs
"""What all Triton kernels of WKV7 share: segments, a chunk's tokens, its scores and their inverse.

Axes: S segments, C tokens of a chunk, H heads, K key channels, V value channels. Names: i_ index,
p_ pointer, b_ tile in registers, o_ offset, m_ mask. Symbols as in README.md: g, centre, hats, A,
(I - A)^-1. Products as in `tools/triton_products.py`: STATE where errors stay, LOCAL elsewhere.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_device import device_kind
from rwkvx_kernels.tools.triton_options import Options, options_for
from rwkvx_kernels.tools.triton_products import precisions, product
from rwkvx_kernels.tools.triton_tiles import load
from rwkvx_kernels.wkv7.options import TABLE

# Programs that a multiprocessor runs at once.
PROGRAMS = 2
# Fewer segments than this are not worth reading a sequence twice; shorter ones not a program.
LEAST_SEGMENTS, LEAST_CHUNKS = 3, 4


class Plan(NamedTuple):
    """How sequences are cut into segments of whole chunks, as far as shapes tell.

    Attributes:
        segments: programs to launch; with packed sequences an upper bound that needs no look at
            the offsets. sequences: how many. tokens: of each sequence when not packed.
        per_sequence: segments of each sequence when not packed. length: tokens of a segment.
        chunk: tokens between states that are kept for the backward pass, which has as many at once.
        chunks: of all sequences (packed: at most).
    """

    segments: int
    sequences: int
    tokens: int
    per_sequence: int
    length: int
    chunk: int
    chunks: int
    packed: bool

    @property
    def split(self) -> bool:
        """Whether a sequence may have several segments, so that their starts must follow."""
        return self.packed or self.per_sequence > 1


class Layout(NamedTuple):
    """A plan and where its segments are.

    Attributes:
        table: [segments, 3] int64: first token, number of tokens (0: no segment), first chunk; or
            None. bounds: [sequences + 1] int64: first segment of each sequence, or None.
    """

    plan: Plan
    table: Tensor | None
    bounds: Tensor | None

    @property
    def arguments(self) -> tuple[int, int]:
        """Of every kernel that calls `locate`."""
        return self.plan.tokens, self.plan.per_sequence


def make_plan(r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """As many segments as fill the device."""
    batch, tokens, heads = r.shape[:3]
    chunk = stage("gradients", r, v).rows
    chunks = ceil_div(tokens, chunk)
    units = device_kind(r.device).processors * PROGRAMS // max(1, batch * heads)
    units = units if units >= LEAST_SEGMENTS else 1
    length = max(1, min(chunks, max(LEAST_CHUNKS, ceil_div(chunks, units))))
    per_sequence = max(1, ceil_div(chunks, length))
    if cu_seqlens is None:
        segments, sequences = batch * per_sequence, batch
        chunks *= batch
    else:
        sequences = len(cu_seqlens) - 1
        segments, chunks = per_sequence + sequences, chunks + sequences
    packed = cu_seqlens is not None
    return Plan(segments, sequences, tokens, per_sequence, length * chunk, chunk, chunks, packed)


def lay_out(plan: Plan, cu_seqlens: Tensor | None) -> Layout:
    """Where the segments are, without a transfer from the device."""
    if cu_seqlens is None:
        return Layout(plan, None, None)
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    counts = torch.stack([_ceil(lengths, plan.length), _ceil(lengths, plan.chunk)])
    bounds = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    index = torch.arange(plan.segments, device=offsets.device)
    owner = torch.searchsorted(bounds[0, 1:].contiguous(), index, right=True)
    owner = owner.clamp(max=max(plan.sequences - 1, 0))
    within = index - bounds[0][owner]
    first = offsets[owner] + within * plan.length
    count = (offsets[owner + 1] - first).clamp(min=0, max=plan.length)
    chunk = bounds[1][owner] + within * (plan.length // plan.chunk)
    return Layout(plan, torch.stack([first, count, chunk], dim=1), bounds[0].contiguous())


def _ceil(x: Tensor, size: int) -> Tensor:
    return (x + size - 1) // size


def stage(name: str, r: Tensor, v: Tensor) -> Options:
    """Launch options; raises UnsupportedError for what no table has."""
    return options_for(TABLE, name, r.dtype, max(r.shape[3], v.shape[3]), r.device)


def constants(options: Options, layout: Layout, r: Tensor, v: Tensor) -> dict[str, int | str]:
    """Of every kernel that reads tokens, with its launch options."""
    state, local = precisions(r.dtype, r.device)
    heads, key, value = *r.shape[2:], v.shape[3]
    return {
        "H": heads, "K": key, "V": value, "BLOCK_K": block(key), "CHUNK": options.rows,
        "KEPT": layout.plan.chunk, "LENGTH": layout.plan.length, "STATE": state, "LOCAL": local,
        **options.launch,
    }  # fmt: skip


def block(width: int) -> int:
    """Channels of a tile: what products need at least, and a power of two."""
    return max(16, next_power_of_2(width))


@triton.jit
def locate(i_s, p_table, tokens, per_sequence, LENGTH: tl.constexpr, KEPT: tl.constexpr):
    """First token of a segment in all of [B·T] (int64), tokens, and its first kept state."""
    if p_table is None:
        i_n, i_within = (i_s // per_sequence).to(tl.int64), i_s % per_sequence
        first = i_n * tokens + i_within * LENGTH
        count = tl.minimum(tokens - i_within * LENGTH, LENGTH)
        chunk = i_n * tl.cdiv(tokens, KEPT) + i_within * (LENGTH // KEPT)
    else:
        p_row = p_table + 3 * i_s.to(tl.int64)
        first, chunk = tl.load(p_row), tl.load(p_row + 2)
        count = tl.load(p_row + 1).to(tl.int32)
    return first, count, chunk


@triton.jit
def load_decay(p_log_decay, o_key, m_key):
    """exp(-40) leaves nothing of a state beside a new value; less is too much for the centre."""
    b_log_decay = load(p_log_decay, o_key, m_key)
    return tl.maximum(b_log_decay, -40.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def decays(p_log_decay, o_key, m_key, CHUNK: tl.constexpr):
    """log_decay and g - m [C, K], m and g_C - m [K] of some key channels."""
    b_log_decay = load_decay(p_log_decay, o_key, m_key)
    b_g = tl.cumsum(b_log_decay, axis=0)
    i_row = tl.arange(0, CHUNK)[:, None]
    b_middle = tl.sum(tl.where(i_row == (CHUNK - 1) // 2, b_g, 0.0), axis=0)
    b_rest = tl.sum(tl.where(i_row == CHUNK - 1, b_g, 0.0), axis=0) - b_middle
    return b_log_decay, b_g - b_middle[None, :], b_middle, b_rest


@triton.jit
def later(b_scores, CHUNK: tl.constexpr):
    """Of a transposed A [key, query], keep queries after the key: what alpha sees."""
    return tl.where(tl.arange(0, CHUNK)[:, None] < tl.arange(0, CHUNK)[None, :], b_scores, 0.0)


@triton.jit
def since(b_scores, CHUNK: tl.constexpr):
    """Of a transposed A, keep queries from the key on: what r sees."""
    return tl.where(tl.arange(0, CHUNK)[:, None] <= tl.arange(0, CHUNK)[None, :], b_scores, 0.0)


@triton.jit
def _merge(b_inverse, b_a, SIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """[[X, R], [0, Y]]^-1 has X^-1 R Y^-1 above the diagonal (with I - A: the sign is R's)."""
    i_row, i_column = tl.arange(0, CHUNK)[:, None] // SIZE, tl.arange(0, CHUNK)[None, :] // SIZE
    m_above = (i_column == i_row + 1) & (i_column % 2 == 1)
    b_above = product(tl.where(m_above, b_a, 0.0), b_inverse, PRECISION)
    return b_inverse + product(b_inverse, b_above, PRECISION)


@triton.jit
def inverse(b_a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 [C, C] of a strictly upper A, merged from the inverses of its diagonal blocks.

    A product of powers, (I + A)(I + A²)..., would be shorter and explodes where a key repeats.
    """
    i_row, i_column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    # Blocks of two tokens: [[1, a], [0, 1]].
    b_pair = tl.where((i_column == i_row + 1) & (i_column % 2 == 1), b_a, 0.0)
    b_inverse = b_pair + tl.where(i_row == i_column, 1.0, 0.0)
    for level in tl.static_range(1, 6):
        if (1 << level) < CHUNK:
            b_inverse = _merge(b_inverse, b_a, 1 << level, CHUNK, PRECISION)
    return b_inverse
