"""A pass key in repeated sentences, or in a book."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rwkvx.data.passkey import MAX_KEY, MIN_KEY, QUESTION, TASK, needle_text
from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import first_number
from rwkvx_evals.long.sources import NOISE, sentences
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

DEPTHS = 10


@dataclass(frozen=True)
class Passkey:
    """Ten depths in turn, from right after the task to right before the question."""

    name: str
    about: str
    prose: bool = False
    source: str = (
        "arXiv 2305.16300, in the words of its published script; lengths are exact tokens, "
        "the key is 1 to 50,000"
    )
    answer_tokens: int = 16
    stop: tuple[str, ...] = ()

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        key = str(writer.rng(self.name, length, index).integers(MIN_KEY, MAX_KEY + 1))
        depth = round(index % DEPTHS / (DEPTHS - 1), 4)
        layout = Layout(
            f"{TASK}\n", self._haystack(writer), f"\n{QUESTION}",
            needles=[(depth, f"\n{needle_text(int(key))}\n")],
        )  # fmt: skip
        return writer.sample(self, length, index, layout, [key], depth=depth)

    def _haystack(self, writer: Writer) -> Haystack:
        if self.prose:
            return writer.books()
        return writer.haystack("passkey noise", _endless_sentences, before=" ")

    def score(self, answer: str, sample: Sample) -> float:
        return first_number(answer, sample.answers)


def _endless_sentences() -> Iterator[str]:
    while True:
        yield from (f" {sentence}" for sentence in sentences(NOISE))


TASKS = [
    Passkey("passkey", "a number hidden in repeated sentences, at ten depths in turn"),
    Passkey("passkey_book", "a number hidden in a book, at ten depths in turn", prose=True),
]
