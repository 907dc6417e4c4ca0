"""A task as a user writes one: the colour that a book says a thing has."""

from dataclasses import dataclass

from rwkvx_evals.long.scores import match_any
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

THINGS = ["door", "boat", "coat", "roof"]
COLOURS = ["red", "blue", "green", "yellow"]


@dataclass(frozen=True)
class Colour:
    name: str = "colour"
    about: str = "the colour of a thing, said once in a book"
    source: str = "none: shows what a task takes"
    answer_tokens: int = 8
    stop: tuple[str, ...] = ("\n",)

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        thing, colour = str(rng.choice(THINGS)), str(rng.choice(COLOURS))
        depth = round(float(rng.random()), 3)
        needle = (depth, f" The {thing} is {colour}.")
        layout = Layout("Read this.\n", writer.books(), f"\nThe {thing} is", [needle])
        return writer.sample(self, length, index, layout, [colour], depth=depth)

    def score(self, answer: str, sample: Sample) -> float:
        return match_any(answer, sample.answers)


TASKS = [Colour()]
