"""How far a run is and how long it will take: a bar in a terminal, some lines in a file."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rwkvx.progress import progress

__all__ = ["ProgressLine"]

SECONDS = 60.0  # between lines where there is no terminal


class ProgressLine:
    """Tokens, steps and loss on standard error.

    Args:
        total, done: tokens of the whole run, and those of earlier sittings.
        steps: of the whole run.
    """

    def __init__(self, total: int, done: int, steps: int) -> None:
        self.total, self.done, self.steps = total, done, steps
        self.began, self.first = time.monotonic(), done
        self.last_line = self.began
        self.bar = progress(total, done=done) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, number: int, tokens: int, loss: float) -> None:
        """A step of so many tokens is done."""
        self.done += tokens
        if self.bar is not None:
            self.bar.set_postfix(step=f"{number}/{self.steps}", loss=f"{loss:.4f}", refresh=False)
            self.bar.update(tokens)
        elif time.monotonic() - self.last_line >= SECONDS or number == self.steps:
            rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            self.say(f"step {number}/{self.steps}: loss {loss:.4f}, {rate:,.0f} tok/s, {left} left")
            self.last_line = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
