"""What long work shows on a terminal, and nowhere else: a bar with the time left, a first compile.

A log of a pipe or a file gets no bars: each redrawing would be a line of it.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

__all__ = ["compilation_told", "progress"]


def progress(
    total: float | None,
    what: str = "",
    unit: str = "tok",
    *,
    done: float = 0,
    quiet: bool = False,
    bar_format: str | None = None,
    file: IO[str] | None = None,
) -> Any:
    """A bar (of tqdm) for `total` units of work, on standard error unless told otherwise.

    `done` of them were done before, which says nothing about the speed.
    It is a context manager; `update(n)` adds to it, `write(text)` prints above it, also where no
    bar is shown because there is no terminal, or because of `quiet`.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
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

    Nothing is said where they are found on the disk, as in all runs but the first. Numba is not
    imported for this: its compiler is watched as soon as something else has done that.
    """
    stream = file or sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    over, watching = threading.Event(), ExitStack()

    def watch() -> bool:
        event: Any = sys.modules.get("numba.core.event")
        if not hasattr(event, "install_listener"):  # not imported, or not to its end
            return False
        watching.enter_context(event.install_listener("numba:compile", _notice(event, stream)))
        return True

    def wait() -> None:
        while not over.wait(0.1) and not watch():
            pass

    thread = threading.Thread(target=wait, daemon=True)
    if not watch():
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        watching.close()


def _notice(event: Any, stream: IO[str]) -> Any:
    """A listener of Numba's that prints one line when the first compilation begins."""

    class Notice(event.Listener):
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                self.told = True
                print("compiling for this processor: about a minute, once ...", file=stream)

        def on_end(self, event: Any) -> None:
            pass

    return Notice()
