"""Processes that train one model together, started by `torchrun`.

Every process reads its part of a step's rows. With "ddp" each holds the whole model, with "fsdp"
(FSDP2) a part of every weight, gradient and moment, and gathers a block's weights while it is read.
With `sequence_parallel` some processes read the same rows, each a part of every sequence.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rwkvx.errors import InputError
from rwkvx.sequence import SequenceParallel
from rwkvx.training.forward import Objective
from rwkvx.training.world import World, sending_device

# The store of torchrun is there before the processes that it starts.
CONNECT = timedelta(seconds=60)
PR_SET_PDEATHSIG = 1  # prctl(2)


def sharing(world: World) -> SequenceParallel | None:
    """The processes that share this one's sequences; every process must ask."""
    if world.together == 1:
        return None
    # Groups of their own: gradients are shared while parts of a sequence still wait for each other.
    starts = range(0, world.size, world.together)
    groups = [dist.new_group(list(range(start, start + world.together))) for start in starts]
    return SequenceParallel(groups[world.rank // world.together])


@contextmanager
def joined(device: str, together: int = 1) -> Iterator[tuple[World, str]]:
    """Join the processes that torchrun started; this one's place, and its own device.

    together: how many share each sequence.

    Raises:
        InputError: more processes than GPUs, or not a multiple of `together`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % together:
        how = "start them with torchrun" if size == 1 else "start a multiple of it"
        raise InputError(f"sequence_parallel is {together}, there are {size} processes: {how}")
    if size == 1 or dist.is_initialized():
        world = World(dist.get_rank(), size, together) if size > 1 else World(0, 1)
        yield world, device
        return
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    # When torchrun starts processes again, its store still has the addresses of the dead ones.
    store, rank, size = next(dist.rendezvous("env://", timeout=CONNECT))
    store.set_timeout(dist.constants.default_pg_timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(dist.get_rank(), size, together), device
    finally:
        dist.destroy_process_group()


def _end_with_launcher() -> None:
    """Killed with `torchrun`, which started this process in a session of its own: it would wait for
    the others, who may be gone, and hold the run's folder against the next attempt."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def distributed(objective: Objective, world: World, how: str, some: bool) -> nn.Module:
    """The objective as it is called in training: itself, with its weights shared or in parts.

    Gradients are averages over the processes. some: in some stages not all weights learn.
    """
    if world.size == 1:
        return objective
    if how == "ddp":
        return DistributedDataParallel(
            objective, find_unused_parameters=some, gradient_as_bucket_view=True
        )
    shard(objective)
    return objective


def shard(objective: Objective) -> None:
    """Cut the weights in parts, one for each process (FSDP2)."""
    # Blocks return views, of which nothing is changed in place here.
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module.*view tensor.*")
    if sending_device().type == "cpu":
        # Compiled loops, which run where no gradient is needed, look at weights through NumPy;
        # memory that NumPy has seen cannot be given back when a block has been read.
        objective.without_gradients = torch.enable_grad
    mesh = init_device_mesh(sending_device().type, (dist.get_world_size(),))
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)


@contextmanager
def gradients_shared(module: nn.Module, last: bool) -> Iterator[None]:
    """Share gradients with the other processes in the last micro-batch of a step only."""
    context: Any = nullcontext()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        context = module.no_sync()
    with context:
        yield


def whole(x: Tensor) -> Tensor:
    """A tensor with all its parts; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, target: Tensor) -> Tensor:
    """`x`, a whole tensor, cut as `target` is."""
    if not isinstance(target, DTensor) or x.dim() == 0:
        return x
    return distribute_tensor(x.to(target.device), target.device_mesh, target.placements)
