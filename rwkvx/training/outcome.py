"""What came of a step: decided on the device, read by the host when the device has got there.

Axes: P parameters that have a gradient.
"""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rwkvx.model import Model
from rwkvx.state import ModelState
from rwkvx.training.distributed import whole

__all__ = ["Outcome", "gradient_norms", "move_average", "step_if"]


class Reading:
    """A copy of a tensor that is on its way to the host."""

    def __init__(self, x: Tensor) -> None:
        self.copy = x.to("cpu", non_blocking=True)  # pinned, from a GPU
        self.event: Any = None
        if x.device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record()

    def numbers(self) -> list[float]:
        """Wait until it is there."""
        if self.event is not None:
            self.event.synchronize()
        return cast(list[float], self.copy.tolist())


class Outcome(Mapping[str, float]):
    """Loss, norm of the gradient and learning rate of a step; to look at them waits for it.

    Args:
        step: its number, from 1; began: when, in seconds of `time.perf_counter`.
        loss: a scalar; norms: [P], of each gradient, whose names are `names`.
        carried: the states at the end of its sequences.

    Attributes:
        finite: a scalar on the device, bool: whether the step changed anything.
        ended: when its numbers were read; 0 before.
    """

    def __init__(
        self,
        step: int,
        began: float,
        rate: float,
        loss: Tensor,
        norms: Tensor,
        names: list[str],
        carried: ModelState | None,
    ) -> None:
        self.step, self.began, self.names, self.carried = step, began, names, carried
        self.norm = torch.linalg.vector_norm(norms)
        self.finite = loss.isfinite() & self.norm.isfinite()
        self.ended = 0.0
        self._reading = Reading(torch.cat([loss[None], self.norm[None], norms.detach()]).double())
        self._rate, self._numbers = rate, dict[str, float]()
        self._norms: list[float] = []

    def read(self) -> dict[str, float]:
        """Its numbers, by name."""
        if not self.is_read:
            loss, norm, *self._norms = self._reading.numbers()
            self._numbers = {"loss/train": loss, "gradient_norm": norm, "learning_rate": self._rate}
            self.ended = time.perf_counter()
        return self._numbers

    def __getitem__(self, name: str) -> float:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())

    @property
    def is_read(self) -> bool:
        """Whether somebody has waited for it."""
        return self.ended > 0

    @property
    def is_skipped(self) -> bool:
        """Whether it left everything as it was."""
        return not all(math.isfinite(self[name]) for name in ("loss/train", "gradient_norm"))

    def culprit(self, model: Model) -> str:
        """The first weight that is not finite, else the first gradient, else the loss, in words."""
        for name, x in model.named_parameters():
            if not whole(x.detach()).isfinite().all():
                return f"the weight {name}"
        self.read()
        for name, norm in zip(self.names, self._norms, strict=True):
            if not math.isfinite(norm):
                return f"the gradient of {name}"
        return f"the loss ({self['loss/train']})"


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """[P]: the norm of each, with all of its parts."""
    if any(isinstance(x, DTensor) for x in gradients):
        return whole(torch.stack([torch.linalg.vector_norm(x) for x in gradients]))
    return torch.stack(torch._foreach_norm(gradients))


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of a fused optimiser, which the device leaves out where `finite` (a scalar) is false:
    weights, moments and their count stay, as `torch.amp.GradScaler` has it."""
    found: Any = optimizer
    found.found_inf = finite.logical_not().float()
    optimizer.step()
    del found.found_inf


@torch.no_grad()
def move_average(average: nn.Module, module: nn.Module, share: Tensor) -> None:
    """Move averaged weights to those of now: not at all for a share of 0, all the way for 1."""
    for mean, x in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(x, share.to(mean.dtype))
