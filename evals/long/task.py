"""What a long-context task is: samples of an exact length, and a score for an answer.

Everything else (reading shared prefixes once, batches, journal, resume, report) is the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: task, length and index, such as "niah_single_1-4096-3".
        ids: the prompt as a model reads it, int64 [T]; T and the task's `answer_tokens` make the
            length that was asked for.
        text: the prompt as text, for endpoints and people.
        answers: what is right; how several of them count is the task's own.
        about: what a report shows beside it, such as {"depth": 0.25}.
    """

    id: str
    ids: Ids
    text: str
    answers: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


class Writer(Protocol):
    """Makes prompts of exact token lengths for one tokenizer (writer.py)."""


class Task(Protocol):
    """One task. A file of `rwkvx_evals.long.tasks` holds one, or several of a family.

    Attributes:
        name: as `--tasks` takes it. about: one line for `--list`.
        source: paper or file that it follows, and how it differs.
        answer_tokens: room for the answer, part of the length. stop: strings that end an answer.
    """

    name: str
    about: str
    source: str
    answer_tokens: int
    stop: tuple[str, ...]

    def sample(self, writer: Any, length: int, index: int) -> Sample:
        """Sample number `index` of `length` tokens: a function of these three and the seed.

        Raises:
            InputError: the length is too short for the task, or the data too short for it.
        """
        ...

    def score(self, answer: str, sample: Sample) -> float:
        """0 to 1 for the generated text."""
        ...
