"""RULER's question answering over documents, with bAbI stories as documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import match_any
from rwkvx_evals.long.sources import Story, babi, random_pair
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

BABI_TASKS = (1, 2, 3, 11, 12, 13, 14)  # the answer is a place
MOST_FACTS = 20
LONG_TITLE = "straightforward-transformation and unaccountable-identification"
ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\n"
)


class DocumentQuestions:
    """Every document is a story of the same people with a title of its own.

    All samples share the documents; each asks about another one.
    """

    name = "ruler_qa"
    about = "where someone or something is in one of many short stories, told by its title"
    source = (
        "RULER (arXiv 2404.06654), its prompt and score; the documents are not SQuAD's or "
        f"HotpotQA's but titled bAbI stories of at most {MOST_FACTS} sentences (tasks "
        f"{', '.join(map(str, BABI_TASKS))}), so that every answer can be checked, and the "
        "language is simpler"
    )
    answer_tokens = 32
    stop: tuple[str, ...] = ("\n",)

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        stories = writer.keep(self.name, lambda: _stories(writer))
        hay = writer.haystack("bAbI documents", lambda: _texts(writer, stories), before="\n\n")
        question = max((story.question for story in stories), key=len)
        units = writer.capacity(self, length, self.layout(hay, LONG_TITLE, question))
        rng = writer.rng(self.name, length, index)
        unit = int(rng.integers(units))
        # A unit is a document, or several where the tokenizer merges over their ends.
        numbers = re.findall(
            r"Document (\d+):\n", hay.text(unit, unit + 1, opens=True, closes=True)
        )
        title, story = _document(writer, stories, int(numbers[rng.integers(len(numbers))]))
        layout = self.layout(hay, title, story.question, units)
        depth = round(hay.size(unit) / hay.size(units), 4)
        return writer.sample(self, length, index, layout, [story.answer], depth=depth)

    def layout(self, hay: Haystack, title: str, question: str, units: int | None = None) -> Layout:
        return Layout(
            f"{ORDER}The following are given documents.\n\n",
            hay,
            f"\n\n{ORDER}Question: In the document about {title}: {question} Answer:",
            filler=("\n\n", ""),
            units=units,
        )

    def score(self, answer: str, sample: Sample) -> float:
        return match_any(answer, sample.answers)


def _stories(writer: Writer) -> list[Story]:
    found = (story for number in BABI_TASKS for story in babi(writer.data, number))
    return [story for story in found if len(story.facts) <= MOST_FACTS]


def _document(writer: Writer, stories: list[Story], number: int) -> tuple[str, Story]:
    """Title and story of a document: two random names, so many that none comes twice."""
    rng = writer.rng("ruler_qa", "document", number)
    title = f"{random_pair(rng)} and {random_pair(rng)}"
    return title, stories[rng.integers(len(stories))]


def _texts(writer: Writer, stories: list[Story]) -> Iterator[str]:
    for number in count(1):
        title, story = _document(writer, stories, number)
        yield f"\n\nDocument {number}:\n{title}\n{' '.join(story.facts)}"


TASKS = [DocumentQuestions()]
