"""Training checkpoints: everything that a run needs to go on as if it had not been stopped."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.safetensors import write_tensors
from rwkvx.checkpoint.shards import read_file, read_weights
from rwkvx.errors import InputError
from rwkvx.files import read_json, write_json
from rwkvx.kinds.contract import tensors_of
from rwkvx.model import Model
from rwkvx.settings import from_plain
from rwkvx.state import ModelState

OPTIMIZER, CARRIED, AVERAGE = "optimizer.safetensors", "carried.safetensors", "average.safetensors"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come, apart from tensors.

    Attributes:
        step: steps done; total: steps that the run was to have.
        identity: what determines the weights, see `rwkvx.training.identity`.
        best: lowest loss of an evaluation in the last stage, and best_step that of its model.
        skipped: steps without an update, and skipped_in_a_row those at the end.
        changes: what was changed on the way, and from which step on.
    """

    identity: dict[str, Any]
    total: int
    step: int = 0
    best: float | None = None
    best_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)


class Running(NamedTuple):
    """The tensors of a run."""

    model: Model
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    carried: ModelState | None


def write(folder: Path, running: Running, progress: Progress) -> None:
    """Write all of it into a folder; the average as well as what it is the average of."""
    save_folder(running.model, folder)
    states = running.optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": x for i, state in states.items() for name, x in state.items()}
    write_tensors(folder / OPTIMIZER, tensors)
    if running.average is not None:
        write_tensors(folder / AVERAGE, running.average.module.state_dict())
    if running.carried is not None:
        write_tensors(folder / CARRIED, _flatten(running.carried))
    write_json(folder / PROGRESS, asdict(progress))


def read_progress(folder: Path) -> Progress:
    """How far the run of a checkpoint had come.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / PROGRESS
    return from_plain(Progress, read_json(path), str(path))


def read(folder: Path, running: Running, progress: Progress) -> ModelState | None:
    """Fill model, average and optimiser; the carried state.

    Raises:
        InputError: tensors that are missing or do not fit.
    """
    model, optimizer, average, _ = running
    _fill(model, read_weights(folder), folder)
    if average is not None:
        _fill(average.module, read_file(folder / AVERAGE), folder / AVERAGE)
        average.n_averaged.fill_(progress.step - progress.skipped)
    states: dict[int, dict[str, Tensor]] = {}
    for name, x in read_file(folder / OPTIMIZER).items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = x
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    if not (folder / CARRIED).exists():
        return None
    return _unflatten(model, read_file(folder / CARRIED), folder / CARRIED)


def _fill(model: torch.nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{origin} does not fit the model: {error}") from error


def _flatten(state: ModelState) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": x
        for i, block in enumerate(state.blocks)
        for name, x in tensors_of(block).items()
    }


def _unflatten(model: Model, tensors: dict[str, Tensor], origin: Path) -> ModelState:
    blocks = []
    for i, empty in enumerate(model.fresh_state(1).blocks):
        for name in tensors_of(empty):
            if f"{i}.{name}" not in tensors:
                raise InputError(f"{origin} lacks {i}.{name}")
        found = {name: tensors[f"{i}.{name}"].to(model.device) for name in tensors_of(empty)}
        blocks.append(empty._replace(**found))
    return ModelState(tuple(blocks), 0)
