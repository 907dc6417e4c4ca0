"""Asks the questions of a plan at an endpoint, several at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rwkvx.progress import progress
from rwkvx_evals.long.plan import Plan, Question
from rwkvx_evals.long.shards import Claims, SharedJournal
from rwkvx_evals.long.work import PAUSE
from rwkvx_evals.models.endpoint import Endpoint, EndpointError


class RemoteRun:
    """Sends what the journal lacks; each answer, or the reason for none, is recorded at once."""

    def __init__(
        self,
        endpoint: Endpoint,
        plan: Plan,
        journal: SharedJournal,
        claims: Claims,
        *,
        concurrency: int,
        quiet: bool = False,
    ) -> None:
        self.endpoint, self.plan, self.journal, self.claims = endpoint, plan, journal, claims
        self.concurrency, self.quiet = concurrency, quiet

    def missing(self) -> list[Question]:
        """Questions without an answer, the longest first."""
        left = [q for q in self.plan.questions.values() if not self.journal.is_done(q.key)]
        return sorted(left, key=lambda q: -q.tokens)

    def run(self) -> None:
        """Until every question has an answer or a reason. Raises InputError on a full disk."""
        while questions := self.missing():
            total = sum(q.tokens for q in questions)
            with progress(total, "prompts", quiet=self.quiet) as bar:
                asked = asyncio.run(self._ask_all(questions, bar))
            self.journal.refresh()
            if not asked:  # other processes have claimed all that is left
                time.sleep(PAUSE)

    async def _ask_all(self, questions: Sequence[Question], bar: Any) -> int:
        """Asks what is not claimed; returns how many that were."""
        queue, asked = deque(questions), 0

        async def ask_some(client: Any) -> None:
            nonlocal asked
            while queue:
                question = queue.popleft()
                with self.claims.take(question.key) as ours:
                    if not ours:
                        continue
                    self.journal.refresh()
                    if not self.journal.is_done(question.key):
                        await self._ask(client, question)
                        asked += 1
                bar.update(question.tokens)

        async with self.endpoint.client() as client:
            await asyncio.gather(*(ask_some(client) for _ in range(self.concurrency)))
        return asked

    async def _ask(self, client: Any, question: Question) -> None:
        began = time.perf_counter()
        limit = self.plan.limit(question)
        try:
            found = await self.endpoint.complete(client, self.plan.text(question), limit)
        except EndpointError as error:
            row = self.plan.row(question, "error", reason=str(error))
        else:
            score = self.plan.score(question, found.text)
            row = self.plan.row(
                question, "ok", score=score, answer=found.text,
                answer_tokens=found.tokens or 0, logprob=found.logprob,
                endpoint_tokens=found.prompt_tokens,
            )  # fmt: skip
        self.journal.append([row, self._timing(question, row, time.perf_counter() - began)])

    def _timing(self, question: Question, row: dict[str, Any], seconds: float) -> dict[str, Any]:
        return {
            "key": f"unit-{question.key}-{self.journal.shard}",
            "kind": "unit",
            "length": question.length,
            "seconds": round(seconds, 3),
            "read": question.tokens,
            "generated": row.get("answer_tokens", 0),
            "peak_bytes": None,
            "device": self.endpoint.url,
        }
