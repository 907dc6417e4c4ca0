"""Asks the units of a plan: reads each shared prefix once, forks its state, answers, records.

Axes: B samples asked together, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkvx.errors import InputError
from rwkvx_evals.generate import Answer, generate
from rwkvx_evals.interface import Advance, is_out_of_memory
from rwkvx_evals.long.plan import Plan, Question, Unit
from rwkvx_evals.long.prefixes import Node
from rwkvx_evals.long.shards import SharedJournal
from rwkvx_evals.long.task import Ids
from rwkvx_evals.models.reader import Reader, State, read_prompt


class Engine:
    """Answers what the journal lacks."""

    def __init__(
        self, model: Reader, plan: Plan, journal: SharedJournal, advance: Advance | None = None
    ) -> None:
        """advance: told the number of prompt tokens as they are read."""
        self.model, self.plan, self.journal = model, plan, journal
        self.read = self.generated = 0
        self._advance = advance or (lambda tokens: None)
        # What did not fit among the states of others is asked again alone.
        self._left: list[str] = []

    def is_done(self, label: str) -> bool:
        """Whether this question needs nothing more in this run."""
        return self.journal.is_done(self.plan.questions[label].key)

    def missing(self, node: Node) -> list[str]:
        """The questions below a prefix that still lack an answer."""
        return [label for label in node.members() if not self.is_done(label)]

    @torch.inference_mode()
    def ask(self, unit: Unit) -> None:
        """Answers one unit. Raises InputError when the disk is full."""
        self._left = []
        if unit.node.depth:
            state, fits = self._read_on(unit.node, None, 0)
            if fits:
                self._ask_below(unit.node, state)
            state = None
        else:
            self._ask_leaves(unit.node, None)
        for label in self._left:
            if not self._ask_batch([label], None, 0):
                self._record([self.plan.row(self.plan.questions[label], "oom")])

    def _ask_below(self, node: Node, state: State) -> None:
        """Asks everything that begins with this prefix, whose state is used up."""
        self._ask_leaves(node, state)
        children = [child for child in node.children if self.missing(child)]
        for child in children:
            last = child is children[-1]
            with nullcontext(state) if last else self.model.branch(state, 1) as fork:
                if last:
                    state = None  # the fork alone holds it, and goes on in its place
                fork, fits = self._read_on(child, fork, node.depth)
                if fits:
                    self._ask_below(child, fork)
                fork = None

    def _read_on(self, node: Node, state: State, start: int) -> tuple[State, bool]:
        """Reads from `start` to the node's depth; False when memory ran out."""
        ids_T = self._ids(self.missing(node)[0], node)[start : node.depth]
        if state is None:
            longest = max(self.plan.questions[label].tokens for label in node.members())
            state = self.model.start(1, longest)
        found, fits = self._try(lambda advance: self._read(ids_T[None], state, "none", advance)[1])
        if not fits:
            self._left += self.missing(node)
        return found, fits

    def _ask_leaves(self, node: Node, state: State) -> None:
        for labels in self.plan.batches(node.leaves):
            # A batch with any answer missing is computed whole: the same rows together round the
            # same way in a run that was killed and one that was not.
            if all(self.is_done(label) for label in labels):
                continue
            if not self._ask_batch(labels, state, node.depth):
                self._left += [label for label in labels if not self.is_done(label)]

    def _ask_batch(self, labels: Sequence[str], state: State, start: int) -> bool:
        """Answers a batch, in halves where memory runs out; False where one does not fit."""
        answers, fits = self._try(lambda advance: self._answers(labels, state, start, advance))
        if fits:
            self._record(
                [self._judge(self.plan.questions[label], answer)
                 for label, answer in zip(labels, answers, strict=True)
                 if not self.is_done(label)]
            )  # fmt: skip
            return True
        if len(labels) == 1:
            return False
        half = len(labels) // 2
        parts = [self._ask_batch(part, state, start) for part in (labels[:half], labels[half:])]
        return all(parts)

    def _answers(
        self, labels: Sequence[str], state: State, start: int, advance: Advance
    ) -> list[Answer]:
        """One batch: prompts of equal length that share their first `start` tokens."""
        ids_BT = np.stack([self.plan.ids(self.plan.questions[label]) for label in labels])
        limits = [self.plan.limit(self.plan.questions[label]) for label in labels]
        assert (ids_BT[:, :start] == ids_BT[:1, :start]).all(), "prompts of one node differ"
        if state is None:
            room = ids_BT.shape[1] + max(limit.tokens for limit in limits)
            fork: Any = nullcontext(self.model.start(len(labels), room))
        else:
            fork = self.model.branch(state, len(labels))
        with fork as own:
            logits_B1V, own = self._read(ids_BT[:, start:], own, "last", advance)
            assert logits_B1V is not None
            answers = generate(self.model, logits_B1V, own, limits)
        self.generated += sum(len(answer.tokens) for answer in answers)
        return answers

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
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None, False

    def _ids(self, label: str, node: Node) -> Ids:
        """The prompt of a question, which must begin like those of its node."""
        ids = self.plan.ids(self.plan.questions[label])
        if len(ids) <= node.depth:
            raise InputError(f"sample {label} became shorter than what it shares")
        return ids

    def _judge(self, question: Question, answer: Answer) -> dict[str, Any]:
        if answer.status != "ok":
            return self.plan.row(question, answer.status, answer=answer.text)
        task = self.plan.tasks[question.task]
        score = float(task.score(answer.text, self.plan.sample(question)))
        if not 0.0 <= score <= 1.0:
            raise InputError(f"task {question.task} gave a score of {score}, not 0 to 1")
        return self.plan.row(
            question,
            "ok",
            score=round(score, 6),
            answer=answer.text,
            answer_tokens=len(answer.tokens),
        )

    def _record(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self.journal.append([row])
