"""Small tasks of known answers, for the engine's tests: a key at a depth, and a word in a list."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from oracle import ByteTokenizer, HistoryTools, Oracle

from rwkvx.data.passkey import PasskeyBuilder, standard_filler
from rwkvx_evals.long.evaluate import Request, evaluate
from rwkvx_evals.long.plan import Settings
from rwkvx_evals.long.task import Sample
from rwkvx_evals.models.own import OwnModel


@dataclass
class SmallWriter:
    """What the tests' tasks write with."""

    tokenizer: Any = field(default_factory=ByteTokenizer)
    seed: int = 0
    data: Path | None = None
    book: Path | None = None

    @property
    def begin(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        plain, full = (self.tokenizer.encode("a", add_special_tokens=a) for a in (False, True))
        return list(full[: len(full) - len(plain)])

    def cut(self, ids: Any, tokens: int) -> Any:
        """The start of a document and some of the ids, int64, so many in all."""
        return np.array([*self.begin, *ids], dtype=np.int64)[:tokens]


@dataclass(frozen=True)
class Needle:
    """A passkey at depth index / 9; samples of one length begin alike."""

    name: str = "needle"
    about: str = "A number at a depth."
    source: str = "the tests"
    answer_tokens: int = 8
    stop: tuple[str, ...] = (".",)

    def sample(self, writer: SmallWriter, length: int, index: int) -> Sample:
        builder = PasskeyBuilder(writer.tokenizer)
        depth = index % 10 / 9
        key = int(np.random.default_rng((writer.seed, length, index)).integers(10_000, 50_000))
        tokens = length - self.answer_tokens - len(writer.begin)
        ids = builder.build(standard_filler(writer.tokenizer), tokens, depth, key).ids
        text = writer.tokenizer.decode(ids.tolist())
        ids = writer.cut(ids, length)
        return Sample(f"{self.name}-{length}-{index}", ids, text, (str(key),), {"depth": depth})

    def score(self, answer: str, sample: Sample) -> float:
        return float(answer.strip() == sample.answers[0])


@dataclass(frozen=True)
class Noise:
    """Random letters, nothing shared; the score is a share of letters."""

    name: str = "noise"
    about: str = "Letters without any order."
    source: str = "the tests"
    answer_tokens: int = 5
    stop: tuple[str, ...] = ()

    def sample(self, writer: SmallWriter, length: int, index: int) -> Sample:
        draw = np.random.default_rng((writer.seed, length, index, 1))
        letters = bytes(draw.integers(97, 123, 2 * length).tolist()).decode()
        encoded = writer.tokenizer.encode(letters, add_special_tokens=False)
        ids = writer.cut(encoded, length - self.answer_tokens)
        text = writer.tokenizer.decode(ids[len(writer.begin) :].tolist())
        return Sample(f"{self.name}-{length}-{index}", ids, text, ("abcde",))

    def score(self, answer: str, sample: Sample) -> float:
        return sum(letter in "aeiou" for letter in answer[:5]) / 5


TASKS = {"needle": Needle(), "noise": Noise()}


def oracle(**more: Any) -> OwnModel:
    return OwnModel(Oracle(**more), "oracle", tools=HistoryTools())


def ask(model: Any, out: Path, **more: Any) -> dict[str, Any]:
    """A run of both tasks unless told otherwise."""
    request = {"tasks": TASKS, "lengths": (600, 1200), "samples": 10, "settings": Settings()}
    request |= {name: more.pop(name) for name in list(more) if name in Request.__annotations__}
    writer = more.pop("writer", None) or SmallWriter(model.tokenizer)
    return evaluate(model, Request(**request), writer, out, quiet=True, **more)
