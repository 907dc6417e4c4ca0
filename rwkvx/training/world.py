"""This process among those that train the same model."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """This process among `size`."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def all_sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=sending_device())
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def any(self, flag: int) -> int:
        """The largest of a number that each process has."""
        if self.size == 1:
            return flag
        largest = torch.tensor([flag], device=sending_device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def rows(self, x: Tensor) -> Tensor:
        """What each process has, one after the other along the first dimension."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def own_rows(self, x: Tensor) -> Tensor:
        """This process's part of `rows`; all of it where it cannot be cut evenly."""
        return x if len(x) % self.size else x.chunk(self.size)[self.rank]


def sending_device() -> torch.device:
    """Where tensors must be to be sent."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
