"""Generation until a stop string, for lm-eval's generate_until requests.

Axes: B batch rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvx.decoding import start
from rwkvx.sampling import pick_token
from rwkvx_evals.interface import (
    LanguageModel,
    State,
    Tokenizer,
    device_of,
    is_out_of_memory,
    read_tokens,
)
from rwkvx_evals.journal import Row
from rwkvx_evals.lm.answers import Text, text_of
from rwkvx_evals.lm.options import Options
from rwkvx_evals.lm.requests import BATCH_TOKENS, Ids
from rwkvx_evals.lm.scoring import PIECE_TOKENS, Scorer


@dataclass(frozen=True)
class Prompt:
    """Continue `context`. draw: which of several draws of the same prompt, 0 where greedy."""

    context: Ids
    options: Options
    draw: int = 0


def cut_at(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Continuation:
    """One row of a batch while it is generated; complete once `text` is there."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, seed: int) -> None:
        """seed: decides what is drawn, whatever else is in the batch."""
        self.text: Text | None = None
        self._options, self._tokenizer = prompt.options, tokenizer
        self._tokens: list[int] = []
        self._generator = torch.Generator().manual_seed(seed)

    def pick(self, logits_V: Tensor, largest: int) -> int:
        """The next token: `largest`, or drawn from the float32 logits."""
        options = self._options
        if options.temperature == 0.0:
            return largest
        if 0 < options.top_k < len(logits_V):
            least = logits_V.topk(options.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
        return pick_token(logits_V, options.temperature, options.top_p, self._generator)

    def take(self, token: int) -> None:
        """Adds a token, or ends at it."""
        ended = token == self._tokenizer.eos_token_id
        if not ended:
            self._tokens.append(token)
        text, stopped = cut_at(self._tokenizer.decode(self._tokens), self._options.until)
        if ended or stopped or len(self._tokens) >= self._options.limit:
            self.text = Text(text)


def continue_rows(
    model: LanguageModel, logits_B1V: Tensor, state: State, rows: Sequence[Continuation], room: int
) -> None:
    """Generates every row of a batch to its end: the token loop, and all that it needs.

    logits_B1V, state: after the prompts. room: tokens of the longest row.
    """
    decoder = start(model, state, room)
    while True:
        logits_BV = logits_B1V[:, -1].float()
        finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
        ids = logits_BV.argmax(dim=-1).tolist()
        for index, row in enumerate(rows):
            if row.text is not None:
                continue
            if not finite[index]:
                row.text = Text("", "invalid")
                continue
            ids[index] = row.pick(logits_BV[index], ids[index])
            row.take(ids[index])
        if all(row.text is not None for row in rows):
            return
        logits_B1V = decoder.step(torch.tensor(ids, device=logits_BV.device)[:, None])


class Generator:
    """Generates for many prompts; shares model, journal and progress with a `Scorer`."""

    def __init__(self, scorer: Scorer, seed: int) -> None:
        """seed: of all draws; each prompt and draw has its own from it."""
        self.scorer, self.model, self.seed = scorer, scorer.model, seed
        self.tokenizer = scorer.model.tokenizer

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
        ids_BT = torch.tensor([p.context for p in prompts]).to(device_of(self.model))
        piece = max(1, PIECE_TOKENS // len(prompts))
        logits_B1V, state = read_tokens(self.model, ids_BT, None, logits="last", piece=piece)
        assert logits_B1V is not None
        # Of the key's hash: 60 bits, whatever else is in the batch.
        rows = [Continuation(p, self.tokenizer, int(self.key(p)[:15], 16)) for p in prompts]
        room = max(p.options.limit for p in prompts)
        continue_rows(self.model, logits_B1V, state, rows, room)
        return [row.text for row in rows if row.text is not None]
