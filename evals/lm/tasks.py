"""lm-eval's own task definitions, with their data from a local folder or from the hub."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click
import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from rwkvx.data.folder import DATA_VARIABLE
from rwkvx.errors import InputError
from rwkvx.settings import nearest
from rwkvx_evals.files import short
from rwkvx_evals.lm.local import DATA_SETS, FOUNDRY, find_data_set
from rwkvx_evals.lm.replace import replaced

logger = logging.getLogger("lm_eval.rwkvx")  # shown as lm-eval's own remarks are

# Our own, for data that no definition of lm-eval reads.
DEFINITIONS = Path(__file__).parent / "definitions"
# Readers of local files by `datasets`; any other dataset_path is the hub's.
_FILE_READERS = {"json", "csv", "text", "parquet", "arrow", "pandas", "xml", "sql"}


class MissingDataError(InputError):
    """The data of a task is neither in the folder nor to be had from the hub."""


@dataclass
class Sources:
    """Where the data of each task came from.

    by_task: in words. notes: how it differs from the hub's. own_items: tasks whose few-shot
    examples are drawn from the evaluated items, as their training split is not there.
    """

    by_task: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    own_items: set[str] = field(default_factory=set)

    def add(self, task: str, source: str, note: str = "") -> None:
        """Remembers where a task's data came from, and says so."""
        self.by_task[task] = source
        if note:
            self.notes[task] = note
        logger.info("%s: data: %s%s", task, source, f"; {note}" if note else "")


@contextlib.contextmanager
def local_data(folder: Path | None) -> Iterator[Sources]:
    """Lets lm-eval's tasks find their data in `folder` as long as this lasts, else on the hub.

    Whatever builds tasks is served: groups, tags, files of one's own, lm-eval's command. The one
    place where lm-eval's tasks get their data is their method `download`.
    """
    sources = Sources()
    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: Any = None, **more: Any) -> None:
        name, path = task.config.task, task.config.dataset_path
        found = None if task.config.custom_dataset else find_data_set(path, task.DATASET_NAME)
        if folder is not None and found is not None and found.held(folder):
            splits = found.splits(folder, task.DATASET_NAME or "")
            if _evaluated(task) in splits:
                _serve(task, splits, sources)
                files = " and ".join(found.files)
                sources.add(name, f"folder {folder} ({files})", found.note)
                return
        try:
            original(task, dataset_kwargs, **more)
        except Exception as error:  # whatever a reader of files or the hub's client raises
            raise _explained(name, path, task.config.custom_dataset, folder, error) from error
        sources.add(name, _words(task))

    with replaced(ConfigurableTask, "download", download):
        yield sources


def _evaluated(task: Any) -> str | None:
    """The split that lm-eval evaluates."""
    return task.config.test_split or task.config.validation_split


def _serve(task: Any, splits: Mapping[str, list[dict[str, Any]]], sources: Sources) -> None:
    """Gives a task its splits, and takes the names of those away that are not there.

    Where few-shot examples would come from such a split they come from the evaluated one, as
    lm-eval does for tasks without training data; the item itself is never among them.
    """
    config, few = task.config, task.fewshot_cfg
    pool = few.split or config.training_split or config.validation_split or config.test_split
    task.dataset = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    for kind in ("training_split", "validation_split", "test_split"):
        if getattr(config, kind) not in splits:
            setattr(config, kind, None)
    if config.process_docs is not None:  # asked for many times
        config.process_docs = few.process_docs = cache(config.process_docs)
    if pool not in splits and few.samples is None:
        # lm-eval leaves the item out where its few-shot split *is* its test split, None included.
        few.split = config.test_split
        if config.output_type != "loglikelihood_rolling":  # which has no examples at all
            sources.own_items.add(config.task)


def _words(task: Any) -> str:
    """Where a task got data that the folder does not have."""
    config = task.config
    if config.custom_dataset is not None:
        return "made by the task itself"
    path, name = config.dataset_path, task.DATASET_NAME
    if path in _FILE_READERS or Path(str(path)).exists():
        return f"files of its own ({path})"
    return f"the hub: {path}{f' ({name})' if name else ''}"


def _explained(
    task: str, path: str | None, makes_its_own: Any, folder: Path | None, error: Exception
) -> InputError:
    """The true cause for which a task has no data."""
    if isinstance(error, InputError):
        return error
    reason = first_line(error)
    if isinstance(error, ModuleNotFoundError):
        return missing_package(task, error)
    if makes_its_own:
        return InputError(
            f"task {task} cannot make its data: {reason} (what it needs goes with --metadata)"
        )
    if path in _FILE_READERS or Path(str(path)).exists():
        return InputError(f"task {task} cannot read its data files: {reason}")
    return MissingDataError(f"{how_to_get(task, path, folder)} (the hub: {reason[:60]})")


def first_line(message: BaseException | str) -> str:
    """The first line of a message that says something, for one line of ours."""
    lines = (" ".join(line.split()) for line in str(message).splitlines())
    said = next((line for line in lines if re.search(r"\w", line)), type(message).__name__)
    return said[:160]


def missing_package(task: str, error: ModuleNotFoundError) -> InputError:
    """What to install for a task."""
    name = (error.name or first_line(error)).partition(".")[0]
    return InputError(f"task {task} needs the package {name}, which is missing: pip install {name}")


