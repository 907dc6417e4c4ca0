"""Log-likelihoods of many requests: shared contexts once, logits only where they are scored.

Axes: U units (prefixes) of a batch, R branches of a part, T tokens, V vocabulary, S scored tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rwkvx.errors import is_out_of_memory
from rwkvx_evals.interface import (
    Advance,
    LanguageModel,
    State,
    StateTools,
    device_of,
)
from rwkvx_evals.journal import Journal, Row
from rwkvx_evals.lm.answers import Score, score_of
from rwkvx_evals.lm.requests import Branch, Request, Unit, make_batches, make_units, request_bytes
from rwkvx_evals.models.own import OwnModel
from rwkvx_evals.models.reader import read_prompt

# Logits of one forward call may take this many bytes in float32.
LOGITS_BYTES = 256_000_000


@dataclass
class _Sum:
    """What is known of one branch while its tail is read."""

    logprob: float = 0.0
    greedy: bool = True
    valid: bool = True

    def add(self, logprob: float, greedy: bool, finite: bool) -> None:
        self.logprob += logprob
        self.greedy = self.greedy and greedy
        self.valid = self.valid and finite

    def score(self) -> Score:
        if not self.valid:
            return Score(None, False, "invalid")
        return Score(self.logprob, self.greedy)


def _no_advance(tokens: int) -> None:
    return None


@dataclass
class Scorer:
    """Answers requests, through a journal when there is one.

    identity: hash of everything besides the request that decides an answer.
    """

    model: LanguageModel
    vocab_size: int
    batch: int = 64
    tools: StateTools = field(default_factory=StateTools)
    journal: Journal | None = None
    identity: str = ""
    progress: Callable[[int], Advance] = lambda total: _no_advance

    def key(self, request: Request) -> str:
        """What the journal calls an answer to this request."""
        head = f"loglikelihood|{self.identity}|".encode()
        return hashlib.sha256(head + request_bytes(request)).hexdigest()

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Answers in the order of `requests`; equal requests are computed once."""
        unique = list(dict.fromkeys(requests))
        keys = [self.key(request) for request in unique]
        answers = [self._recall(key) for key in keys]
        batches = make_batches(make_units(unique), self.batch)
        missing = [
            batch
            for batch in batches
            if any(answers[branch.index] is None for unit in batch for branch in unit.branches)
        ]
        advance = self.progress(sum(unit.tokens for batch in missing for unit in batch))
        for batch in missing:
            found = self._batch(batch, advance)
            self._store([self._row(keys[i], unique[i], s) for i, s in sorted(found.items())])
            for index, score in found.items():
                answers[index] = score
        by_request = dict(zip(unique, answers, strict=True))
        done = [by_request[request] for request in requests]
        assert all(score is not None for score in done)
        return [score for score in done if score is not None]

    def _recall(self, key: str) -> Score | None:
        return score_of(self.journal.rows.get(key)) if self.journal is not None else None

    def _store(self, rows: Sequence[Row]) -> None:
        if self.journal is not None:
            self.journal.append(row for row in rows if self._recall(row["key"]) is None)

    @staticmethod
    def _row(key: str, request: Request, score: Score) -> Row:
        return {
            "kind": "loglikelihood",
            "status": score.status,
            "logprob": score.logprob,
            "greedy": score.greedy,
            "context_tokens": len(request.context),
            "continuation_tokens": len(request.continuation),
            "key": key,
        }

    def _batch(self, units: Sequence[Unit], advance: Advance) -> dict[int, Score]:
        """Scores by request index; halves the batch when memory runs out."""
        read = 0

        def count(tokens: int) -> None:
            nonlocal read
            read += tokens
            advance(tokens)

        try:
            return self._compute(units, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            advance(-read)
        if len(units) == 1:
            return {branch.index: Score(None, False, "oom") for branch in units[0].branches}
        half = len(units) // 2
        return self._batch(units[:half], advance) | self._batch(units[half:], advance)

    def _compute(self, units: Sequence[Unit], advance: Advance) -> dict[int, Score]:
        branches = [(row, branch) for row, unit in enumerate(units) for branch in unit.branches]
        sums = {branch.index: _Sum() for _, branch in branches}
        state: State = None
        if units[0].prefix:
            state = self._read_prefix(units, branches, sums, advance)
        fed = sorted((b for b in branches if b[1].tail), key=lambda b: (len(b[1].tail), b[0]))
        for start in range(0, len(fed), self.batch):
            part = fed[start : start + self.batch]
            rows = torch.tensor([row for row, _ in part])
            fork = None
            if state is not None:
                whole = len(part) == len(units) and rows.tolist() == list(range(len(units)))
                fork = state if whole else self.tools.select(state, rows)
            self._read_tails([branch for _, branch in part], fork, sums)
            advance(sum(len(branch.tail) for _, branch in part))
        return {index: found.score() for index, found in sums.items()}

    def _read_prefix(
        self,
        units: Sequence[Unit],
        branches: Sequence[tuple[int, Branch]],
        sums: dict[int, _Sum],
        advance: Advance,
    ) -> State:
        """Reads the prefixes `[U, T]` and scores the targets that they predict."""
        ids_UT = torch.tensor([unit.prefix for unit in units]).to(device_of(self.model))
        wanted = branches[0][1].from_prefix
        own = OwnModel(self.model, tools=self.tools)
        last = "last" if wanted else "none"
        logits_U1V, state = read_prompt(own, ids_UT, None, last, advance)
        if logits_U1V is not None:
            rows = [row for row, _ in branches]
            scored_SV = logits_U1V[torch.tensor(rows), 0]
            targets = [branch.targets[0] for _, branch in branches]
            _add(scored_SV, targets, [sums[branch.index] for _, branch in branches])
        return state

    def _read_tails(self, branches: Sequence[Branch], state: State, sums: dict[int, _Sum]) -> None:
        """Reads tails, padded on the right, in parts whose logits fit into memory."""
        longest = max(len(branch.tail) for branch in branches)
        ids_RT = torch.zeros(len(branches), longest, dtype=torch.int64)
        for row, branch in enumerate(branches):
            ids_RT[row, : len(branch.tail)] = torch.tensor(branch.tail)
        ids_RT = ids_RT.to(device_of(self.model))
        width = max(1, LOGITS_BYTES // (4 * self.vocab_size * len(branches)))
        # No logits for the columns that only hold context.
        first = min(_first_scored(branch) for branch in branches)
        if first > 0:
            _, state = self.model(ids_RT[:, :first], state=state, logits="none")
        for start in range(first, longest, width):
            part = ids_RT[:, start : start + width]
            logits_RTV, state = self.model(part, state=state, logits="all")
            assert logits_RTV is not None
            self._score_columns(branches, logits_RTV, start, sums)

    @staticmethod
    def _score_columns(
        branches: Sequence[Branch], logits_RTV: Tensor, start: int, sums: dict[int, _Sum]
    ) -> None:
        """Scores the targets predicted by columns `start` … of the tails."""
        rows, columns, targets, owners = [], [], [], []
        for row, branch in enumerate(branches):
            scored = branch.targets[1:] if branch.from_prefix else branch.targets
            offset = _first_scored(branch)
            low = max(offset, start)
            high = min(len(branch.tail), start + logits_RTV.shape[1])
            for column in range(low, high):
                rows.append(row)
                columns.append(column - start)
                targets.append(scored[column - offset])
                owners.append(sums[branch.index])
        if rows:
            _add(logits_RTV[torch.tensor(rows), torch.tensor(columns)], targets, owners)


def _first_scored(branch: Branch) -> int:
    """The column of a tail whose logits predict its first scored target."""
    return len(branch.tail) - len(branch.targets) + branch.from_prefix


def _add(logits_SV: Tensor, targets: Sequence[int], owners: Sequence[_Sum]) -> None:
    """Adds the float32 log-probability of each target to its owner."""
    logits_SV = logits_SV.float()
    wanted_S1 = torch.tensor(targets, device=logits_SV.device)[:, None]
    finite = torch.isfinite(logits_SV).all(dim=-1).tolist()
    greedy = (logits_SV.argmax(dim=-1) == wanted_S1[:, 0]).tolist()
    logprobs = logits_SV.log_softmax(dim=-1).gather(1, wanted_S1)[:, 0].double().tolist()
    for owner, logprob, is_greedy, is_finite in zip(owners, logprobs, greedy, finite, strict=True):
        owner.add(logprob, is_greedy, is_finite)
