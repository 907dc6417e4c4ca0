"""What goes wrong in a run and a user can mend, in words."""

from collections.abc import Iterator
from contextlib import contextmanager

from rwkvx.errors import InputError, is_out_of_memory
from rwkvx.training.config import TrainConfig

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


def not_finite(config: TrainConfig, culprit: str, step: int) -> InputError:
    """Too many steps in a row had no update, the last of them by what `culprit` names."""
    return InputError(
        f"{culprit} is not finite at step {step}, the {config.most_skipped} steps before had no "
        "update either: lower optimizer.lr or raise optimizer.warmup; the last checkpoint in "
        f"{config.folder} is from before"
    )