def how_to_get(task: str, path: str | None, folder: Path | None) -> str:
    """Where the data of a task can come from, and which data sets `folder` does hold."""
    ways = "connect to huggingface.co"
    known = next((d for (p, _), d in DATA_SETS.items() if p == path), None)
    if known is not None:
        files = " and ".join(known.files)
        ways = f"name a folder that holds {files} with --data or {DATA_VARIABLE}, or {ways}"
    there = f"; {short(folder, 60)} does not hold it" if folder is not None else ""
    if path in FOUNDRY:
        there += f", task {FOUNDRY[path]} reads what llm-foundry has of it"
    return f"no data for task {task}: {ways}{there}"


@cache
def _definition_files() -> list[Path]:
    return sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))


_TASK_LINE = re.compile(
    r"""^["']?task["']?:[ ]*["']?([^\s"'#\[]+)["']?[ ]*(?:\#.*)?$""", re.MULTILINE
)


def _tasks_in(file: Path) -> list[str]:
    return _TASK_LINE.findall(file.read_text(encoding="utf-8", errors="replace"))


@cache
def _all_definitions() -> dict[str, Path]:
    return {name: file for file in reversed(_definition_files()) for name in _tasks_in(file)}


def definition_file(name: str) -> Path | None:
    """lm-eval's YAML that defines a task, found by reading names only (its index takes 13 s)."""
    namesakes = (file for file in _definition_files() if file.stem == name)
    found = next((file for file in namesakes if name in _tasks_in(file)), None)
    return found or _all_definitions().get(name)


@dataclass(frozen=True)
class Loaded:
    """lm-eval's tasks and groups, and where the data of each task came from."""

    tasks: list[Any]
    sources: Sources


def load_tasks(
    names: Sequence[str],
    folder: Path | None,
    include: Sequence[Path] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Loaded:
    """The tasks and groups of these names, tags, patterns, YAML files, or folders of such files.

    Data come from `folder` where it is known how it holds them, else from the hub. include: more
    folders with definitions, which come before lm-eval's own. metadata: for tasks that make their
    data themselves. Raises InputError for names that are not there and for data that cannot be had.
    """
    for path in include:
        if not path.is_dir():
            raise InputError(f"--include-path {short(path)} is not a folder")
    with local_data(folder) as sources:
        manager = _manager(names, include, dict(metadata or {}))
        items = [
            (spec, x) for spec in dict.fromkeys(names) for x in _resolve(spec, manager, include)
        ]
        found = [task for spec, item in items for task in _load(spec, item, manager)]
        try:
            manager.load(found)
        except ValueError as error:  # a task named twice, alone and in a group
            raise InputError(f"--tasks: {first_line(error)}") from error
    return Loaded(found, sources)


def _manager(names: Sequence[str], include: Sequence[Path], metadata: dict[str, Any]) -> Any:
    """An index of the folders that define these names, or of everything where that is not enough.

    Groups, tags and patterns may reach beyond the folders in which their names are found.
    """
    own = [DEFINITIONS, *include]
    files = {name: definition_file(name) for name in names}
    folders = {file.parent for file in files.values() if file is not None}
    manager = TaskManager(
        include_path=[*sorted(folders), *own], include_defaults=False, metadata=metadata
    )
    kinds = {name: getattr(manager.task_index.get(name), "kind", None) for name in names}
    simple = (Kind.TASK, Kind.PY_TASK)
    if all(kinds[name] in simple or _is_path(name) for name in names):
        return manager
    click.echo("reading lm-eval's index of all its tasks, which takes a while", err=True)
    return TaskManager(include_path=own, metadata=metadata)


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _resolve(spec: str, manager: Any, include: Sequence[Path]) -> list[Any]:
    """What lm-eval loads for a name, a pattern, a YAML file, or a folder of them."""
    if spec in manager.all_tasks:
        return [spec]
    if _is_path(spec):
        path = Path(spec).expanduser()
        files = sorted(glob.glob(str(path / "*.yaml" if path.is_dir() else path)))
        if not files:
            raise InputError(f"--tasks: no task definition at {short(spec)}")
        return files
    matches: list[Any] = manager.match_tasks([spec])
    if not matches:
        like = nearest(spec, manager.all_tasks, 3) or ":"
        raise InputError(
            f"no task {spec[:60]!r}{like} rwkvx lm-eval ls tasks lists them{_broken(include)}"
        )
    return matches


def _broken(include: Sequence[Path]) -> str:
    """The first definition in these folders that lm-eval cannot read, and silently left out."""
    for file in (file for folder in include for file in sorted(folder.rglob("*.yaml"))):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of the YAML parser, or of the file system
            return f"; {file.name} cannot be read: {first_line(error)[:80]}"
    return ""


def _load(spec: str, item: str, manager: Any) -> list[Any]:
    """The group of one name, or the task or tasks; raises InputError with the true cause."""
    try:
        known = load_yaml(item, resolve_func=True) if _is_path(item) else item
        loaded = manager.load([known])
        # Of one name, the first group holds all others.
        return list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise missing_package(spec, error) from error
    except Exception as error:  # a definition that lm-eval cannot build, in any of its ways
        raise InputError(f"task {short(spec)} cannot be loaded: {first_line(error)}") from error
