"""Asks the units of a plan: reads each shared prefix once, forks its state, answers, records.

Axes: B samples asked together, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkvx.errors import is_out_of_memory
from rwkvx_evals.generate import Answer, Limit, generate
from rwkvx_evals.interface import Advance
from rwkvx_evals.long.plan import Plan, Unit
from rwkvx_evals.long.prefixes import Node
from rwkvx_evals.long.shards import SharedJournal
from rwkvx_evals.long.task import Ids
from rwkvx_evals.models.reader import Reader, State, read_prompt


@dataclass
class _Group:
    """Questions that are answered token by token together, wherever their prompts branch off.

    read: what has been read so far: labels, logits after them, state.
    """

    labels: list[str]
    read: list[tuple[list[str], Tensor, State]] = field(default_factory=list)

    def is_complete(self) -> bool:
        """Whether every prompt has been read."""
        return sum(len(labels) for labels, _, _ in self.read) == len(self.labels)


class Engine:
    """Answers what the journal lacks."""

    def __init__(
        self, model: Reader, plan: Plan, journal: SharedJournal, advance: Advance | None = None
    ) -> None:
        """advance: told the number of prompt tokens as they are read."""
        self.model, self.plan, self.journal = model, plan, journal
        self.read = self.generated = 0
        self._advance = advance or (lambda tokens: None)
        self._groups: dict[str, _Group] = {}
        # What did not fit among the states of others is asked again alone.
        self._left: list[str] = []

    def is_done(self, label: str) -> bool:
        """Whether this question needs nothing more in this run."""
        return self.journal.is_done(self.plan.questions[label].key)

    def _is_wanted(self, label: str) -> bool:
        """Whether its group lacks an answer.

        A group is computed whole: the same rows together round the same way in a run that was
        killed and in one that was not.
        """
        return label in self._groups

    @torch.inference_mode()
    def ask(self, unit: Unit) -> None:
        """Answers one unit. Raises InputError when the disk is full."""
        self._left, self._groups = [], {}
        for labels in self.plan.batches(unit.node.members()):
            if not all(self.is_done(label) for label in labels):
                self._groups |= dict.fromkeys(labels, _Group(labels))
        self._ask_below(Node(0, children=[unit.node]) if unit.node.depth else unit.node, None)
        for label in self._left:
            if not self.is_done(label) and not self._ask_now([label], None, 0):
                self._record([self.plan.row(self.plan.questions[label], "oom")])

    def _ask_below(self, node: Node, state: State) -> None:
        """Asks everything that begins with this prefix, whose state is used up."""
        while True:
            self._ask_leaves(node, state)
            children = [child for child in node.children if self._wanted(child)]
            for child in children[:-1]:
                with self.model.branch(state, 1) as fork:
                    fork = self._read_on(child, fork, node.depth)
                    if fork is not None:
                        self._ask_below(child, fork)
                    fork = None
            if not children:
                return
            # The last one goes on with the state itself, in this frame: nothing else holds it.
            state = self._read_on(children[-1], state, node.depth)
            if state is None:
                return
            node = children[-1]

    def _wanted(self, node: Node) -> list[str]:
        return [label for label in node.members() if self._is_wanted(label)]

    def _read_on(self, node: Node, state: State, start: int) -> State | None:
        """The state at the node's depth; None when memory ran out."""
        wanted = self._wanted(node)
        ids_T = self.plan.ids(self.plan.questions[wanted[0]])[start : node.depth]
        if state is None:
            state = self.model.start(1, max(self.plan.questions[label].tokens for label in wanted))
        found, fits = self._try(lambda advance: self._read(ids_T[None], state, "none", advance)[1])
        if not fits:
            self._left += wanted
        return found

    def _ask_leaves(self, node: Node, state: State) -> None:
        here: dict[int, list[str]] = {}
        for label in node.leaves:
            if self._is_wanted(label):
                here.setdefault(id(self._groups[label]), []).append(label)
        for labels in here.values():
            group = self._groups[labels[0]]
            if len(labels) == len(group.labels) or not self.model.joins:
                if not self._ask_now(labels, state, node.depth):
                    self._left += labels
            else:
                self._read_now(group, labels, state, node.depth)

    def _ask_now(self, labels: Sequence[str], state: State, start: int) -> bool:
        """Answers a batch, in halves where memory runs out; False where one does not fit."""
        answers, fits = self._try(lambda advance: self._answers(labels, state, start, advance))
        if fits:
            self._judge(labels, answers)
            return True
        if len(labels) == 1:
            return False
        half = len(labels) // 2
        parts = [self._ask_now(part, state, start) for part in (labels[:half], labels[half:])]
        return all(parts)

    def _read_now(self, group: _Group, labels: list[str], state: State, start: int) -> None:
        """Reads prompts to their ends; the last of a group makes all of it answer together."""

        def compute(advance: Advance) -> tuple[Tensor, State]:
            with self._branch(labels, state, keep=True) as fork:
                return self._read_tails(labels, fork, start, advance)

        found, fits = self._try(compute)
        if not fits:
            self._left += [label for read, _, _ in group.read for label in read] + labels
            group.read = []
            return
        group.read.append((labels, *found))
        if group.is_complete():
            self._answer_together(group)

    def _answer_together(self, group: _Group) -> None:
        read, group.read = group.read, []
        labels = [label for part, _, _ in read for label in part]

        def compute(_: Advance) -> list[Answer]:
            logits_B1V = torch.cat([logits for _, logits, _ in read])
            state = self.model.join([state for _, _, state in read])
            return generate(self.model, logits_B1V, state, self._limits(labels))

        answers, fits = self._try(compute)
        if fits:
            self._judge(labels, answers)
        else:
            self._left += labels

    def _limits(self, labels: Sequence[str]) -> list[Limit]:
        return [self.plan.limit(self.plan.questions[label]) for label in labels]

    def _answers(
        self, labels: Sequence[str], state: State, start: int, advance: Advance
    ) -> list[Answer]:
        """One batch: prompts of equal length that share their first `start` tokens."""
        with self._branch(labels, state, keep=False) as fork:
            logits_B1V, fork = self._read_tails(labels, fork, start, advance)
            return generate(self.model, logits_B1V, fork, self._limits(labels))

    def _branch(
        self, labels: Sequence[str], state: State, *, keep: bool
    ) -> AbstractContextManager[State]:
        """A state for so many rows: of a prefix, or before the first token."""
        if state is not None:
            return self.model.branch(state, len(labels), keep=keep)
        prompt = max(self.plan.questions[label].tokens for label in labels)
        answer = max(limit.tokens for limit in self._limits(labels))
        return nullcontext(self.model.start(len(labels), prompt + answer))

    def _read_tails(
        self, labels: Sequence[str], state: State, start: int, advance: Advance
    ) -> tuple[Tensor, State]:
        ids_BT = np.stack([self.plan.ids(self.plan.questions[label]) for label in labels])
        assert (ids_BT[:, :start] == ids_BT[:1, :start]).all(), "prompts of one node differ"
        logits_B1V, state = self._read(ids_BT[:, start:], state, "last", advance)
        assert logits_B1V is not None
        return logits_B1V, state

    def _read(
        self, ids_BT: Ids, state: State, logits: str, advance: Advance
    ) -> tuple[Tensor | None, State]:
        ids = torch.from_numpy(np.ascontiguousarray(ids_BT, dtype=np.int64)).to(self.model.device)
        return read_prompt(self.model, ids, state, logits, advance)

    def _try(self, compute: Callable[[Advance], Any]) -> tuple[Any, bool]:
        """What `compute` returns, and False in its place when memory ran out."""
        read = 0

        def advance(tokens: int) -> None:
            nonlocal read
            read += tokens
            self._advance(tokens)

        try:
            found = compute(advance)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.read += read
            return found, True
        # Outside of `except`: the error's traceback keeps every tensor of the call.
        self._advance(-read)
        if self.model.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return None, False

    def _judge(self, labels: Sequence[str], answers: Sequence[Answer]) -> None:
        self.generated += sum(len(answer.tokens) for answer in answers)
        pairs = zip(labels, answers, strict=True)
        self._record([self._row(label, a) for label, a in pairs if not self.is_done(label)])

    def _row(self, label: str, answer: Answer) -> dict[str, Any]:
        question = self.plan.questions[label]
        if answer.status != "ok":
            return self.plan.row(question, answer.status, answer=answer.text)
        return self.plan.row(
            question,
            "ok",
            score=self.plan.score(question, answer.text),
            answer=answer.text,
            answer_tokens=len(answer.tokens),
            tokens=list(answer.tokens),
        )

    def _record(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self.journal.append([row])
