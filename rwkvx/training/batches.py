"""Rows of a source as tensors: the micro-batches of a step, and what an evaluation reads.

Axes: B batch, T time.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvx.config import ModelConfig
from rwkvx.data.sources import Rows, Source, Wanted
from rwkvx.errors import InputError
from rwkvx.kinds import kind_of
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.world import World
from rwkvx_kernels.dispatch import send

ALL = slice(None)
# Number in a data seed: training and evaluation never share a sample.
TRAINING, EVALUATION = 0, 1


class Batch(NamedTuple):
    """Inputs, targets [B, T] int64; loss weights [B, T] float32; answers and starts [B, T] bool.

    `starts` are inputs before which everything is forgotten, that of each row among them. They stay
    with the host, which asks for them: no tensor, so that nothing sends them to a device.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor
    starts: NDArray[np.bool]

    @classmethod
    def of(cls, rows: Rows) -> "Batch":
        """From a source's rows."""
        ids = torch.from_numpy(rows.ids)
        rows.starts[:, 0] = True
        rest = (torch.from_numpy(rows.weights), torch.from_numpy(rows.answers), rows.starts)
        return cls(ids[:, :-1], ids[:, 1:], *rest)

    def cut(self, rows: slice = ALL, tokens: slice = ALL) -> "Batch":
        """Some rows, and of each some tokens, which may begin inside of a document."""
        inputs, targets, weights, answers = (x[rows, tokens] for x in self.tensors)
        return Batch(inputs, targets, weights, answers, self.starts[rows, tokens])

    def to(self, device: str) -> "Batch":
        """With its tensors on another device, without waiting for it."""
        inputs, targets, weights, answers = (send(x, device) for x in self.tensors)
        return Batch(inputs, targets, weights, answers, self.starts)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All but `starts`."""
        return self.inputs, self.targets, self.weights, self.answers

    @property
    def offsets(self) -> Tensor | None:
        """[sequences + 1] on the CPU: where sequences start in the flattened rows; None: one for
        each row."""
        if not self.starts[:, 1:].any():
            return None
        return torch.from_numpy(np.append(np.flatnonzero(self.starts), self.starts.size))


def step_batch(source: Source, config: TrainConfig, step: int) -> Batch:
    """All rows of one step, of all its micro-batches: their weights count over the whole step.

    Raises:
        InputError: rows that are to be read in pieces hold more than one document.
    """
    number, step_in_stage = config.stage_at(step)
    stage = config.stages[number]
    count = stage.batch * config.accumulate
    wanted = Wanted(
        order=(config.seed, TRAINING, number),
        fresh=(config.seed, TRAINING, step, 0),
        numbers=range(step_in_stage * count, (step_in_stage + 1) * count),
        length=stage.length,
        recurrent_length=stage.recurrent_length,
    )
    batch = Batch.of(source.rows(wanted))
    if stage.recurrent_length and batch.offsets is not None:
        raise InputError(
            f"stages[{number}]: recurrent_length reads rows whole, but documents begin inside "
            "them: set data.separate to false (text, tokens, hub), or recurrent_length to 0"
        )
    return batch


def own_batches(step: Batch, stage: StageConfig, world: World) -> list[Batch]:
    """The micro-batches of a step that this process reads: one part of the rows, in order."""
    rank, groups, _ = world.data
    count = len(step.inputs) // groups
    start, most = rank * count, min(stage.batch, count)
    size = max(n for n in range(1, most + 1) if count % n == 0)  # as large as may be, all alike
    firsts = range(start, start + count, size)
    return [step.cut(rows=slice(i, i + size)) for i in firsts]


def check_division(config: TrainConfig, processes: int) -> None:
    """Refuse stages whose steps or sequences cannot be cut evenly.

    Raises:
        InputError: one cannot, for so many processes.
    """
    together = config.sequence_parallel
    for number, stage in enumerate(config.stages):
        rows = stage.batch * config.accumulate
        if rows % (processes // together):
            raise InputError(
                f"stages[{number}] has {rows} sequences a step: {processes} processes cannot share "
                "them evenly"
            )
        multiple = together * part_multiple(config.model)
        if together > 1 and stage.length % multiple:
            raise InputError(
                f"stages[{number}] has sequences of {stage.length} tokens: for sequence_parallel "
                f"{together} the length must be a multiple of {multiple}"
            )


def part_multiple(config: ModelConfig) -> int:
    """Of how many tokens a process's part of a shared sequence must be a multiple."""
    return math.lcm(*(kind_of(name).part_multiple(config) for name in config.pattern))


def evaluation_batch(source: Source, config: TrainConfig, stage: StageConfig, index: int) -> Batch:
    """One of the batches of an evaluation; the same in every evaluation of the stage."""
    wanted = Wanted(
        order=(config.seed, EVALUATION),
        fresh=(config.seed, EVALUATION, index),
        numbers=range(index * stage.batch, (index + 1) * stage.batch),
        length=stage.length,
        recurrent_length=stage.recurrent_length,
    )
    return Batch.of(source.rows(wanted))
