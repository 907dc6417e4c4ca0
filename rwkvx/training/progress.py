"""How far a run is and how long it will take: a bar in a terminal, some lines in a file."""

import resource
import sys
import time
from collections import deque
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch

from rwkvx.progress import progress
from rwkvx.training.config import TrainConfig
from rwkvx.training.curves import Curves, Silence
from rwkvx.training.outcome import Outcome
from rwkvx.training.plan import flops_per_token, product_speed

__all__ = ["ProgressLine", "Reports", "Speed"]

SECONDS = 60.0  # between lines where there is no terminal


class Speed:
    """Tokens a second, their share of what the machine's products allow, memory at the peak, and
    the share of the time that went into steps; how long ago the last checkpoint was begun."""

    def __init__(self, config: TrainConfig, device: str, processes: int) -> None:
        self.config, self.device = config, device
        self.products = processes * product_speed(device, config.precision)
        self.began = self.last_save = time.monotonic()
        self.in_steps = 0.0

    @property
    def minutes_since_save(self) -> float:
        """Since the last checkpoint, or the start."""
        return (time.monotonic() - self.last_save) / 60

    def saved(self) -> None:
        """A checkpoint has been begun."""
        self.last_save = time.monotonic()

    def of(self, step: int, tokens: int, seconds: float) -> dict[str, float]:
        """Of step number `step` (from 0): so many tokens in so many seconds."""
        rate = tokens / seconds
        self.in_steps += seconds
        flops = flops_per_token(self.config.model, self.config.stage(step))
        if self.device.startswith("cuda"):
            memory = float(torch.cuda.max_memory_allocated(self.device))
        else:
            memory = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "tokens_per_second": rate,
            "share_of_products": rate * flops / self.products,
            "memory_gib": memory / 2**30,
            "time_in_steps": self.in_steps / max(time.monotonic() - self.began, seconds),
        }


class ProgressLine:
    """Tokens, steps and loss on standard error.

    Args:
        total, done: tokens of the whole run, and those of earlier sittings.
        steps: of the whole run.
        shown: False says nothing.
    """

    def __init__(self, total: int, done: int, steps: int, shown: bool = True) -> None:
        self.total, self.done, self.steps = total, done, steps
        self.began, self.first = time.monotonic(), done
        self.last_line = self.began
        self.shown, terminal = shown, shown and sys.stderr.isatty()
        self.bar = progress(total, done=done) if terminal else None

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
        elif self.shown:
            print(text, file=sys.stderr, flush=True)


class Reports:
    """What came of steps, shown and written as soon as it is read, in their order."""

    def __init__(self, line: ProgressLine, curves: Curves | Silence, speed: Speed) -> None:
        self.line, self.curves, self.speed = line, curves, speed
        self.waiting, self.ended = deque[Outcome](), 0.0

    def add(self, outcome: Outcome) -> None:
        """A step has begun."""
        self.waiting.append(outcome)

    def give(self) -> None:
        """Report the steps that were read."""
        while self.waiting and self.waiting[0].is_read:
            outcome = self.waiting.popleft()
            step, tokens_until = outcome.step, self.speed.config.tokens_until
            count = tokens_until(step) - tokens_until(step - 1)
            # A device begins with a step when it is done with the one before.
            seconds = outcome.ended - max(outcome.began, self.ended)
            self.ended = outcome.ended
            self.curves.add(step, {**outcome, **self.speed.of(step - 1, count, seconds)})
            self.line.step(step, count, outcome["loss/train"])
            if outcome.is_skipped:
                self.line.say(f"step {step}: no update, the loss or a gradient is not finite")
