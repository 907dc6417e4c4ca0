"""This process among those that train the same model."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class World(NamedTuple):
    """This process among `size`, of which `together` that follow each other share each sequence."""

    rank: int
    size: int
    together: int = 1

    @property
    def data(self) -> "World":
        """The place of this process's group among the groups, each of which reads other rows."""
        return World(self.rank // self.together, self.size // self.together)

    @property
    def counts(self) -> bool:
        """Whether what this process's group has is to be counted here."""
        return self.rank % self.together == 0

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

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all processes, which no host waits for."""
        if self.size > 1:
            x = x.to(sending_device())
            dist.all_reduce(x)
        return x

    def any(self, flag: int) -> int:
        """The largest of a number that each process has; hosts wait for each other, for no GPU."""
        if self.size == 1:
            return flag
        largest = torch.tensor([flag])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=_hosts(dist.group.WORLD))
        return int(largest.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def as_rows(self, x: Tensor) -> Tensor:
        """This process's part of a tensor that has the rows of all processes."""
        if self.size == 1:
            return x
        shape = (self.size // self.together, self.together)
        mesh = init_device_mesh(x.device.type, shape)
        return DTensor.from_local(x, mesh, [Shard(0), Replicate()])

    def own_rows(self, x: Tensor) -> Tensor:
        """This process's part of the rows of all; all of it where it cannot be cut evenly."""
        rank, size, _ = self.data
        return x if len(x) % size else x.chunk(size)[rank]


@lru_cache(maxsize=1)
def _hosts(everyone: dist.ProcessGroup) -> dist.ProcessGroup:
    """All processes, by what reaches the memory of a host."""
    return everyone if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def sending_device() -> torch.device:
    """Where tensors must be to be sent."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
