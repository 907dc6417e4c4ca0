"""Generation until a stop string, for lm-eval's generate_until requests.

Axes: B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvx.errors import is_out_of_memory
from rwkvx.sampling import pick_token
from rwkvx_evals.generate import Draw, Limit, generate
from rwkvx_evals.journal import Row
from rwkvx_evals.lm.answers import Text, text_of
from rwkvx_evals.lm.options import Options
from rwkvx_evals.lm.requests import BATCH_TOKENS, Ids
from rwkvx_evals.lm.scoring import Scorer
from rwkvx_evals.models.own import OwnModel
from rwkvx_evals.models.reader import read_prompt


@dataclass(frozen=True)
class Prompt:
    """Continue `context`. draw: which of several draws of the same prompt, 0 where greedy."""

    context: Ids
    options: Options
    draw: int = 0


def drawing(options: Options, seed: int) -> Draw | None:
    """How the tokens of one row are drawn; None where the most likely ones are taken.

    seed: decides what is drawn, whatever else is in the batch.
    """
    if options.temperature == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)

    def draw(logits_V: Tensor) -> int:
        # -inf is a logit of tokens that are never drawn (see `is_finite`).
        logits_V = logits_V.clamp_min(torch.finfo(logits_V.dtype).min)
        how = options.temperature, options.top_p, generator, options.top_k
        return pick_token(logits_V, *how)

    return draw


class Generator:
    """Generates for many prompts; shares model, journal and progress with a `Scorer`."""

    def __init__(self, scorer: Scorer, seed: int) -> None:
        """seed: of all draws; each prompt and draw has its own from it."""
        self.scorer, self.seed = scorer, seed
        self.model = OwnModel(scorer.model, tools=scorer.tools)

    def key(self, prompt: Prompt) -> str:
        """What the journal calls an answer to this prompt."""
        options = prompt.options
        drawn = f"|{self.seed}|{prompt.draw}" if options.temperature else ""
        text = f"generate|{self.scorer.identity}|{prompt.context}|{options!r}{drawn}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Answers in the order of `prompts`; equal prompts are computed once."""
        unique = list(dict.fromkeys(prompts))
        answers = {prompt: self._recall(prompt) for prompt in unique}
        by_length: dict[int, list[Prompt]] = {}
        for prompt in unique:
            if prompt.options.limit > 0:
                by_length.setdefault(len(prompt.context), []).append(prompt)
            else:
                answers[prompt] = Text("")
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
        return text_of(journal.rows.get(self.key(prompt))) if journal is not None else None

    def _row(self, prompt: Prompt, text: Text) -> Row:
        return {
            "kind": "generate",
            "status": text.status,
            "text": text.text,
            "context_tokens": len(prompt.context),
            "key": self.key(prompt),
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
        ids_BT = torch.tensor([p.context for p in prompts]).to(self.model.device)
        logits_B1V, state = read_prompt(self.model, ids_BT, None, "last")
        assert logits_B1V is not None
        found = generate(self.model, logits_B1V, state, [self._limit(p) for p in prompts])
        return [Text(a.text if a.status == "ok" else "", a.status) for a in found]

    def _limit(self, prompt: Prompt) -> Limit:
        options = prompt.options
        # Of the key's hash: 60 bits, whatever else is in the batch.
        seed = int(self.key(prompt)[:15], 16)
        return Limit(options.limit, options.until, drawing(options, seed))
