"""InfiniteBench: a sequence of digits in noise, and the smallest numbers of a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rwkvx_evals.long.scores import first_number
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

DEPTHS = 10
# The list holds LOWEST … 99; what is asked for is below.
LOWEST = 20


def depth_of(index: int) -> float:
    """Ten depths in turn."""
    return round(index % DEPTHS / (DEPTHS - 1), 4)


class NumberString:
    """Ten digits, of which neighbours are often equal: harder to copy than a pass key."""

    name = "number_string"
    about = "a sequence of ten digits with repetitions, hidden in noise at ten depths in turn"
    source = (
        "InfiniteBench's Retrieve.Number (arXiv 2402.13718), in the prompt for base models, which "
        "begins the answer; lengths are exact"
    )
    answer_tokens = 16
    stop: tuple[str, ...] = ("\n",)

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        digits = [str(digit) for digit in rng.integers(10, size=5)]
        for more in range(5):  # five times one of the digits once more, beside itself
            at = int(rng.integers(5 + more))
            digits.insert(at, digits[at])
        key = "".join(digits)
        hidden = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
        layout = Layout(
            "There is an important info hidden inside a lot of irrelevant text. Find it. I will "
            "quiz you about the important information there.\n\n",
            writer.noise(),
            "\nWhat is the sequence of digits?\n\nThe sequence of digits is",
            needles=[(depth_of(index), hidden)],
        )
        return writer.sample(self, length, index, layout, [key], depth=depth_of(index))

    def score(self, answer: str, sample: Sample) -> float:
        return first_number(answer, sample.answers)


@dataclass(frozen=True)
class Find:
    """The smallest numbers of a list that all samples share stand in it once."""

    name: str
    wanted: str
    rank: int
    source: str = (
        "InfiniteBench's Math.Find (arXiv 2402.13718), its prompt; what is asked for stands in the "
        "list once, at a known depth, not hundreds of times; all samples share the other numbers"
    )
    answer_tokens: int = 8
    stop: tuple[str, ...] = ("\n",)

    @property
    def about(self) -> str:
        return f"the {self.wanted} of a list of numbers from 0 to 99"

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        hay = writer.haystack(
            "list of numbers", lambda: _numbers(writer.rng("list of numbers")), before=", "
        )
        lowest = np.sort(rng.choice(LOWEST, self.rank, replace=False)).tolist()
        depths = [depth_of(index), *rng.random(self.rank - 1).round(4).tolist()]
        hidden = sorted(zip(depths, reversed(lowest), strict=True))
        layout = Layout(
            f"What is the {self.wanted} in the following list?\n\n[",
            hay,
            "\n\nYou should answer with only one number, no other words. "
            f"The {self.wanted} of the list is:",
            needles=[(depth, f", {number}") for depth, number in hidden],
            close="]",
            filler=(" ", ""),
        )
        return writer.sample(self, length, index, layout, [str(lowest[-1])], depth=depths[0])

    def score(self, answer: str, sample: Sample) -> float:
        return first_number(answer, sample.answers)


def _numbers(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield from (f", {number}" for number in rng.integers(LOWEST, 100, size=1024))


TASKS = [
    NumberString(),
    Find("find_smallest", "smallest number", 1),
    Find("find_second", "second smallest number", 2),
]
