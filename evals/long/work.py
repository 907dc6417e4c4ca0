"""One process at work in a run folder: takes units that nobody else has, until all are answered."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwkvx.progress import progress
from rwkvx_evals.files import peak_memory_bytes
from rwkvx_evals.long.shards import Claims, SharedJournal

# Seconds between two looks at what other processes have finished.
PAUSE = 0.5


@dataclass(frozen=True)
class Job:
    """A unit of any kind.

    Attributes:
        key: what is claimed. keys: the journal's keys of what it answers.
        label: for the progress bar. tokens: prompt tokens to read.
        do: answers it; told a function to report tokens to, it returns (read, generated).
    """

    key: str
    keys: tuple[str, ...]
    label: str
    length: int
    tokens: int
    do: Callable[[Callable[[int], None]], tuple[int, int]]


class Worker:
    """Does jobs, records what they took, and waits for those that others have claimed."""

    def __init__(
        self, journal: SharedJournal, claims: Claims, device: torch.device, quiet: bool = False
    ) -> None:
        self.journal, self.claims, self.device, self.quiet = journal, claims, device, quiet

    def is_done(self, job: Job) -> bool:
        """Whether the journal answers all of it."""
        return all(self.journal.is_done(key) for key in job.keys)

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with something left to answer."""
        return [job for job in jobs if not self.is_done(job)]

    def run(self, jobs: Sequence[Job]) -> None:
        """Until every job is done, by whomever. Raises InputError when the disk is full."""
        waiting = self.missing(jobs)
        total = sum(job.tokens for job in waiting)
        if not waiting:
            return
        with progress(total, quiet=self.quiet) as bar:
            while waiting:
                held = self._round(waiting, bar)
                self.journal.refresh()
                waiting = self.missing(held)
                if waiting:
                    bar.set_description(f"waiting for {len(waiting)} units of other processes")
                    time.sleep(PAUSE)

    def _round(self, jobs: Sequence[Job], bar: Any) -> list[Job]:
        """Does what can be claimed; returns what others hold."""
        held = []
        for job in jobs:
            with self.claims.take(job.key) as ours:
                if not ours:
                    held.append(job)
                    continue
                # Whoever had it before has written its rows before giving it back.
                self.journal.refresh()
                before = bar.n
                if not self.is_done(job):
                    bar.set_description(job.label)
                    self._do(job, bar)
                bar.update(job.tokens - (bar.n - before))
        return held

    def _do(self, job: Job, bar: Any) -> None:
        began = time.perf_counter()
        _forget_peak(self.device)
        read, generated = job.do(bar.update)
        # What differs from run to run stands in rows of its own, beside the answers.
        row = {
            "key": f"unit-{job.key}-{self.journal.shard}",
            "kind": "unit",
            "length": job.length,
            "seconds": round(time.perf_counter() - began, 3),
            "read": read,
            "generated": generated,
            "peak_bytes": _peak(self.device),
            "device": str(self.device),
        }
        self.journal.append([row])


def timing(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Seconds, tokens and peak memory by length, over all processes and starts of a run."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] != "unit":
            continue
        entry = found.setdefault(
            row["length"], {"seconds": 0.0, "read": 0, "generated": 0, "peak_bytes": 0}
        )
        entry["seconds"] = round(entry["seconds"] + row["seconds"], 3)
        entry["read"] += row["read"]
        entry["generated"] += row["generated"]
        entry["peak_bytes"] = max(entry["peak_bytes"], row["peak_bytes"] or 0)
    for entry in found.values():
        seconds = entry["seconds"]
        entry["tokens_per_second"] = round(entry["read"] / seconds, 1) if seconds else None
    return {str(length): found[length] for length in sorted(found)}


def _forget_peak(device: torch.device) -> None:
    """Starts a new peak; where the system does not allow that, peaks are those since the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Bytes since `_forget_peak`: of the device, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(s.split()[1]) for s in lines if s.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return peak_memory_bytes()


def processes() -> tuple[int, int]:
    """(rank, number) of this process among those that `torchrun` started; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str) -> str:
    """The device of this process: with several processes, "cuda" is one GPU each."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{int(local)}" if device == "cuda" and local is not None else device
