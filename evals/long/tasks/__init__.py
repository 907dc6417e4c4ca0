"""The tasks, one file a family: a file here that lists `TASKS` is all that a new one takes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from fnmatch import fnmatchcase

from rwkvx.errors import InputError
from rwkvx.settings import nearest
from rwkvx_evals.long.task import Task


def _found() -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for module in pkgutil.iter_modules(__path__):
        for task in importlib.import_module(f"{__name__}.{module.name}").TASKS:
            if task.name in tasks:
                raise ValueError(f"two tasks are named {task.name}")
            tasks[task.name] = task
    return tasks


TASKS: dict[str, Task] = _found()


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, each once, in the order asked for.

    A name is a task's own, a pattern ("niah_single_*"), what several names begin with ("niah",
    "graphwalks"), or "all".

    Raises InputError for a name that is none, with those nearest to it.
    """
    found: dict[str, Task] = {}
    for name in names:
        matching = _matching(name)
        if not matching:
            like = nearest(name, TASKS, 3) or ": see --list"
            raise InputError(f"unknown task {name!r}{like}")
        found |= {task: TASKS[task] for task in matching}
    return list(found.values())


def _matching(name: str) -> list[str]:
    if name in TASKS:
        return [name]
    if name == "all":
        return list(TASKS)
    return [task for task in TASKS if fnmatchcase(task, name) or task.startswith(f"{name}_")]
