"""Training checkpoints: everything that a run needs to go on as if it had not been stopped.

A checkpoint holds whole tensors by the names of the model: any number of processes goes on from it,
whatever number made it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rwkvx.adapters import base_tensors
from rwkvx.checkpoint import folder as model_folder
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.safetensors import write_tensors
from rwkvx.checkpoint.shards import read_file, read_weights
from rwkvx.errors import InputError
from rwkvx.files import read_json, write_json
from rwkvx.kinds.contract import tensors_of
from rwkvx.model import Model
from rwkvx.settings import from_plain
from rwkvx.state import ModelState
from rwkvx.training.distributed import like, whole
from rwkvx.training.world import World

OPTIMIZER, CARRIED, AVERAGE = "optimizer.safetensors", "carried.safetensors", "average.safetensors"
PROGRESS = "progress.json"
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
    average: AveragedModel | None
    carried: ModelState | None


class Snapshot(NamedTuple):
    """Whole tensors on the CPU, as one process has them who is to write them."""

    model: Checkpoint
    optimizer: Tensors
    average: Tensors | None
    carried: Tensors | None

    def write(self, folder: Path, progress: Progress) -> None:
        """Write all of it into a folder."""
        model_folder.write(self.model, folder)
        write_tensors(folder / OPTIMIZER, self.optimizer)
        for name, tensors in ((AVERAGE, self.average), (CARRIED, self.carried)):
            if tensors is not None:
                write_tensors(folder / name, tensors)
        write_json(folder / PROGRESS, asdict(progress))


def whole_model(model: Model, keep: bool = True) -> Checkpoint:
    """The model with whole tensors, low-rank updates added; every process must ask, those that do
    not keep it get none."""
    return Checkpoint(model.config, _whole(base_tensors(model), keep), model.tokenizer_of_file)


def snapshot(running: Running, world: World) -> Snapshot:
    """Gather all tensors in the first process; every process must ask."""
    keep = world.first
    states = dict(_moments(running.model, running.optimizer))
    average = None
    if running.average is not None:
        average = _whole(_averaged(running.average).state_dict(), keep)
    carried = None
    if running.carried is not None:
        carried = {name: world.rows(x) for name, x in _flatten(running.carried).items()}
        carried = _whole(carried, keep)
    model = running.model  # an adapter has tensors of its own
    whole_one = Checkpoint(model.config, _whole(model.state_dict(), keep), model.tokenizer_of_file)
    return Snapshot(whole_one, _whole(states, keep), average, carried)


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
        _fill(_averaged(average), read_file(folder / AVERAGE), folder / AVERAGE)
        average.n_averaged.fill_(progress.step - progress.skipped)
    parameters = dict(model.named_parameters())
    numbers = {name: i for i, name in _numbered(model, optimizer)}
    states: dict[int, Tensors] = {}
    for key, x in read_file(folder / OPTIMIZER).items():
        name, _, moment = key.rpartition(".")
        if name not in numbers:
            raise InputError(f"{folder / OPTIMIZER} has {key}, of which the model has no parameter")
        states.setdefault(numbers[name], {})[moment] = like(x, parameters[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    if not (folder / CARRIED).exists():
        return None
    tensors = {name: world.own_rows(x) for name, x in read_file(folder / CARRIED).items()}
    return _unflatten(model, tensors, folder / CARRIED)


def _averaged(average: AveragedModel) -> Model:
    model: Model = average.module.model  # type: ignore[assignment]
    return model


def _moments(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    states = optimizer.state_dict()["state"]
    for index, name in _numbered(model, optimizer):
        for moment, x in states.get(index, {}).items():
            yield f"{name}.{moment}", x


def _numbered(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str]]:
    """The optimiser's number of each parameter, and the model's name of it."""
    names = {id(x): name for name, x in model.named_parameters()}
    parameters = (x for group in optimizer.param_groups for x in group["params"])
    yield from ((i, names[id(x)]) for i, x in enumerate(parameters))


def _whole(tensors: dict[str, Any], keep: bool) -> Tensors:
    """Whole and on the CPU; one after the other, so that no process but the first holds all."""
    found = {}
    for name, x in tensors.items():
        gathered = whole(x.detach())
        if keep:
            found[name] = gathered.cpu()
    return found


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
