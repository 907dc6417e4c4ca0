"""Training checkpoints: everything that a run needs to go on as if it had not been stopped.

A checkpoint holds whole tensors by the names of the model: any number of processes goes on from it,
whatever number made it. Its files are safetensors, one for the model and one for each thing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.shards import read_file, read_weights
from rwkvx.errors import InputError
from rwkvx.files import read_json
from rwkvx.kinds.contract import tensors_of
from rwkvx.model import Model
from rwkvx.settings import from_plain
from rwkvx.state import ModelState
from rwkvx.training.distributed import like, whole
from rwkvx.training.run_folder import PROGRESS
from rwkvx.training.world import World

MODEL, OPTIMIZER, CARRIED, AVERAGE = "model", "optimizer", "carried", "average"
Tensors = dict[str, Tensor]


@dataclass
class Progress:
    """How far a run has come, apart from tensors.

    Attributes:
        step: steps done; total: steps that the run was to have.
        identity: what determines the weights, see `rwkvx.training.identity`.
        best: lowest loss of an evaluation in the last stage, of the model of best_step, with all of
            its best_scores.
        skipped: steps without an update, and skipped_in_a_row those at the end.
        changes: what was changed on the way, and from which step on.
    """

    identity: dict[str, Any]
    total: int
    step: int = 0
    best: float | None = None
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)


class Running(NamedTuple):
    """The tensors of a run, or of one process of it."""

    model: Model
    optimizer: torch.optim.Optimizer
    average: Model | None
    carried: ModelState | None


def whole_model(model: Model, keep: bool = True) -> Checkpoint:
    """The model with whole tensors; every process must ask, those that do not keep it get none."""
    tensors = {}
    for name, x in model.state_dict().items():  # one by one: no process but the first holds all
        gathered = whole(x.detach())
        if keep:
            tensors[name] = gathered.cpu()
    return Checkpoint(model.config, tensors, model.tokenizer_to_save)


def tensors_by_file(running: Running, world: World) -> dict[str, Tensors]:
    """What is saved, by file and by name in it: this process's parts of tensors that are cut."""
    model, optimizer, average, carried = running
    found = {MODEL: dict(model.state_dict()), OPTIMIZER: dict(_moments(model, optimizer))}
    if average is not None:
        found[AVERAGE] = dict(average.state_dict())
    if carried is not None:
        found[CARRIED] = {name: world.as_rows(x) for name, x in _flatten(carried).items()}
    prefixes = {name: "" if name == MODEL else f"{name}." for name in found}
    return {
        file: {f"{prefixes[file]}{name}": x.detach() for name, x in tensors.items()}
        for file, tensors in found.items()
    }


def read_progress(folder: Path) -> Progress:
    """How far the run of a checkpoint had come.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / PROGRESS
    return from_plain(Progress, read_json(path), str(path))


def read(folder: Path, running: Running, progress: Progress, world: World) -> ModelState | None:
    """Fill model, average and optimiser; this process's part of the carried state.

    Raises:
        InputError: tensors that are missing or do not fit.
    """
    model, optimizer, average, _ = running
    _fill(model, read_weights(folder), folder)
    if average is not None:
        _fill(average, _read(folder, AVERAGE), folder / f"{AVERAGE}.safetensors")
    parameters = dict(model.named_parameters())
    numbers = {name: i for i, name in _numbered(model, optimizer)}
    states: dict[int, Tensors] = {}
    for key, x in _read(folder, OPTIMIZER).items():
        name, _, moment = key.rpartition(".")
        if name not in numbers:
            raise InputError(
                f"{folder}: the model has no parameter {name}, of which moments lie there"
            )
        x = x.reshape(()) if moment == "step" else x
        states.setdefault(numbers[name], {})[moment] = like(x, parameters[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    path = folder / f"{CARRIED}.safetensors"
    if not path.exists():
        return None
    return _unflatten(
        model, {n: world.own_rows(x) for n, x in _read(folder, CARRIED).items()}, path
    )


def _read(folder: Path, name: str) -> Tensors:
    """The tensors of a file by their names without that of the file."""
    tensors = read_file(folder / f"{name}.safetensors")
    return {key.removeprefix(f"{name}."): x for key, x in tensors.items()}


def _moments(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    states = optimizer.state_dict()["state"]
    for index, name in _numbered(model, optimizer):
        for moment, x in states.get(index, {}).items():
            yield f"{name}.{moment}", x.reshape(1) if x.dim() == 0 else x


def _numbered(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str]]:
    """The optimiser's number of each parameter, and the model's name of it."""
    names = {id(x): name for name, x in model.named_parameters()}
    parameters = (x for group in optimizer.param_groups for x in group["params"])
    yield from ((i, names[id(x)]) for i, x in enumerate(parameters))


def _fill(model: nn.Module, tensors: Tensors, origin: Path) -> None:
    own = model.state_dict()
    try:
        cut = {name: like(x, own[name]) if name in own else x for name, x in tensors.items()}
        model.load_state_dict(cut)
    except RuntimeError as error:
        raise InputError(f"{origin} does not fit the model: {error}") from error


def _flatten(state: ModelState) -> Tensors:
    return {
        f"{i}.{name}": x
        for i, block in enumerate(state.blocks)
        for name, x in tensors_of(block).items()
    }


def _unflatten(model: Model, tensors: Tensors, origin: Path) -> ModelState:
    blocks = []
    for i, empty in enumerate(model.fresh_state(1).blocks):
        for name in tensors_of(empty):
            if f"{i}.{name}" not in tensors:
                raise InputError(f"{origin} lacks {i}.{name}")
        found = {name: tensors[f"{i}.{name}"].to(model.device) for name in tensors_of(empty)}
        blocks.append(empty._replace(**found))
    return ModelState(tuple(blocks), 0)
