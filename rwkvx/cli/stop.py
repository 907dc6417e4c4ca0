"""How a command ends before its end: by signals, and where nobody reads what it prints."""

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["StoppedError", "advice", "flush_output", "is_broken_pipe", "stoppable"]

# Commands that go on where they were stopped when they are given again.
_RESUME = ("demo", "train", "eval")


class StoppedError(BaseException):
    """A signal asked the process to end; temporary files are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work as ^C does, instead of at once and without a word."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    before: dict[int, Any] = {}
    for number in map(int, (signal.SIGTERM, signal.SIGHUP)):
        with suppress(ValueError):  # signals are for the main thread alone
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def advice(args: Sequence[str]) -> str:
    """How to go on after a command was stopped, if it can."""
    if args and args[0] in _RESUME:
        return ": give the same command again to go on from there"
    return ""


def flush_output() -> None:
    """Write out what is printed; OSError where the disk or the reader of a pipe refuses."""
    if sys.stdout is not None:  # it may have been closed by who started us
        sys.stdout.flush()


def is_broken_pipe(error: OSError) -> bool:
    """Whether whoever was to read what is printed has gone, as `head` goes when it has enough.

    Standard output is then led nowhere, so that Python's own last flush does not fail too.
    """
    if error.errno != errno.EPIPE:
        return False
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
