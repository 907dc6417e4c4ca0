"""What a piece of a sequence does to the state, whatever the state before it is.

    S_end = S_start P + D

Pieces that follow each other compose to one, associatively: so a sequence is cut over programs of a
GPU, or over devices that exchange P and D alone.
Axes: B batch, with packed sequences: sequences; T time, H heads, K key channels, V value channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.wkv7.api import wkv7


class Summary(NamedTuple):
    """P [B, H, K, K] (from, to) and D [B, H, V, K], float32 (float64 of float64 inputs)."""

    p: Tensor
    d: Tensor


def wkv7_summary(
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Summary:
    """P and D of the recurrence of `wkv7` (arXiv 2503.14456, eq. 17), differentiable.

    Every row of a state is a recurrence of its own: those of D start from nothing, those of P are
    the rows of the identity without values, all in one call.

    Args:
        log_decay, k, v, alpha, beta, cu_seqlens, impl: as for `wkv7`.

    Returns:
        (P [B, H, K, K], D [B, H, V, K]) with ``S_end = S_start @ P + D``; with `cu_seqlens`, one
        of each sequence. No tokens give the identity and zeros.

    Raises:
        ValueError, UnsupportedError: as `wkv7`; triton has K + V channels at most as many.
    """
    batch, tokens, heads, key = k.shape
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    values = torch.cat([v.new_zeros(batch, tokens, heads, key), v], dim=-1)
    wide = torch.promote_types(k.dtype, torch.float32)
    start = torch.eye(values.shape[-1], key, dtype=wide, device=k.device)
    start = start.expand(rows, heads, -1, -1).contiguous()
    # The output is not used: any r will do.
    _, end = wkv7(
        k.detach(), log_decay, k, values, alpha, beta, start, cu_seqlens=cu_seqlens, impl=impl
    )
    return Summary(end[:, :, :key], end[:, :, key:])


def wkv7_compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Summary:
    """The summary of two pieces that follow each other, differentiable.

    Args:
        first, second: (P [..., K, K], D [..., V, K]) of the earlier and the later piece.

    Returns:
        (P1 P2, D1 P2 + D2).
    """
    (p_first, d_first), (p_second, d_second) = first, second
    return Summary(p_first @ p_second, d_first @ p_second + d_second)
