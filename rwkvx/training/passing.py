"""Recurrent states passed on between sequences of different steps (arXiv 2507.02782).

Axes: B rows of the batch, P pieces of a row that recurrent blocks read, S packed sequences.
"""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from rwkvx.kinds.contract import tensors_of
from rwkvx.model import Model
from rwkvx.state import ModelState, select_state
from rwkvx.training.batches import Batch
from rwkvx.training.config import StageConfig
from rwkvx_kernels.dispatch import send

PASSING = 2  # number in a seed, beside those of training and evaluation


def initial_state(
    model: Model,
    carried: ModelState | None,
    stage: StageConfig,
    batch: Batch,
    seed: tuple[int, ...],
) -> ModelState | None:
    """What the sequences of a batch start from: rows of `carried`, others zero; None for all zero.

    A share of the rows starts from a carried state; pieces after the first of a row always do, and
    documents that begin inside of a row never.
    """
    if carried is None or (stage.state_passing == 0 and stage.pieces == 1):
        return None
    numbers = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(numbers[0] >> 1))
    count = len(batch.inputs)
    keep_BP = torch.ones(count, stage.pieces)
    keep_BP[:, 0] = torch.rand(count, generator=generator) < stage.state_passing
    draw_BP = torch.rand(count, stage.pieces, generator=generator)
    offsets = batch.offsets
    blocks = []
    for block, old in zip(model.blocks, carried.blocks, strict=True):
        pieces = stage.pieces if block.att.recurrent else 1
        rows = (draw_BP[:, :pieces].flatten() * len(old.ffn_shift)).long()
        kept = keep_BP[:, :pieces].flatten()
        if offsets is not None:
            rows, kept = (_at_first(x, batch, offsets) for x in (rows, kept))
        rows, kept = (send(x, old.ffn_shift.device) for x in (rows, kept))

        def passed(x: Tensor, rows: Tensor = rows, kept: Tensor = kept) -> Tensor:
            return x[rows] * kept.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)

        blocks.append(old.map(passed))
    return ModelState(tuple(blocks), 0)


def carried_state(final: ModelState, batch: Batch) -> ModelState:
    """The recurrent states at the end of every row."""
    offsets = batch.offsets
    if offsets is not None:
        last = _first_sequences(batch, offsets)[1:] - 1
        last = torch.cat([last, torch.tensor([len(offsets) - 2])])
        final = select_state(final, send(last, final.blocks[0].ffn_shift.device))
    return final.recurrent()


def _first_sequences(batch: Batch, offsets: Tensor) -> Tensor:
    """[B] which of the packed sequences begins each row."""
    rows, length = batch.inputs.shape
    return torch.searchsorted(offsets, torch.arange(rows) * length)


def _at_first(x_B: Tensor, batch: Batch, offsets: Tensor) -> Tensor:
    """[S] with the values of rows where a row begins, else zero."""
    spread = x_B.new_zeros(len(offsets) - 1)
    spread[_first_sequences(batch, offsets)] = x_B
    return spread


def chosen(this: Tensor, a: ModelState | None, b: ModelState | None) -> ModelState | None:
    """State `a` where `this` (a scalar, bool) is true, else `b`, decided on the device; both are of
    the same rows, and None is all zero."""
    if a is None and b is None:
        return None
    like = cast(ModelState, a or b)
    a, b = (x or ModelState(tuple(s.map(torch.zeros_like) for s in like.blocks), 0) for x in (a, b))
    blocks = []
    for first, second in zip(a.blocks, b.blocks, strict=True):
        others = tensors_of(second)
        pairs = tensors_of(first).items()
        blocks.append(first._replace(**{n: torch.where(this, x, others[n]) for n, x in pairs}))
    return ModelState(tuple(blocks), 0)
