"""What a run asks: every sample of every task and length, and in which units it is read.

Prompts are not kept: they are made once to be counted, hashed and compared, and again when their
turn comes. A plan depends on the model, the tasks and the settings, never on what is answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from rwkvx.errors import InputError
from rwkvx.ranges import COUNT, check
from rwkvx_evals.files import code_fingerprint, digest
from rwkvx_evals.generate import Limit
from rwkvx_evals.interface import Tokenizer
from rwkvx_evals.long.prefixes import Hashes, Node, prefix_hashes, prefix_tree
from rwkvx_evals.long.task import Ids, Sample, Task
from rwkvx_evals.models.reader import ROWS, Frame

# Prompts read together, unless told otherwise, are at most so many tokens.
BATCH_TOKENS = 65_536
TRUNCATIONS = ("left", "middle")


@dataclass(frozen=True)
class Settings:
    """What decides the answers of a run, besides the model and the tasks."""

    seed: int = 0
    dtype: str = "float32"
    truncate: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Target:
    """What a plan needs to know of the model.

    Attributes:
        weights: fingerprint. frame: ids around every prompt. max_length: None for no limit.
        rows, continues: see `Reader`; a model that does not continue shares short tails only.
        tokenizer: of a model that prompts are sent to as text; None for one that reads tokens.
    """

    weights: str
    frame: Frame = field(default_factory=Frame)
    max_length: int | None = None
    rows: int = ROWS
    continues: bool = True
    tokenizer: Tokenizer | None = None

    @property
    def remote(self) -> bool:
        """Whether prompts are sent as text."""
        return self.tokenizer is not None


@dataclass(frozen=True)
class Question:
    """One sample as it is asked.

    Attributes:
        key: what the journal calls its answer. sample: hash of the sample, for pairing.
        tokens: of the prompt. dropped: tokens that truncation took.
    """

    id: str
    task: str
    length: int
    index: int
    key: str
    sample: str
    tokens: int
    dropped: int = 0


@dataclass(frozen=True)
class Skipped:
    """One sample that is not asked, and why."""

    id: str
    task: str
    length: int
    index: int
    reason: str


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: a tree of prompts, or one batch without a shared prefix."""

    key: str
    length: int
    node: Node
    tokens: int


# A model that reads token by token onto a state may do so for a question, not for a document.
SHORT_TAIL = 256


