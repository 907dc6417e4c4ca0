"""What a model remembers: one state per block (rwkvx/kinds), passed in and returned."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvx.kinds import BlockState


class ModelState(NamedTuple):
    """Of a whole model: one state per block, and how many tokens were read."""

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
    """The batch rows `rows` (integer indices, repeats allowed) as a state of their own."""
    if not isinstance(rows, Tensor):
        rows = torch.tensor(rows, dtype=torch.int64)
    blocks: list[BlockState] = []
    for block in state.blocks:
        blocks.append(block.select(rows.to(block.ffn_shift.device)))
    return ModelState(tuple(blocks), state.length)


def repeat_state(state: ModelState, n: int) -> ModelState:
    """Every batch row `n` times, neighbours together (as `repeat_interleave`)."""
    return select_state(state, torch.arange(state.rows).repeat_interleave(n))


def state_bytes(state: ModelState) -> int:
    """Memory that the state's tokens take, in bytes (spare capacity of caches not counted)."""
    return sum(block.bytes() for block in state.blocks)
