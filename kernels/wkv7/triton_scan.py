# mypy: allow-untyped-defs, allow-incomplete-defs
"""The state from chunk to chunk: the only part of WKV7 that is sequential.

Forward   S' = S (diag(decay) + P) + D      and  y = Y0 + R S^T
Backward  dS = dS' (diag(decay) + P^T) + E  with E = dY^T R

A program has one head of one sequence and a tile of value channels. Axes and names as in
`triton_chunk.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.triton_device import device_kind
from rwkvx_kernels.tools.triton_tiles import dot, load, precision, store
from rwkvx_kernels.wkv7.triton_chunk import Layout, locate
from rwkvx_kernels.wkv7.triton_prepare import Prepared

TILE_V = 16


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def _scan_kernel(
    p_decay, p_p, p_d, p_r, p_y, p_start, p_end, p_table, p_bounds,
    tokens, per_sequence,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, TILE_V: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + TILE_V - 1) // TILE_V
    i_nh = tl.program_id(0) // TILES
    i_n, i_h = i_nh // H, i_nh % H
    o_k = tl.arange(0, BLOCK_K)
    o_v = (tl.program_id(0) % TILES) * TILE_V + tl.arange(0, TILE_V)
    m_k, m_v = o_k < K, o_v < V
    # Transposed, so that its many rows are spread over warps.
    o_tile, m_tile = o_v[None, :] * K + o_k[:, None], m_v[None, :] & m_k[:, None]
    if p_bounds is None:
        begin, chunks = i_n * per_sequence, per_sequence
    else:
        begin = tl.load(p_bounds + i_n).to(tl.int32)
        chunks = tl.load(p_bounds + i_n + 1).to(tl.int32) - begin
    o_state = i_nh.to(tl.int64) * (V * K) + o_tile
    b_state = tl.load(p_start + o_state, mask=m_tile, other=0.0)
    # Of P (backward) or P^T the first columns; more than 64 of them do not fit into AMD's memory.
    PART: tl.constexpr = min(BLOCK_K, 64)
    TO_ROW: tl.constexpr = K if REVERSE else 1
    TO_COLUMN: tl.constexpr = 1 if REVERSE else K
    o_j = tl.arange(0, PART)[None, :]
    o_square = o_k[:, None] * TO_ROW + o_j * TO_COLUMN
    # Exact products fill the registers: nothing else, such as addresses, is kept in them.
    for step in tl.range(chunks, disable_licm=PRECISION == "tf32x3"):
        i_m = begin + (chunks - 1 - step if REVERSE else step)
        i_mh = i_m.to(tl.int64) * H + i_h
        b_decay = tl.load(p_decay + i_mh * K + o_k, mask=m_k, other=0.0)[:, None]
        p_square, p_tile = p_p + i_mh * (K * K), p_d + i_mh * (V * K)
        b_p = load(p_square, o_square, m_k[:, None] & (o_j < K))
        b_d = load(p_tile, o_tile, m_tile)
        if KEEP:  # in the place of what was just read
            tl.store(p_tile + o_tile, b_state, mask=m_tile)
        # The decay apart from the dot: a state rounded to 11 bits in every chunk would forget.
        b_d += b_state * b_decay
        if BLOCK_K > PART:  # one half after the other: both as operands do not fit into registers
            b_parts = tl.reshape(b_state, (2, PART, TILE_V))
            b_part, b_second = tl.split(tl.permute(b_parts, (1, 2, 0)))
        else:
            b_part = b_state
        b_d += dot(b_p, b_part, PRECISION)
        if p_y is not None:
            first, count = locate(i_m, p_table, tokens, per_sequence, CHUNK)
            i_row = tl.arange(0, CHUNK)[:, None]
            o_y, m_y = i_row * (H * V) + o_v[None, :], (i_row < count) & m_v[None, :]
            o_r, m_r = i_row * (H * K) + o_j, (i_row < count) & (o_j < K)
            p_rows, p_out = p_r + (first * H + i_h) * K, p_y + (first * H + i_h) * V
            b_y = load(p_out, o_y, m_y) + dot(load(p_rows, o_r, m_r), b_part, PRECISION)
        if BLOCK_K > PART:
            m_second = m_k[:, None] & (o_j < K - PART)
            b_d += dot(load(p_square, o_square + PART * TO_COLUMN, m_second), b_second, PRECISION)
            if p_y is not None:
                b_r = load(p_rows, o_r + PART, m_r & (o_j < K - PART))
                b_y += dot(b_r, b_second, PRECISION)
        if p_y is not None:
            store(p_out, o_y, b_y, m_y)
        b_state = b_d
    tl.store(p_end + o_state, b_state, mask=m_tile)


def scan(
    prepared: Prepared, start: Tensor, layout: Layout, chunk: int, like: Tensor, keep: bool
) -> Tensor:
    """Launch over all sequences: the states [B, H, V, K] at the other end.

    Writes y where `prepared` has one; without y the direction is backward. With `keep` the states
    (before each chunk, backward: after it) replace `prepared.d`. `like` has the dtype of inputs.
    """
    end = start.new_empty(start.shape)
    sequences, heads, value, key = start.shape
    kind = device_kind(like.device)
    # P, D, R and S of a step in flight. AMD's loads go through registers: one is enough.
    block = max(16, triton.next_power_of_2(key))
    stages = max(1, min(3, kind.shared_bytes // (4 * block * (block + 2 * TILE_V + chunk))))
    stages = 1 if kind.backend == "hip" else stages
    programs = sequences * heads * triton.cdiv(value, TILE_V)
    if programs:
        _scan_kernel[(programs,)](
            prepared.decay, prepared.p, prepared.d, prepared.r, prepared.y, start, end,
            layout.table, layout.bounds, layout.tokens, layout.per_sequence,
            H=heads, K=key, V=value, BLOCK_K=block, TILE_V=TILE_V, CHUNK=chunk,
            REVERSE=prepared.y is None, KEEP=keep, PRECISION=precision(like.dtype, like.device),
            num_warps=min(8, block // 16), num_stages=stages,
        )  # fmt: skip
    return end
