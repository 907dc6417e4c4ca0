"""What goes wrong in a run and a user can mend, in words."""

from collections.abc import Iterator
from contextlib import contextmanager

from rwkvx.errors import InputError, is_out_of_memory
from rwkvx.model import Model
from rwkvx.training.config import TrainConfig
from rwkvx.training.distributed import whole

__all__ = ["explained", "not_finite"]


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Memory that ran out is something that a user can mend."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            "memory ran out: lower batch and raise accumulate, or set gradient_checkpointing; "
            f"the last checkpoint in {config.folder} is from before"
        ) from error


def not_finite(model: Model) -> str | None:
    """The first weight that is not finite, else the first gradient, in words."""
    for name, x in model.named_parameters():
        if not whole(x.detach()).isfinite().all():
            return f"the weight {name}"
    for name, x in model.named_parameters():
        if x.grad is not None and not whole(x.grad).isfinite().all():
            return f"the gradient of {name}"
    return None
