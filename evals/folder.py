"""Folders of results: whose they are, what they are called, where and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwkvx.errors import InputError
from rwkvx.files import is_there, read_json
from rwkvx.training.facts import command_line
from rwkvx_evals.bench.machine import describe
from rwkvx_evals.files import digest, short, write_json

# In every folder of results: task, model, weights and settings that they belong to.
MARK = "belongs_to.json"
# What makes two results different; a model's name may change.
_IDENTITY = ("task", "weights", "settings")


def owner(task: str, model: str, weights: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What results belong to: `model` is a name for people, `weights` the model's fingerprint."""
    return {"task": task, "model": model, "weights": weights, "settings": dict(settings)}


def model_label(model: str) -> str:
    """The name of a model in reports and folder names: a shipped name, or the file's own."""
    return Path(model).expanduser().resolve().name


def default_folder(whose: Mapping[str, Any]) -> Path:
    """Where results go unless the user says: no two models or settings share it."""
    parts = (whose["task"], whose["model"], whose["weights"][:8], digest(whose["settings"])[:6])
    return Path("runs") / "-".join(parts)


def claim(folder: Path, whose: Mapping[str, Any]) -> None:
    """Takes a new, empty or own folder for the results of `whose`; or one in which nothing came of
    another's.

    Raises InputError, changing nothing, when it holds anything else: results are never
    overwritten by those of another task, model or setting.
    """
    wanted = json.loads(json.dumps(whose))
    if not _held(folder):
        write_json(folder / MARK, wanted)
        return
    if not is_there(folder / MARK):
        raise InputError(
            f"{short(folder)} holds other files ({_cut(_held(folder)[0], 40)}, …) and no {MARK}: "
            f"{_ADVICE}"
        )
    try:
        found = read_json(folder / MARK)
    except InputError as error:
        raise InputError(f"{error}; {_ADVICE}") from error
    if not isinstance(found, dict) or any(name not in found for name in _IDENTITY):
        raise InputError(f"{short(folder / MARK)} is damaged; {_ADVICE}")
    if any(found[name] != wanted[name] for name in _IDENTITY):
        raise InputError(f"{short(folder)} holds results of {_difference(found, wanted)}")


_ADVICE = "name another folder with --out, or remove this one"


def _held(folder: Path) -> list[str]:
    """Names of what must not be lost: all but the mark, hidden files, and files without content."""
    try:
        return sorted(
            path.name
            for path in folder.iterdir()
            if path.name != MARK and not path.name.startswith(".") and not _is_empty(path)
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot use {short(folder)}: {error.strerror or error}") from error


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What the results that are there belong to, where that differs."""
    if found["task"] != wanted["task"]:
        return f"{_cut(found['task'], 40)}, not of {wanted['task']}; {_ADVICE}"
    if found["weights"] != wanted["weights"]:
        theirs = _cut(str(found["weights"])[:8], 8)
        return f"other weights ({theirs}, not {wanted['weights'][:8]}); {_ADVICE}"
    old = found["settings"] if isinstance(found["settings"], dict) else {}
    new = wanted["settings"]
    name = next((n for n in (*new, *old) if old.get(n) != new.get(n)), "settings")
    values = f"{_cut(old.get(name), 30)}, not {_cut(new.get(name), 30)}"
    return f"other settings ({_cut(name, 20)}: {values}); {_ADVICE}"


def _cut(value: Any, size: int) -> str:
    """A value in one short line that any terminal can show."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= size else f"{text[: size - 1]}…"


def provenance(packages: Sequence[str] = ()) -> dict[str, Any]:
    """When, by which command, where and with what results were made.

    It differs from run to run, so it stands apart from the results. packages: further
    distributions whose versions matter.
    """
    machine = describe()
    versions = {name: machine.pop(name) for name in ("rwkvx", "python", "torch")}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": machine.pop("date"),
        "command": command_line(),
        "commit": machine.pop("commit"),
        "versions": versions,
        "machine": machine,
    }
