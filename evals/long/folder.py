"""The folder of a run: whose it is, its journal and claims, its report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rwkvx.errors import InputError
from rwkvx_evals.files import code_fingerprint, digest, package_version, write_json
from rwkvx_evals.long.plan import Settings
from rwkvx_evals.long.report import write_report
from rwkvx_evals.long.results import Results, Row, write_rows
from rwkvx_evals.long.shards import Claims, SharedJournal
from rwkvx_evals.long.work import PAUSE

IDENTITY = "run.json"
RESULTS = "results.json"


def identify(model: str, weights: str, settings: Settings) -> dict[str, Any]:
    """What one folder may hold results of: one model, one version of the code, one setting."""
    return {
        "model": model,
        "weights": weights,
        "version": package_version(),
        "code": code_fingerprint(),
        "settings": asdict(settings),
    }


class RunFolder:
    """Journal and claims of a run, shared by all processes that work on it."""

    def __init__(self, path: Path, identity: dict[str, Any], several: bool = False) -> None:
        """several: other processes are known to take part.

        Raises InputError: a folder that holds something else, or cannot be written to.
        """
        self.path = path
        _claim_folder(path, identity)
        self.claims = Claims(path / "claims", several)
        self.journal = SharedJournal(path / "journal")

    def report(self, results: Callable[[], tuple[Results, list[Row], list[Row]]]) -> Results:
        """Writes all files, unless another process has just written the same; returns results."""
        while True:
            with self.claims.take(digest("report")) as ours:
                if not ours:
                    time.sleep(PAUSE)
                    continue
                found, samples, windows = results()
                old = _read(self.path / RESULTS)
                same = ("answers", "sample_manifest", "weights", "timing")
                if old is not None and all(old.get(name) == found[name] for name in same):
                    return old
                write_rows(samples, self.path / "samples.jsonl")
                if windows:
                    write_rows(windows, self.path / "windows.jsonl")
                write_report(found, samples, self.path)
                write_json(self.path / RESULTS, found)
                return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.journal.close()
        self.claims.close()


def _claim_folder(path: Path, identity: dict[str, Any]) -> None:
    """Puts the identity into a new folder, or compares it with what is there."""
    file = path / IDENTITY
    old = _read(file)
    if old is None and (path / RESULTS).exists():
        raise InputError(f"{path} holds results of something else: name another folder with --out")
    if old is None:
        draft = path / f".{IDENTITY}.{os.getpid()}"
        write_json(draft, identity)
        try:
            os.link(draft, file)  # fails where another process was quicker
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            write_json(file, identity)
        finally:
            draft.unlink(missing_ok=True)
        old = _read(file)
    _compare(path, old or {}, identity)


def _compare(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    other = f"name another folder with --out, or remove {path}"
    if old.get("weights") != new["weights"]:
        raise InputError(
            f"{path} holds results of model {old.get('model')} (weights "
            f"{str(old.get('weights'))[:8]}), not of {new['model']} ({new['weights'][:8]}): {other}"
        )
    if old.get("code") != new["code"]:
        raise InputError(
            f"{path} holds results of rwkvx {old.get('version')} (code "
            f"{str(old.get('code'))[:8]}), not of {new['version']} ({new['code'][:8]}): {other}"
        )
    before = old.get("settings") or {}
    for name, value in new["settings"].items():
        if before.get(name) != value:
            raise InputError(
                f"{path} holds results with {name} {before.get(name)}, not {value}: {other}"
            )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged: it holds no mapping")
    return found
