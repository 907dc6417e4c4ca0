"""What long work shows on a terminal, and nowhere else: a bar with the time left, a first compile.

A log of a pipe or a file gets no bars: each redrawing would be a line of it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from tqdm import tqdm

__all__ = ["compilation_told", "progress"]


def progress(
    total: float | None,
    what: str = "",
    unit: str = "tok",
    *,
    quiet: bool = False,
    bar_format: str | None = None,
    file: IO[str] | None = None,
) -> "tqdm[Any]":
    """A bar for `total` units of work, on standard error unless told otherwise.

    It is a context manager; `update(n)` adds to it, `write(text)` prints above it, also where no
    bar is shown because there is no terminal, or because of `quiet`.
    """
    return tqdm(
        total=total,
        desc=what or None,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        bar_format=bar_format,
        disable=True if quiet else None,  # None: unless it is a terminal
        file=file or sys.stderr,
    )


@contextmanager
def compilation_told(file: IO[str] | None = None) -> Iterator[None]:
    """Say once, on a terminal, that loops are being compiled: a minute without a word otherwise.

    Nothing is said where they are found on the disk, as in all runs but the first.
    """
    stream = file or sys.stderr
    if not stream.isatty():
        yield
        return
    from numba.core import event

    class Listener(event.Listener):
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                self.told = True
                print("compiling for this processor: about a minute, once ...", file=stream)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield
