"""Training checkpoints: everything that a run needs to go on as if it had not been stopped."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.safetensors import write_tensors
from rwkvx.checkpoint.shards import read_file, read_weights
from rwkvx.errors import InputError
from rwkvx.files import write_json
from rwkvx.model import Model
from rwkvx.state import ModelState, Rwkv7State, SparseState
from rwkvx.training.config import TrainConfig

OPTIMIZER, STATE, PROGRESS = "optimizer.safetensors", "carried.safetensors", "progress.json"
AVERAGE = "average.safetensors"


def config_key(config: TrainConfig) -> str:
    """Hash of what determines the model: how often it is looked at only if the best is chosen."""
    data = asdict(config)
    unused = () if config.keep == "best" else ("eval_every", "eval_batches")
    for name in ("out", "steps", "save_every", "threads", "name", *unused):
        data.pop(name)
    data["planned"] = config.total_steps
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    folder: Path,
    step: int,
    model: Model,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    carried: ModelState | None,
    best: float | None,
    config: TrainConfig,
) -> None:
    """Write into folder/step-N, then point folder/progress.json at it and drop the one before.

    Raises:
        OSError: the disk refuses; then the one before is still there, and nothing of this one.
    """
    target = folder / f"step-{step}"
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, x in state.items():
            tensors[f"{index}.{name}"] = x
    before = read_progress(folder)
    try:
        save_folder(model, target)
        write_tensors(target / OPTIMIZER, tensors)
        if average is not None:
            write_tensors(target / AVERAGE, average.module.state_dict())
        if carried is not None:
            write_tensors(target / STATE, _flatten(carried))
        progress = {"step": step, "config": config_key(config), "best": best}
        write_json(folder / PROGRESS, progress)
    except OSError:
        _remove(target)
        raise
    if before and before["step"] != step:
        _remove(folder / f"step-{before['step']}")


def read_progress(folder: Path) -> dict[str, object] | None:
    """{"step", "config", "best"} of the newest checkpoint, or None."""
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        progress: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
        int(str(progress["step"])), str(progress["config"])
        float(str(progress["best"] or 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; remove it to start again") from error
    return progress


def load_checkpoint(
    folder: Path,
    model: Model,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> tuple[int, ModelState | None, float | None]:
    """Fill model, average and optimiser from the newest checkpoint.

    Returns:
        steps done, the carried state, the lowest loss of an evaluation in the last stage.

    Raises:
        InputError: the checkpoint belongs to another config.
    """
    progress = read_progress(folder)
    if progress is None:
        return 0, None, None
    if progress["config"] != config_key(config):
        raise InputError(
            f"{folder} holds a run of another config: choose another --out or remove the folder"
        )
    source = folder / f"step-{progress['step']}"
    model.load_state_dict(read_weights(source))
    if average is not None:
        average.module.load_state_dict(read_file(source / AVERAGE))
        average.n_averaged.fill_(int(str(progress["step"])))
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in read_file(source / OPTIMIZER).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = x
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    carried = None
    if (source / STATE).exists():
        carried = _unflatten(model, read_file(source / STATE))
    best = None if progress["best"] is None else float(str(progress["best"]))
    return int(str(progress["step"])), carried, best


def _flatten(state: ModelState) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": x
        for i, block in enumerate(state.blocks)
        for name, x in block._asdict().items()
        if isinstance(x, Tensor)
    }


def _unflatten(model: Model, tensors: dict[str, Tensor]) -> ModelState:
    def get(index: int, name: str) -> Tensor:
        return tensors[f"{index}.{name}"].to(model.device)

    blocks: list[Rwkv7State | SparseState] = []
    for i, empty in enumerate(model.fresh_state(1).blocks):
        if isinstance(empty, Rwkv7State):
            blocks.append(Rwkv7State(get(i, "shift"), get(i, "wkv"), get(i, "ffn_shift")))
        else:
            conv = None if empty.conv is None else get(i, "conv")
            blocks.append(SparseState((), conv, get(i, "ffn_shift")))
    return ModelState(tuple(blocks), 0)


def _remove(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink()
    if folder.exists():
        folder.rmdir()
