"""A run folder that several processes share: their journals, and who does what.

Every process appends to a shard of its own and reads all of them. Work is claimed by a lock on one
byte of one file (POSIX record locks), which the system gives back when a process ends, however it
ends. Such locks hold between processes of one machine on any local file system, and between
machines on NFS (v4; v3 with lockd), Lustre mounted with `flock`, GPFS, CephFS and BeeGFS with
locks switched on. A file system without locks is said, and then serves one process only.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rwkvx.errors import InputError
from rwkvx.files import open_regular
from rwkvx_evals.journal import Journal, Row
from rwkvx_evals.long.rows import check_row

# Bits of a key that name the byte to lock: far more than there are units, within a file offset.
_KEY_DIGITS = 15
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class SharedJournal:
    """Finished rows by key, of all processes that ever worked in this folder."""

    def __init__(self, folder: Path) -> None:
        """Opens a new shard, and reads all there are.

        Raises InputError for a folder that cannot be written to, and for a damaged shard.
        """
        self.folder = folder
        self.rows: dict[str, Row] = {}
        self._read: dict[str, int] = {}
        self.refresh()
        self._own = Journal(_new_file(folder))
        self.shard = self._own.path.stem
        # What failed before this process began is worth another try, once.
        self._failed = {k: row for k, row in self.rows.items() if row.get("status") in RETRIED}

    def refresh(self) -> None:
        """Reads what was added to the shards since the last time."""
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._read.get(path.name, 0)
            with open_regular(path) as file:
                file.seek(start)
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]  # a last line may be in the making
            *lines, last = whole.split(b"\n")[:-1] or [b""]
            for line in lines:
                self._take(_parse(line, path))
            # A power cut can leave a last line that ends well and holds zeros: it stays unread.
            if last and not last.startswith(b"\0"):
                self._take(_parse(last, path))
                self._read[path.name] = start + len(whole)
            else:
                self._read[path.name] = start + len(whole) - len(last) - (1 if last else 0)

    def _take(self, row: Row) -> None:
        old = self.rows.get(row["key"])
        if old is None or row.get("attempt", 0) >= old.get("attempt", 0):
            self.rows[row["key"]] = row

    def is_done(self, key: str) -> bool:
        """Whether a row is there, and not one of an earlier start that is to be tried again."""
        row = self.rows.get(key)
        return row is not None and row is not self._failed.get(key)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows durably; see `Journal.append`."""
        fresh = []
        for row in rows:
            attempt = self.rows.get(row["key"], {}).get("attempt", 0)
            fresh.append({**row, "attempt": attempt + 1})
        self._own.append(fresh)
        for row in fresh:
            self._take(row)

    def close(self) -> None:
        """Closes this process's shard; an empty one is removed."""
        self._own.close()
        if not self._own.rows:
            self._own.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# What another start may answer: memory, a network.
RETRIED = frozenset({"oom", "error"})


def _new_file(folder: Path) -> Path:
    """An empty shard that nobody else has."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = folder / f"{number:04}.jsonl"
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise InputError(f"cannot open {folder}: {error.strerror or error}") from error
    raise AssertionError("itertools.count ends")


def _parse(line: bytes, path: Path) -> Row:
    """Raises InputError for anything that this package has not written."""
    try:
        row: Row = json.loads(line)
        check_row(row)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged: {line[:40]!r} is no row of a run ({str(error)[:60]}); move the "
            "file away to compute its answers again"
        ) from error
    return row


class Claims:
    """Which unit of work is whose, among the processes of one run folder."""

    def __init__(self, path: Path, several: bool = False) -> None:
        """several: other processes are known to take part.

        Raises InputError when they are and the file system has no locks.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(f"cannot open {path}: {error.strerror or error}") from error
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise InputError(f"cannot use {path}: it is not a regular file")
        self.locks = True
        if not self._lock(0, 1) and not self.locks and several:
            raise InputError(
                f"the file system of {path.parent} has no locks: start one process only, or name "
                "a folder on a local disk or NFS with --out"
            )
        self._unlock(0)

    @contextmanager
    def take(self, key: str) -> Iterator[bool]:
        """Whether the unit is ours while the context lasts; without locks everything is."""
        place = 1 + int(key[:_KEY_DIGITS], 16)
        ours = self._lock(place, 1) or not self.locks
        try:
            yield ours
        finally:
            if ours:
                self._unlock(place)

    def _lock(self, place: int, length: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, place)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self.locks = False
            elif error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def _unlock(self, place: int) -> None:
        if self.locks:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        """Gives every claim back."""
        os.close(self._file)
