"""lm-eval's own task definitions, with their data from a local folder or from the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from rwkvx.data.folder import DATA_VARIABLE
from rwkvx.errors import InputError
from rwkvx.files import parse_json, read_lines

Documents = list[dict[str, Any]]


class MissingDataError(InputError):
    """The data of a task is neither in the folder nor to be had from the hub."""


def read_jsonl(path: Path) -> Documents:
    """Rows of a JSON-lines file; raises InputError when it is missing or damaged."""
    if not path.exists():
        raise MissingDataError(f"cannot read {path.name}")
    try:
        return [parse_json(line, path) for line in read_lines(path) if line.strip()]
    except InputError as error:
        raise InputError(f"{path} is not JSON lines: {error}") from error


def _lambada(folder: Path) -> dict[str, Documents]:
    return {"test": read_jsonl(folder / "lambada_openai" / "lambada_test.jsonl")}


def _piqa(folder: Path) -> dict[str, Documents]:
    """The questions and, from a file of their own, the labels that lm-eval expects beside them."""
    rows = read_jsonl(folder / "piqa" / "valid.jsonl")
    path = folder / "piqa" / "valid-labels.lst"
    try:
        labels = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if len(labels) != len(rows):
        raise InputError(f"{path} has {len(labels)} labels for {len(rows)} questions")
    joined = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    # lm-eval's definition names a training split too; few-shot examples would come from it.
    return {"validation": joined, "train": []}


@dataclass(frozen=True)
class LocalTask:
    """How a data folder holds one task."""

    files: tuple[str, ...]
    read: Callable[[Path], dict[str, Documents]]


LOCAL = {
    "lambada_openai": LocalTask(("lambada_openai/lambada_test.jsonl",), _lambada),
    "piqa": LocalTask(("piqa/valid.jsonl", "piqa/valid-labels.lst"), _piqa),
}


@dataclass(frozen=True)
class Loaded:
    """lm-eval task objects, and where the data of each came from."""

    tasks: list[Any]
    sources: dict[str, str]


@cache
def _definition_files() -> list[Path]:
    return sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))


def definition_file(name: str) -> Path | None:
    """lm-eval's YAML that defines a task, found by reading names only (its index takes 13 s)."""
    files = _definition_files()
    line = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    for file in sorted(files, key=lambda file: file.stem != name):
        if line.search(file.read_text(encoding="utf-8", errors="replace")):
            return file
    return None


def load_tasks(names: Sequence[str], folder: Path | None) -> Loaded:
    """The tasks, with data from `folder` where it is known how it holds them, else from the hub.

    Raises InputError for unknown tasks, MissingDataError for data that cannot be had.
    """
    tasks: list[Any] = []
    sources: dict[str, str] = {}
    for name in names:
        file = definition_file(name)
        if folder is not None and name in LOCAL and file is not None:
            found, source = [_load_local(name, file, folder)], f"folder {folder}"
        else:
            found, source = _load_from_hub(name, file, folder), "hub"
        for task in found:
            tasks.append(task)
            sources[task.task_name] = source
    return Loaded(tasks, sources)


def _load_local(name: str, file: Path, folder: Path) -> Any:
    try:
        splits = LOCAL[name].read(folder)
    except MissingDataError as error:
        raise MissingDataError(f"{how_to_get(name, folder)} ({error})") from error
    built = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items() if rows}
    config = load_yaml(file) | {"custom_dataset": lambda **_: built}
    if "train" not in built:
        config["training_split"] = None
    config.pop("tag", None)
    return TaskManager(include_defaults=False).load([config])["tasks"][name]


def _load_from_hub(name: str, file: Path | None, folder: Path | None) -> list[Any]:
    try:
        if file is not None:
            manager = TaskManager(include_defaults=False, include_path=[file.parent])
        else:
            # A group or a tag: these are only found through the whole index.
            manager = TaskManager()
        if name not in manager.all_tasks:
            raise InputError(f"lm-eval has no task {name!r}")
        return list(manager.load([name])["tasks"].values())
    except InputError:
        raise
    except Exception as error:  # whatever the hub client raises when it cannot reach its server
        reason = str(error).strip().split("\n")[0][:200]
        raise MissingDataError(f"{how_to_get(name, folder)} (the hub: {reason})") from error


def how_to_get(name: str, folder: Path | None) -> str:
    """One sentence on where the data of a task can come from, and what `folder` does hold."""
    ways = "connect to huggingface.co"
    if name in LOCAL:
        files = " and ".join(LOCAL[name].files)
        ways = f"name a folder that holds {files} with --data or {DATA_VARIABLE}, or {ways}"
    held = [
        other
        for other, local in LOCAL.items()
        if folder is not None and all((folder / file).is_file() for file in local.files)
    ]
    there = f"; folder {folder} holds {', '.join(held) or 'no task'}" if folder is not None else ""
    return f"no data for task {name}: {ways}{there}"
