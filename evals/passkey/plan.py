"""What a passkey run asks: its settings, and the task that the long-context engine runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rwkvx.data.passkey import Filler, PasskeyBuilder, draw_key
from rwkvx.errors import InputError
from rwkvx.ranges import COUNT, TOKENS, Whole, check
from rwkvx_evals.long.task import Sample

DEPTHS = Whole(1, 1000)
MOST_SAMPLES = 100_000


def depth_values(count: int) -> tuple[float, ...]:
    """`count` depths from 0 (right after the task) to 1 (right before the question)."""
    check("depths", count, DEPTHS)
    if count == 1:
        return (0.5,)
    return tuple(index / (count - 1) for index in range(count))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the answers of a run, besides the model."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    seeds: int
    max_new_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        check("seeds", self.seeds, COUNT)
        check("max_new_tokens", self.max_new_tokens, TOKENS)
        samples = len(self.lengths) * len(self.depths) * self.seeds
        if samples > MOST_SAMPLES:
            raise InputError(
                f"{samples:,} samples (lengths × depths × seeds): at most {MOST_SAMPLES:,} at once"
            )

    @property
    def samples(self) -> int:
        """Questions of one length."""
        return len(self.depths) * self.seeds

    def place(self, index: int) -> tuple[float, int]:
        """Depth and seed of the sample `index` of a length."""
        place, seed = divmod(index, self.seeds)
        return self.depths[place], seed


@dataclass(frozen=True)
class PasskeyTask:
    """Every depth and seed of a run as samples of one task; prompts have exactly `length` tokens.

    The published prompt of `rwkvx.data.passkey`. (The task `passkey` of `eval long` counts the
    answer into the length, as all tasks there do.)
    """

    settings: Settings
    builder: PasskeyBuilder
    filler: Filler
    name: str = "passkey"
    about: str = "a number hidden at every depth"
    source: str = "arXiv 2305.16300"
    stop: tuple[str, ...] = ()

    @property
    def answer_tokens(self) -> int:
        return self.settings.max_new_tokens

    def sample(self, writer: Any, length: int, index: int) -> Sample:
        depth, seed = self.settings.place(index)
        passkey = draw_key(seed, length, depth)
        ids = self.builder.build(self.filler, length, depth, passkey).ids
        about = {"depth": round(depth, 6), "seed": seed}
        return Sample(f"passkey-{length}-{index}", ids, "", (str(passkey),), about)

    def score(self, answer: str, sample: Sample) -> float:
        return float(read_answer(answer) == sample.answers[0])


def read_answer(text: str) -> str | None:
    """The first run of digits in generated text, as written; None when there is none."""
    match = re.search(r"[0-9]+", text)
    return match[0] if match else None
