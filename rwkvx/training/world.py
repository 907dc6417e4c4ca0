"""This process among those that train the same model."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


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

    def as_rows(self, x: Tensor) -> Tensor:
        """This process's part of a tensor that has the rows of all processes."""
        if self.size == 1:
            return x
        mesh = init_device_mesh(x.device.type, (self.size,))
        return DTensor.from_local(x, mesh, [Shard(0)])

    def own_rows(self, x: Tensor) -> Tensor:
        """This process's part of the rows of all; all of it where it cannot be cut evenly."""
        return x if len(x) % self.size else x.chunk(self.size)[self.rank]


def sending_device() -> torch.device:
    """Where tensors must be to be sent."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
