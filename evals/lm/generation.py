"""Greedy generation until a stop string, for lm-eval's generate_until requests.

Axes: B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rwkvx_evals.generate import Limit, generate
from rwkvx_evals.interface import is_out_of_memory
from rwkvx_evals.journal import Row
from rwkvx_evals.lm.requests import BATCH_TOKENS, Ids
from rwkvx_evals.lm.scoring import Scorer
from rwkvx_evals.models.own import OwnModel
from rwkvx_evals.models.reader import read_prompt


@dataclass(frozen=True)
class Prompt:
    """Continue `context` greedily up to `limit` tokens, a stop string, or the end of document."""

    context: Ids
    until: tuple[str, ...]
    limit: int


@dataclass(frozen=True)
class Text:
    """What was generated, without the stop string; status as in `Score`."""

    text: str
    status: str = "ok"


def prompt_key(identity: str, prompt: Prompt) -> str:
    """What the journal calls an answer to this prompt."""
    text = f"generate|{identity}|{prompt.context}|{prompt.until!r}|{prompt.limit}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Generator:
    """Generates for many prompts; shares model, journal and progress with a `Scorer`."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.model = scorer, scorer.model

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Answers in the order of `prompts`; equal prompts are computed once."""
        unique = list(dict.fromkeys(prompts))
        by_length: dict[int, list[Prompt]] = {}
        for prompt in unique:
            by_length.setdefault(len(prompt.context), []).append(prompt)
        answers = {prompt: self._recall(prompt) for prompt in unique}
        batches = []
        for length, group in sorted(by_length.items(), reverse=True):
            size = max(1, min(self.scorer.batch, BATCH_TOKENS // length))
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        missing = [batch for batch in batches if any(answers[p] is None for p in batch)]
        advance = self.scorer.progress(sum(len(p.context) for b in missing for p in b))
        for batch in missing:
            found = self._batch(batch)
            rows = [self._row(p, t) for p, t in zip(batch, found, strict=True)]
            if self.scorer.journal is not None:
                fresh = [r for r, p in zip(rows, batch, strict=True) if answers[p] is None]
                self.scorer.journal.append(fresh)
            answers.update(zip(batch, found, strict=True))
            advance(sum(len(prompt.context) for prompt in batch))
        texts = [answers[prompt] for prompt in prompts]
        assert all(text is not None for text in texts)
        return [text for text in texts if text is not None]

    def _recall(self, prompt: Prompt) -> Text | None:
        journal = self.scorer.journal
        row = journal.rows.get(prompt_key(self.scorer.identity, prompt)) if journal else None
        if row is None or row["status"] == "oom":
            return None
        return Text(row["text"], row["status"])

    def _row(self, prompt: Prompt, text: Text) -> Row:
        return {
            "kind": "generate",
            "status": text.status,
            "text": text.text,
            "context_tokens": len(prompt.context),
            "key": prompt_key(self.scorer.identity, prompt),
        }

    def _batch(self, prompts: Sequence[Prompt]) -> list[Text]:
        try:
            return self._compute(prompts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(prompts) == 1:
            return [Text("", "oom")]
        half = len(prompts) // 2
        return self._batch(prompts[:half]) + self._batch(prompts[half:])

    def _compute(self, prompts: Sequence[Prompt]) -> list[Text]:
        """One batch of prompts with contexts of equal length."""
        model = OwnModel(self.model, tools=self.scorer.tools)
        ids_BT = torch.tensor([p.context for p in prompts]).to(model.device)
        logits_B1V, state = read_prompt(model, ids_BT, None, "last")
        assert logits_B1V is not None
        limits = [Limit(p.limit, p.until) for p in prompts]
        found = generate(model, logits_B1V, state, limits)
        return [Text(a.text if a.status == "ok" else "", a.status) for a in found]