class Plan:
    """All questions of a run, and the units in which they are asked."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        lengths: Sequence[int],
        samples: int,
        writer: Any,
        target: Target,
        settings: Settings,
        *,
        batch: int | None = None,
        share: bool = True,
    ) -> None:
        """tasks: by name, in the order of the report.

        batch: rows read together at most. share: read common prefixes once.

        Raises InputError: a task none of whose samples can be asked, with the reason.
        """
        check("samples", samples, COUNT)
        if batch is not None:
            check("batch", batch, COUNT)
        self.tasks, self.lengths, self.samples = dict(tasks), tuple(lengths), samples
        self.writer, self.target, self.settings = writer, target, settings
        self._batch, self._share = batch, share
        common = {"weights": target.weights, "code": code_fingerprint(), **asdict(settings)}
        common["frame"] = [list(target.frame.before), list(target.frame.after)]
        self._common = digest(common)
        self.questions: dict[str, Question] = {}
        self.skipped: list[Skipped] = []
        self.units: list[Unit] = []
        self._made = lru_cache(maxsize=batch or target.rows)(self._make)
        for length in sorted(lengths, reverse=True):
            hashes = self._plan_length(length)
            self.units += self._units(length, hashes)
        self._refuse_hopeless()

    def _plan_length(self, length: int) -> dict[str, Hashes]:
        hashes = {}
        for name, task in self.tasks.items():
            for index in range(self.samples):
                label = f"{name}-{length}-{index}"
                try:
                    sample, ids, dropped = self._made(name, length, index)
                except InputError as error:
                    self.skipped.append(Skipped(label, name, length, index, str(error)))
                    continue
                limit = (task.answer_tokens, list(task.stop))
                sha = hashlib.sha256(sample.text.encode("utf-8", "surrogatepass"))
                if not self.target.remote:
                    sha = hashlib.sha256(ids.astype("<i8").tobytes())
                key = digest([self._common, label, sha.hexdigest(), sample.answers, limit])
                self.questions[label] = Question(
                    label, name, length, index, key, sample.sha256, len(ids), dropped
                )
                hashes[label] = prefix_hashes(ids)
        return hashes

    def _make(self, name: str, length: int, index: int) -> tuple[Sample, Ids, int]:
        """A sample, its prompt as it is read, and how many tokens truncation took."""
        task, frame = self.tasks[name], self.target.frame
        sample = task.sample(self.writer, length - frame.added, index)
        limit, ids = self.target.max_length, sample.ids
        room = None if limit is None else limit - task.answer_tokens - frame.added
        if room is None or len(ids) <= room:
            return sample, frame.around(ids), 0
        if self.settings.truncate is None or room < 1:
            raise InputError(f"{length} tokens are more than the {limit} of the model")
        return sample, frame.around(cut(ids, room, self.settings.truncate)), len(ids) - room

    def _units(self, length: int, hashes: Mapping[str, Hashes]) -> Iterator[Unit]:
        if self.target.remote or not self._share:
            root = Node(0, sorted(hashes))
        else:
            root = prefix_tree(hashes, length, None if self.target.continues else SHORT_TAIL)
        nodes = [*root.children, *(Node(0, batch) for batch in self.batches(root.leaves))]
        sizes = {label: self.questions[label].tokens for label in hashes}
        for node in nodes:
            members = sorted(self.questions[label].key for label in node.members())
            yield Unit(digest(members), length, node, node.tokens(sizes))

    def batches(self, labels: Sequence[str]) -> list[list[str]]:
        """Questions that are answered together, in order: prompts of equal length, none padded."""
        by_length: dict[int, list[str]] = {}
        for label in labels:
            by_length.setdefault(self.questions[label].tokens, []).append(label)
        found = []
        for tokens, group in sorted(by_length.items()):
            rows = 1 if self.target.remote else self.rows(tokens)
            found += [group[start : start + rows] for start in range(0, len(group), rows)]
        return found

    def rows(self, tokens: int) -> int:
        """How many prompts of so many tokens are read together at most."""
        return self._batch or max(1, min(self.target.rows, BATCH_TOKENS // max(1, tokens)))

    def sample(self, question: Question) -> Sample:
        """The sample behind a question. Raises InputError when a task makes another one now."""
        sample, _, _ = self._made(question.task, question.length, question.index)
        if sample.sha256 != question.sample:
            raise InputError(
                f"task {question.task} made another sample {question.id} the second time: it "
                "depends on something beside the seed, the length and the index"
            )
        return sample

    def ids(self, question: Question) -> Ids:
        """The prompt as the model reads it, int64 [T]."""
        self.sample(question)
        return self._made(question.task, question.length, question.index)[1]

    def text(self, question: Question) -> str:
        """The prompt as text, truncated like its tokens."""
        sample, ids, dropped = self._made(question.task, question.length, question.index)
        if not dropped:
            return sample.text
        assert self.target.tokenizer is not None
        return self.target.tokenizer.decode(ids.tolist())

    def score(self, question: Question, answer: str) -> float:
        """0 to 1 for an answer. Raises InputError when the task gives anything else."""
        score = float(self.tasks[question.task].score(answer, self.sample(question)))
        if not 0.0 <= score <= 1.0:
            raise InputError(f"task {question.task} gave a score of {score}, not 0 to 1")
        return round(score, 6)

    def limit(self, question: Question) -> Limit:
        """Where its answer ends."""
        task = self.tasks[question.task]
        return Limit(task.answer_tokens, tuple(task.stop))

    def row(self, question: Question, status: str, **more: Any) -> dict[str, Any]:
        """What the journal holds of an answer: all that the report will say of this sample."""
        sample = self.sample(question)
        return {
            "key": question.key,
            "kind": "sample",
            "id": question.id,
            "task": question.task,
            "length": question.length,
            "index": question.index,
            "status": status,
            "score": 0.0,
            "answer": "",
            "expected": list(sample.answers),
            "about": dict(sample.about),
            "prompt": question.sample,
            "prompt_tokens": question.tokens,
            "answer_tokens": 0,
            "tokens": [],
            "truncated": question.dropped,
            **more,
        }

    def tokens_shared(self) -> int:
        """Prompt tokens to read, common prefixes once."""
        return sum(unit.tokens for unit in self.units)

    def tokens_alone(self) -> int:
        """Prompt tokens when every prompt is read from its start."""
        return sum(question.tokens for question in self.questions.values())

    def manifest(self) -> str:
        """Hash of everything that is asked, whatever the model: equal for comparable runs."""
        return digest([[q.id, q.sample] for q in sorted_questions(self.questions.values())])

    def _refuse_hopeless(self) -> None:
        """A task of which nothing can be asked is a mistake in the command, not a result."""
        asked = {question.task for question in self.questions.values()}
        for name in self.tasks:
            if name not in asked:
                reason = next(s.reason for s in self.skipped if s.task == name)
                raise InputError(f"task {name} cannot be asked at any of these lengths: {reason}")


def sorted_questions(questions: Any) -> list[Question]:
    """By task, length and index."""
    return sorted(questions, key=lambda q: (q.task, q.length, q.index))


def cut(ids: Ids, room: int, how: str) -> Ids:
    """The last `room` tokens ("left" is dropped), or the first and last halves ("middle" is)."""
    head = room // 2 if how == "middle" else 0
    return np.concatenate([ids[:head], ids[len(ids) - (room - head) :]])
