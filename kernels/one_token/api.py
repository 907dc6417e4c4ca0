"""One token through a run of blocks in one call.

Axes: C width, H heads, D head size, L blocks.
"""

import torch
from torch import Tensor

from rwkvx_kernels.one_token.common import DTYPES, BlockWeights, Cache


def fits(x: Tensor, width: int) -> bool:
    """Whether `x` [..., C] is one token on the CPU, without gradients, of a compiled dtype."""
    if torch.is_grad_enabled() or x.numel() != width or x.dtype not in DTYPES:
        return False
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class OneToken:
    """The blocks of a model, to be read by one token at a time.

    x + mixer(ln1(x)), then x + channel_mix(ln2(x)) (arXiv 2503.14456, eq. 4-22), in float32.
    Weights are used where they are: when one has moved, make this anew.
    """

    def __init__(self, blocks: list[BlockWeights]) -> None:
        """blocks: all of them, those too that are never read here."""
        from rwkvx_kernels.one_token.numba_blocks import Table  # half a second

        self._table = Table(blocks)

    def read(
        self,
        blocks: range,
        x: Tensor,
        v_first: Tensor,
        shifts: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        caches: list[Cache | None],
        new_shifts: Tensor,
        new_states: list[Tensor | None],
    ) -> None:
        """Through consecutive blocks, in place; lists have an entry for each of them.

        Args:
            x: [C] float32, changed. v_first: [C] float32, written by a time mix without v0.
            shifts: the last inputs of the two mixers, each of C elements of the weights' dtype.
            states: [1, H, D, D] float32, contiguous, of a time mix; None of an attention.
            caches: of an attention.
            new_shifts: [L, 2, C] float32, written. new_states: as `states`, written.
        """
        self._table.read(blocks, x, v_first, shifts, states, caches, new_shifts, new_states)
