"""What a long-context task is: samples of an exact length, and a score for an answer.

Everything else (reading shared prefixes once, batches, journal, resume, report) is the engine's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rwkvx_evals.long.writer import Writer

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: task, length and index, such as "niah_single_1-4096-3".
        ids: the prompt as a model reads it, int64 [T]; T and the task's `answer_tokens` make the
            length that was asked for. Tokens that the tokenizer puts in front are among them.
        text: the prompt as text, for endpoints and people.
        answers: what is right; how several of them count is the task's own.
        about: what a report shows beside it, such as {"depth": 0.25}; JSON values only.
    """

    id: str
    ids: Ids
    text: str
    answers: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash (hex) of what is asked and what is right: the same in an export and a report."""
        sha = hashlib.sha256(json.dumps([self.id, self.answers]).encode())
        sha.update(np.ascontiguousarray(self.ids, dtype="<i8").data)
        return sha.hexdigest()


class Task(Protocol):
    """One task. A file of `rwkvx_evals.long.tasks` holds one, or several of a family.

    Attributes:
        name: as `--tasks` takes it. about: one line for `--list`.
        source: paper or file that it follows, and how it differs.
        answer_tokens: room for the answer, part of the length. stop: strings that end an answer.
    """

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def answer_tokens(self) -> int: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        """Sample number `index` of `length` tokens: a function of these three and the seed.

        Raises:
            InputError: the length is too short for the task, or the data too short for it.
        """
        ...

    def score(self, answer: str, sample: Sample) -> float:
        """0 to 1 for the generated text."""
        ...
