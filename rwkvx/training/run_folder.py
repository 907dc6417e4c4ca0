"""The folder of a run: one process at a time, checkpoints whole or not there, nothing overwritten.

config.yaml            the run, every field spelled out
checkpoints/step-N/    the last checkpoints: model folders, the optimiser, what is carried on
checkpoints/best-N/    with `keep: best`, the model of the best evaluation so far
NAME-step-N/           the model that the run made, named for itself
metrics.jsonl          a line for every step and evaluation; samples.jsonl: text, if asked for
results.json           for each model: scores, date, command, machine, commit
tensorboard/           the same curves
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rwkvx.checkpoint.manifest import verify_manifest
from rwkvx.errors import InputError
from rwkvx.files import flush, read_json, write_json, write_text

__all__ = ["RunFolder"]

PROGRESS = "progress.json"  # of a checkpoint: how far the run had come
_UNFINISHED = ".*.part*"  # what `replacing` leaves of a process that was killed


class RunFolder:
    """Files of a run; all but reading is for the process that owns it.

    keep: how many checkpoints stay, the newest ones.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path, self.checkpoints, self.keep = path, path / "checkpoints", keep
        self.metrics, self.results = path / "metrics.jsonl", path / "results.json"
        self.samples = path / "samples.jsonl"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one process that writes here; what a killed one left unfinished is removed.

        Raises:
            InputError: another process owns it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    owner = os.read(handle, 100).decode("ascii", "replace").strip()
                    raise InputError(
                        f"{self.path} belongs to a run that is going on (process {owner}): "
                        "wait for it, stop it, or choose another --out"
                    ) from None
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise  # but a file system without locks is no reason not to train
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            self._tidy()
            yield
        finally:
            os.close(handle)

    def _tidy(self) -> None:
        for unfinished in (*self.path.glob(_UNFINISHED), *self.checkpoints.glob(_UNFINISHED)):
            remove(unfinished)
        self._forget_old()

    def _forget_old(self) -> None:
        """Keep the newest checkpoints, and the best models that they name or that came after."""
        numbered = sorted(self.checkpoints.glob("step-*"), key=_number)
        for other in numbered[: -self.keep]:
            remove(other)
        kept = numbered[-self.keep :]
        try:
            named = {read_json(path / PROGRESS)["best_step"] for path in kept}
        except (InputError, LookupError, TypeError):
            return  # a damaged checkpoint: nothing is forgotten until it has been dealt with
        for best in self.checkpoints.glob("best-*"):
            if kept and _number(best) <= _number(kept[-1]) and _number(best) not in named:
                remove(best)

    # ------------------------------------------------------------- checkpoints

    def newest(self) -> Path | None:
        """The folder of the newest checkpoint."""
        found = {_number(path): path for path in self.checkpoints.glob("step-*")}
        found.pop(-1, None)
        return found[max(found)] if found else None

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after so many steps."""
        return self.checkpoints / f"step-{step}"

    def unfinished(self, step: int) -> Path:
        """Where that checkpoint is written; the same for all processes."""
        return self.checkpoints / f".step-{step}.part"

    def publish(self, part: Path, checkpoint: Path) -> None:
        """Give a complete checkpoint its name, and drop the oldest."""
        if checkpoint.exists():
            remove(checkpoint)
        part.rename(checkpoint)
        flush(self.checkpoints)
        self._forget_old()

    def verify(self, checkpoint: Path) -> None:
        """Check every file of a checkpoint against its sum.

        Raises:
            InputError: naming a file that is missing or has changed.
        """
        try:
            verify_manifest(checkpoint)
        except InputError as error:
            others = len(list(self.checkpoints.glob("step-*"))) > 1
            then = "go on from the one before" if others else "start again"
            raise InputError(f"{error}; remove {checkpoint} to {then}") from error

    # ------------------------------------------------------------- models

    def best(self, step: int) -> Path:
        """Folder of the best model so far, that of step N."""
        return self.checkpoints / f"best-{step}"

    def model(self, name: str, step: int) -> Path:
        """Folder of the model that a run of that name made in that many steps."""
        return self.path / f"{name}-step-{step}"

    # ------------------------------------------------------------- records

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write what the run is."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
        write_text(self.path / "config.yaml", text)

    def log(self, **values: Any) -> None:
        """Add a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def add_samples(self, step: int, samples: Mapping[str, str]) -> None:
        """Add what the model wrote."""
        with self.samples.open("a", encoding="utf-8") as file:
            for prompt, text in samples.items():
                line = {"step": step, "prompt": prompt, "text": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be taken again."""
        for path in (self.metrics, self.samples):
            if not path.exists():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, LookupError, TypeError):
                    continue  # cut short when the process was killed
            write_text(path, "".join(kept))

    def add_result(self, model: Path, result: Mapping[str, Any]) -> None:
        """Say in results.json how a model came about; those of other models stay."""
        found = read_json(self.results) if self.results.exists() else {}
        if not isinstance(found, dict):
            raise InputError(f"{self.results} is damaged: it holds no mapping")
        write_json(self.results, {**found, model.name: dict(result)})


def remove(path: Path) -> None:
    """Remove a file or folder; the name of a folder goes first, so that no half of it is found."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.part")
    if doomed != path:
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
    shutil.rmtree(doomed)


def _number(path: Path) -> int:
    """N of step-N or best-N; -1 for a name that is none."""
    text = path.name.removeprefix("step-").removeprefix("best-")
    return int(text) if text.isdigit() and path.is_dir() else -1
