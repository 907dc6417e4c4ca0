"""BABILong: the facts of a bAbI question, apart from one another in a book."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import match_all
from rwkvx_evals.long.sources import Story, babi
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

MOST_FACTS = 32

_KINDS = (
    "where a person is", "where an object is", "where an object was", "two-argument relations",
    "three-argument relations", "yes or no", "counting", "lists of objects", "negation",
    "indefinite knowledge", "pronouns", "conjunctions", "pronouns of two", "time", "deduction",
    "induction", "positions", "sizes", "paths", "motives",
)  # fmt: skip


@cache
def prompts() -> dict[str, Any]:
    """Instruction and examples by "qa1" … "qa20"."""
    text = files(__package__).joinpath("babilong.yaml").read_text(encoding="utf-8")
    read: dict[str, Any] = yaml.safe_load(text)
    return read


@dataclass(frozen=True)
class Babilong:
    """bAbI task `number`; sample n asks the same question at every length."""

    number: int
    source: str = (
        "BABILong (arXiv 2406.10149), prompts and score as in lm-eval; bAbI's en-10k test "
        f"questions of at most {MOST_FACTS} facts, in public-domain books, not PG-19"
    )
    answer_tokens: int = 64
    stop: tuple[str, ...] = ("\n\n",)

    @property
    def name(self) -> str:
        return f"babilong_qa{self.number}"

    @property
    def about(self) -> str:
        return f"bAbI facts spread over a book: {_KINDS[self.number - 1]}"

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        stories = [s for s in babi(writer.data, self.number) if len(s.facts) <= MOST_FACTS]
        order = writer.rng(self.name, "questions").permutation(len(stories))
        story = stories[order[index % len(stories)]]
        rng = writer.rng(self.name, length, index)
        depths = np.sort(rng.random(len(story.facts))).round(4).tolist()
        layout = self.layout(writer.books(), story, depths)
        support = [depths[fact] for fact in story.support]
        return writer.sample(self, length, index, layout, [story.answer], depths=support)

    def layout(self, hay: Haystack, story: Story, depths: list[float]) -> Layout:
        """depths: of the facts, in their order."""
        prompt = prompts()[f"qa{self.number}"]
        examples = "".join(
            f"{shown['text']}\n{shown['question']} {shown['answer']}\n\n"
            for shown in prompt["examples"]
        )
        facts = [f"{hay.before}{fact}" for fact in story.facts]
        return Layout(
            f"{prompt['instruction']}\n\n{examples}", hay, f"\n{story.question}",
            needles=list(zip(depths, facts, strict=True)),
        )  # fmt: skip

    def score(self, answer: str, sample: Sample) -> float:
        return match_all(answer, sample.answers)


TASKS = [Babilong(number) for number in range(1, 21)]
