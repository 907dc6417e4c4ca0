"""OpenAI's MRCR: the i-th of several answers to the same request in a long conversation."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rwkvx_evals.long.scores import similarity
from rwkvx_evals.long.sources import books, sentences
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

FORMATS = (
    "poem", "short story", "blog post", "news article", "letter", "speech", "song", "joke",
    "product review", "social media post",
)  # fmt: skip
TOPICS = (
    "tapirs", "rocks", "frogs", "rain", "bread", "chairs", "bridges", "clocks", "gardens", "ships",
    "owls", "snow", "trains", "maps", "teeth", "lamps", "wolves", "shoes", "mountains", "letters",
    "doors", "rivers", "kites", "stars", "bees", "cheese", "castles", "wheels", "whales", "spoons",
)  # fmt: skip
SHORTEST, LONGEST = 80, 240  # bytes of an answer
POOL = 8  # every eighth answer is kept for the requests that are asked for
HIDDEN = 400  # of which so many
INTRODUCTION = (
    "Here is a conversation between a user and an assistant, followed by a request about it.\n\n"
)


def turn(kind: str, topic: str, answer: str) -> str:
    """A request and its answer."""
    article = "an" if kind[0] in "aeiou" else "a"
    return f"User: Write {article} {kind} about {topic}\n\nAssistant: {answer}\n\n"


@dataclass(frozen=True)
class Mrcr:
    """needles: equal requests in the conversation."""

    needles: int
    source: str = (
        "OpenAI's MRCR (MIT; after arXiv 2409.12640), its last request and score; plain text "
        "instead of chat messages, and answers that are sentences of books, of at most "
        f"{LONGEST} bytes, so that only their order in the conversation tells them apart"
    )
    answer_tokens: int = 256
    stop: tuple[str, ...] = ("\n\n", "User:")

    @property
    def name(self) -> str:
        return f"mrcr_{self.needles}"

    @property
    def about(self) -> str:
        return f"one of {self.needles} answers to the same request, word by word; similarity"

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        hay = writer.haystack(
            "the conversation", lambda: _turns(_passages(writer), writer.rng("mrcr turns"))
        )
        pool = writer.keep("mrcr answers", lambda: _pool(writer))
        topic = int(rng.integers(len(TOPICS)))
        kind = FORMATS[topic % len(FORMATS)]
        answers = [pool[at] for at in rng.choice(len(pool), self.needles, replace=False)]
        depths = np.sort(rng.random(self.needles)).round(4).tolist()
        which = int(rng.integers(self.needles))
        prefix = "".join(rng.choice(list(string.ascii_letters + string.digits), 10))
        ordinal = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")[which]
        layout = Layout(
            INTRODUCTION,
            hay,
            f"User: Prepend {prefix} to the {ordinal} (1 indexed) {kind} about {TOPICS[topic]}. Do "
            "not include any other text in your response.\n\nAssistant:",
            needles=[
                (depth, turn(kind, TOPICS[topic], answer))
                for depth, answer in zip(depths, answers, strict=True)
            ],
            filler=("(", ")\n\n"),
        )
        right = prefix + answers[which]
        return writer.sample(
            self, length, index, layout, [right],
            depth=depths[which], place=which + 1, prefix=prefix,
        )  # fmt: skip

    def score(self, answer: str, sample: Sample) -> float:
        return similarity(answer, sample.answers[0], sample.about["prefix"])


def _passages(writer: Writer) -> Iterator[str]:
    """One sentence or some, of the books in their order, as long as an answer."""
    text = ""
    for book in books(writer.data, writer.book):
        for sentence in sentences(book):
            text = f"{text} {sentence}".strip()
            size = len(text.encode())
            if size >= SHORTEST:
                if size <= LONGEST:
                    yield text
                text = ""


def _pool(writer: Writer) -> list[str]:
    """Different answers that stand nowhere else in the conversation."""
    return list(dict.fromkeys(islice(_passages(writer), 0, HIDDEN * POOL, POOL)))


def _turns(passages: Iterator[str], rng: np.random.Generator) -> Iterator[str]:
    """Requests for other topics, and for the topics asked for in other formats."""
    for number, passage in enumerate(passages):
        topic, kind = int(rng.integers(len(TOPICS))), int(rng.integers(len(FORMATS)))
        if number % POOL and kind != topic % len(FORMATS):
            yield turn(FORMATS[kind], TOPICS[topic], passage)


TASKS = [Mrcr(needles) for needles in (2, 4, 8)]
