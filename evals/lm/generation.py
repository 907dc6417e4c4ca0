"""Greedy generation until a stop string, for lm-eval's generate_until requests.

Axes: B batch rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rwkvx.decoding import start
from rwkvx_evals.interface import device_of, is_out_of_memory, read_tokens
from rwkvx_evals.journal import Row
from rwkvx_evals.lm.requests import BATCH_TOKENS, Ids
from rwkvx_evals.lm.scoring import PIECE_TOKENS, Scorer


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


def cut_at(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def prompt_key(identity: str, prompt: Prompt) -> str:
    """What the journal calls an answer to this prompt."""
    text = f"generate|{identity}|{prompt.context}|{prompt.until!r}|{prompt.limit}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Generator:
    """Generates for many prompts; shares model, journal and progress with a `Scorer`."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.model = scorer, scorer.model
        self.tokenizer = scorer.model.tokenizer

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
        ids_BT = torch.tensor([p.context for p in prompts]).to(device_of(self.model))
        piece = max(1, PIECE_TOKENS // len(prompts))
        logits_B1V, state = read_tokens(self.model, ids_BT, None, logits="last", piece=piece)
        decoder = start(self.model, state, max(p.limit for p in prompts))
        tokens: list[list[int]] = [[] for _ in prompts]
        texts: list[Text | None] = [None] * len(prompts)
        assert logits_B1V is not None
        while True:
            row_logits = logits_B1V[:, -1].float()
            finite = torch.isfinite(row_logits).all(dim=-1).tolist()
            chosen = row_logits.argmax(dim=-1)
            for row, prompt in enumerate(prompts):
                if texts[row] is None:
                    texts[row] = self._extend(prompt, tokens[row], int(chosen[row]), finite[row])
            if all(text is not None for text in texts):
                return [text for text in texts if text is not None]
            logits_B1V = decoder.step(chosen[:, None])

    def _extend(self, prompt: Prompt, tokens: list[int], token: int, finite: bool) -> Text | None:
        """Adds one token to a row; returns its text once it is complete."""
        if not finite:
            return Text("", "invalid")
        ended = token == self.tokenizer.eos_token_id
        if not ended:
            tokens.append(token)
        text, stopped = cut_at(self.tokenizer.decode(tokens), prompt.until)
        if ended or stopped or len(tokens) >= prompt.limit:
            return Text(text)
        return None
