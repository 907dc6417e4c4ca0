"""The folder of a run: whose it is, its journal and claims, its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rwkvx.files import is_there, read_json
from rwkvx_evals.files import code_fingerprint, digest, package_version, write_json
from rwkvx_evals.folder import claim, owner
from rwkvx_evals.long.plan import Settings
from rwkvx_evals.long.report import write_report
from rwkvx_evals.long.results import Results, Row, write_rows
from rwkvx_evals.long.shards import Claims, SharedJournal
from rwkvx_evals.long.work import PAUSE

RESULTS = "results.json"
RESULTS_BYTES = 100_000_000


def whose(model: str, weights: str, settings: Settings) -> dict[str, Any]:
    """What one folder may hold results of: one model, one version of the code, one setting.

    Tasks, lengths and samples may be added to a folder.
    """
    code = {"version": package_version(), "code": code_fingerprint()}
    return owner("long", model, weights, {**asdict(settings), **code})


class RunFolder:
    """Journal and claims of a run, shared by all processes that work on it."""

    def __init__(self, path: Path, whose: dict[str, Any], several: bool = False) -> None:
        """several: other processes are known to take part.

        Raises InputError: a folder that holds something else, or cannot be written to.
        """
        self.path = path
        claim(path, whose)
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
                file = self.path / RESULTS
                old = read_json(file, RESULTS_BYTES) if is_there(file) else None
                same = ("answers", "sample_manifest", "weights", "timing")
                if isinstance(old, dict) and all(old.get(name) == found[name] for name in same):
                    return old
                write_rows(samples, self.path / "samples.jsonl")
                if windows:
                    write_rows(windows, self.path / "windows.jsonl")
                write_report(found, samples, self.path)
                write_json(file, found)
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
