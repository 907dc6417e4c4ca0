"""What training asks of a model: a batch in, its loss out.

Axes: B batch, T time, C width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvx.errors import InputError
from rwkvx.model import Model
from rwkvx.sequence import SequenceParallel
from rwkvx.state import ModelState
from rwkvx.training.batches import Batch, part_multiple
from rwkvx_kernels.linear import linear_cross_entropy

TILE = 4096  # tokens whose logits are held at once


class LongContext(NamedTuple):
    """Weights by how much a long context helps (LongCE, arXiv 2410.23771).

    window: tokens that the short context is scored on, after as many read before; most: the
    largest weight.
    """

    window: int
    most: float


class Scores(NamedTuple):
    """Of each target: losses [B, T] float32; right [B, T] bool, whether the model guesses it."""

    losses: Tensor
    right: Tensor


class Objective(nn.Module):
    """A model and what is asked of it as one module: weights are used inside of its calls only."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        # How losses are computed that no gradient is asked of.
        self.without_gradients: Any = torch.no_grad

    def forward(
        self,
        batch: Batch,
        state: ModelState | None = None,
        long: LongContext | None = None,
        scoring: bool = False,
    ) -> tuple[Tensor, ModelState] | Scores:
        """Read a batch; documents that begin inside of rows are read as packed sequences.

        Processes that share sequences are given whole ones, and read a part each.

        Returns:
            the weighted loss, summed over the (part of the) batch, a scalar in float32, and the
            state after the sequences; or, for `scoring`, each target's loss, without gradients.
        """
        if scoring:
            return self._scores(batch, state)
        sequence = self.model.sequence
        if sequence is not None:
            batch = own_part(batch, sequence)
        hidden, final = hidden_states(self.model, batch, state)
        weights = batch.weights
        if long is not None:
            with self.without_gradients():
                losses = scores(self.model, hidden.detach(), batch.targets).losses
                weights = weights * long_weights(self.model, batch, losses, long)
        if sequence is not None:
            final = final_state(final, sequence)
        flat = (hidden.flatten(0, 1), self.model.head.weight, batch.targets.flatten())
        return linear_cross_entropy(*flat, weights.flatten()), final

    def _scores(self, batch: Batch, state: ModelState | None) -> Scores:
        sequence, tokens = self.model.sequence, batch.inputs.shape[1]
        if sequence is not None and tokens % (sequence.size * part_multiple(self.model.config)):
            with alone(self.model):  # of a short text, rows are shorter
                return self._scores(batch, state)
        if sequence is not None:
            batch = own_part(batch, sequence)
        with self.without_gradients():
            hidden, _ = hidden_states(self.model, batch, state)
            found = scores(self.model, hidden, batch.targets)
        if sequence is None:
            return found
        return Scores(*(sequence.gathered(x, 1) for x in found))


@contextmanager
def alone(model: Model) -> Iterator[None]:
    """The model reads whole sequences by itself."""
    sequence, model.sequence = model.sequence, None
    try:
        yield
    finally:
        model.sequence = sequence


def hidden_states(
    model: Model, batch: Batch, state: ModelState | None
) -> tuple[Tensor, ModelState]:
    """[B, T, C] that the head reads, and the state after it; one row of it per packed sequence."""
    offsets = batch.offsets
    ids = batch.inputs if offsets is None else batch.inputs.reshape(1, -1)
    hidden, final = model(ids, state, logits="hidden", cu_seqlens=offsets, keep_cache=False)
    return hidden.view(*batch.inputs.shape, -1), final


def own_part(batch: Batch, sequence: SequenceParallel) -> Batch:
    """This process's part of whole sequences.

    Raises:
        InputError: a document begins inside of one.
    """
    if batch.offsets is not None:
        raise InputError(
            "sequence_parallel reads rows as they are: set data.separate to false, or "
            "sequence_parallel to 1"
        )
    length = batch.inputs.shape[1] // sequence.size
    return batch.cut(tokens=slice(sequence.rank * length, (sequence.rank + 1) * length))


@torch.no_grad()
def final_state(state: ModelState, sequence: SequenceParallel) -> ModelState:
    """The state of every process, which is that at the end of its part, as that of the last one."""
    blocks = tuple(block.recurrent().map(sequence.last) for block in state.blocks)
    return ModelState(blocks, state.length)


def scores(model: Model, hidden_BTC: Tensor, targets_BT: Tensor) -> Scores:
    """Loss and guess of each target, a tile of logits at a time."""
    losses, right = [], []
    parts = zip(hidden_BTC.flatten(0, 1).split(TILE), targets_BT.flatten().split(TILE), strict=True)
    for x, targets in parts:
        logits = model.head(x).float()
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(-1) == targets)
    return Scores(*(torch.cat(x).view(targets_BT.shape).detach() for x in (losses, right)))


def long_weights(model: Model, batch: Batch, losses_BT: Tensor, long: LongContext) -> Tensor:
    """[B, T]: min(exp(loss after a short context - loss after the whole one), most).

    A window's short context is the window before it. The first two windows have no longer one, and
    weigh 1.
    """
    weights, size = torch.ones_like(losses_BT), long.window
    for start in range(size, losses_BT.shape[1] - size, size):
        part = batch.cut(tokens=slice(start, start + 2 * size))
        part = part._replace(starts=part.starts.copy())
        part.starts[:, 0] = True
        hidden, _ = hidden_states(model, part, None)
        short = scores(model, hidden[:, size:], part.targets[:, size:]).losses
        after = slice(start + size, start + 2 * size)
        weights[:, after] = (short - losses_BT[:, after]).exp().clamp(max=long.most)
    return weights
