"""What a model remembers: one state per block (rwkvx/kinds), passed in and returned."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvx.kinds import BlockState


class ModelState(NamedTuple):
    """What a model remembers of B sequences; made by `Model.fresh_state` and every call of a model.

    It is never changed, only replaced: an older one stays valid, and can be kept, continued
    several times, or pickled.

    Attributes:
        blocks: one state per block, a NamedTuple of tensors whose first axis is B: the last input
            of the channel mix [B, C]; in RWKV-7 blocks also that of the time mix [B, C] and the
            matrix state [B, H, N, N] (value, key), float32 or, for float64 weights, float64; in
            blocks that attend, caches of keys and values, shared with the states before.
        length: tokens that were read: of each sequence, or of packed ones together.
    """

    blocks: tuple[Any, ...]
    length: int

    def __repr__(self) -> str:
        return f"ModelState({len(self.blocks)} blocks, {self.rows} rows, {self.length} tokens)"

    @property
    def rows(self) -> int:
        """Sequences; more where training cut them into pieces."""
        return min((len(block.ffn_shift) for block in self.blocks), default=0)

    def recurrent(self) -> "ModelState":
        """The same without gradients and attention cache: what state passing passes."""
        return ModelState(tuple(block.recurrent() for block in self.blocks), 0)


def select_state(state: ModelState, rows: Tensor | list[int]) -> ModelState:
    """Some rows of a state as a state of their own, such as the beams that are kept.

    Args:
        state: of B sequences.
        rows: [R] indices from 0 to B - 1, int64 on any device or a list; repeats are allowed.

    Returns:
        A state of R rows of the same dtypes and device; row i is row rows[i] of `state`, which
        stays valid. Gradients pass.

    Raises:
        IndexError: an index out of range (on a GPU, the device's own assertion).
    """
    if not isinstance(rows, Tensor):
        rows = torch.tensor(rows, dtype=torch.int64)
    blocks: list[BlockState] = []
    for block in state.blocks:
        blocks.append(block.select(rows.to(block.ffn_shift.device)))
    return ModelState(tuple(blocks), state.length)


def repeat_state(state: ModelState, n: int) -> ModelState:
    """Every row of a state several times: several continuations of one prompt.

    Args:
        state: of B sequences.
        n: copies of each row; 1 for one.

    Returns:
        A state of B * n rows, of the same dtypes and device, the copies of a row beside one another
        (rows 0 to n - 1 are copies of row 0).
    """
    return select_state(state, torch.arange(state.rows).repeat_interleave(n))


def state_bytes(state: ModelState) -> int:
    """Memory that the state's tokens take, in bytes (spare capacity of caches not counted)."""
    return sum(block.bytes() for block in state.blocks)
