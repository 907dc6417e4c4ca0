"""A journal of finished samples: one JSON line each, on the disk before the next one starts.

A run that is killed and started again reads its journal and computes only what is missing. Each
row carries the key of what it answers (weights, code, prompt, settings), so a journal never gives
an old answer to a new question.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rwkvx.errors import InputError
from rwkvx_evals.files import short

Row = dict[str, Any]


class Journal:
    """Rows by key, appended durably to one JSONL file; a later row replaces an earlier one."""

    def __init__(self, path: Path, check: Callable[[Row], object] | None = None) -> None:
        """Opens or makes the file and reads its rows.

        check: raises ValueError, with the reason, for a row that is not what its reader expects.

        A last line that a crash cut short is dropped. Raises InputError when the file cannot be
        opened, is in use by another run, or has a damaged line before its last one.
        """
        self.path, self._check = path, check
        self.rows: dict[str, Row] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(
                f"cannot open {short(self.path)}: {error.strerror or error}"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise InputError(f"cannot use {short(self.path)}: it is not a regular file")
            self._lock()
            self._end = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(f"{short(self.path)} is in use by another run") from error
            # A file system without locks: carry on, as two runs on one folder are rare.

    def _read(self) -> int:
        content = self.path.read_bytes()
        *lines, _unfinished = content.split(b"\n")
        end = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                # A power cut can leave a last line that ends well and holds zeros.
                if number == len(lines):
                    break
                raise self._damaged(number, "it is not JSON") from error
            self._take(number, row)
            end += len(line) + 1
        if end < len(content):
            os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)
        return end

    def _take(self, number: int, row: Any) -> None:
        """Keeps a row that was read, once it is known to be one."""
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise self._damaged(number, "it has no key")
        try:
            if self._check is not None:
                self._check(row)
        except ValueError as error:
            raise self._damaged(number, str(error)) from error
        self.rows[row["key"]] = row

    def _damaged(self, number: int, reason: str) -> InputError:
        return InputError(
            f"{short(self.path)} line {number} is damaged: {reason[:80]}; move the file away to "
            "compute its answers again"
        )

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows (each with "key") and waits until they are on the disk.

        Raises InputError when the disk is full; what was written of these rows is taken back.
        """
        fresh = [dict(row) for row in rows]
        if not fresh:
            return
        text = "".join(
            json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in fresh
        )
        rest = memoryview(text.encode("utf-8", "surrogatepass"))
        length = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            self._take_back()
            raise InputError(
                f"cannot write {short(self.path)}: {error.strerror or error}; the {len(self.rows)} "
                "finished rows are kept: make room and run the same command again"
            ) from error
        self._end += length
        self.rows.update((row["key"], row) for row in fresh)

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        except OSError:
            # A device such as /dev/full cannot be truncated, and holds nothing either.
            return

    def close(self) -> None:
        """Closes the file and gives up the lock."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
