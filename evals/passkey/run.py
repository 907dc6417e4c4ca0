"""Runs a passkey plan: reads each shared prefix once, forks its state, asks, and records.

Axes: B samples asked together, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkvx.decoding import start
from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx_evals.interface import (
    LanguageModel,
    State,
    StateTools,
    Tokenizer,
    device_of,
    is_out_of_memory,
    read_tokens,
)
from rwkvx_evals.journal import Journal, Row
from rwkvx_evals.passkey.plan import Group, Plan, Sample, cost_of, length_label

# Tokens (all rows together) between two updates of the progress bar.
PIECE_TOKENS = 16_384
# A batch may hold this much state: forks copy what they will append to.
CACHE_BYTES = 1_500_000_000
PROBE_TOKENS = (64, 320)


def read_answer(text: str) -> str | None:
    """The first run of digits in generated text, as written; None when there is none."""
    match = re.search(r"[0-9]+", text)
    return match[0] if match else None


def is_complete(text: str) -> bool:
    """Whether the first number in `text` has been ended by another character."""
    return re.search(r"[0-9][^0-9]", text) is not None


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "length": int, "depth": (int, float), "seed": int, "passkey": int, "status": str,
    "correct": bool, "answer": str,
}  # fmt: skip


def check_row(row: Row) -> None:
    """Raises ValueError, saying why, for a row of a journal that is not one of `PasskeyRun`'s."""
    for name, kind in _FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(f"its {name} is missing or of another kind")
    if row["status"] not in ("ok", "invalid", "oom"):
        raise ValueError("its status is none of ok, invalid, oom")


@dataclass
class Answer:
    """What the model generated for one sample, and whether its logits were finite."""

    tokens: list[int]
    text: str = ""
    valid: bool = True


@dataclass(frozen=True)
class Probe:
    """How a state grows and how fast tokens are read, measured on a short text."""

    fixed_bytes: float
    bytes_per_token: float
    tokens_per_second: float

    def rows_within(self, length: int, budget: int) -> int:
        """How many states of `length` tokens fit into `budget` bytes; at least one."""
        return max(1, int(budget // max(1.0, self.fixed_bytes + self.bytes_per_token * length)))


class PasskeyRun:
    """One run over a plan; the journal says what is already answered."""

    def __init__(
        self,
        model: LanguageModel,
        plan: Plan,
        journal: Journal,
        *,
        batch: int | None = None,
        tools: StateTools | None = None,
        cache_bytes: int = CACHE_BYTES,
        quiet: bool = False,
    ) -> None:
        """batch: samples asked together at most; None lets memory decide alone."""
        if batch is not None and batch < 1:
            raise InputError(f"batch {batch}: at least one is needed")
        self.model, self.plan, self.journal = model, plan, journal
        self.tools = tools or StateTools()
        self.tokenizer: Tokenizer = model.tokenizer
        self.device = device_of(model)
        self.tokens_read = 0
        self._batch, self._cache_bytes, self._quiet = batch, cache_bytes, quiet
        self._largest_batch = batch or plan.settings.seeds
        self._probe: Probe | None = None

    def is_finished(self, sample: Sample) -> bool:
        """Whether the journal holds an answer; a sample that ran out of memory is tried again."""
        row = self.journal.rows.get(sample.key)
        return row is not None and row["status"] != "oom"

    def wanted(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with at least one sample that is not finished."""
        return [g for g in groups if not all(self.is_finished(s) for s in g.samples)]

    def tokens_to_read(self) -> int:
        """Prompt tokens that are still to be read."""
        return sum(cost_of(groups, self.wanted(groups)) for groups in self.plan.groups.values())

    @torch.inference_mode()
    def probe(self) -> Probe:
        """State growth and speed on the first tokens of the filler, measured once."""
        if self._probe is not None:
            return self._probe
        short, long = PROBE_TOKENS
        ids = torch.from_numpy(self.plan.filler.take(0, long)).to(self.device)[None]
        _, state = self.model(ids[:, :short], state=None, logits="none")
        first = self.tools.bytes(state)
        began = time.perf_counter()
        _, state = self.model(ids[:, short:], state=state, logits="none")
        seconds = max(time.perf_counter() - began, 1e-9)
        second = self.tools.bytes(state)
        # A cache that grows by whole blocks may not have grown at all: spread what it holds then.
        slope = (second - first) / (long - short) if second > first else second / long
        self._probe = Probe(float(first), slope, (long - short) / seconds)
        return self._probe

    @torch.inference_mode()
    def run(self) -> None:
        """Answers everything that the journal lacks. Raises InputError when the disk is full."""
        total = self.tokens_to_read()
        if total == 0:
            return
        probe = self.probe()
        with progress(total, quiet=self._quiet) as bar:
            for length, groups in self.plan.groups.items():
                bar.set_description(f"passkey {length_label(length)}")
                rows = probe.rows_within(length, self._cache_bytes)
                self._largest_batch = min(rows, self._batch or self.plan.settings.seeds)
                self._run_length(groups, bar)

    def _run_length(self, groups: Sequence[Group], bar: Any) -> None:
        wanted = self.wanted(groups)
        room = groups[0].length + self.plan.settings.max_new_tokens
        state = self.tools.fresh(self.model, room)
        position = 0
        for group in groups:
            # A finished group is read through, never skipped over: the pieces that the prefix is
            # read in, and with them the rounding, are then the same in a resumed run.
            if not wanted or group.depth > wanted[-1].depth:
                break
            prefix = self.plan.builder.prefix(self.plan.filler, group.length, group.depth)
            part = torch.from_numpy(prefix[position:]).to(self.device)[None]
            state, fits = self._read_prefix(part, state, bar)
            if not fits:
                unread = [s for g in wanted if g.depth >= group.depth for s in g.samples]
                self._record([self._row(s, "oom") for s in unread if not self.is_finished(s)], bar)
                return
            position = group.prefix_length
            if group in wanted:
                self._ask(group, state, bar)

    def _read_prefix(self, part_BT: Tensor, state: State, bar: Any) -> tuple[State, bool]:
        """Reads on; returns the new state, and False when memory ran out."""
        if part_BT.shape[1] == 0:
            return state, True
        try:
            _, state = read_tokens(
                self.model, part_BT, state, logits="none", piece=PIECE_TOKENS, advance=bar.update
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None, False
        self.tokens_read += part_BT.numel()
        return state, True

    def _ask(self, group: Group, state: State, bar: Any) -> None:
        """Asks the samples of one group in batches; halves the batch when memory runs out."""
        todo = list(group.samples)
        size = self._largest_batch
        while todo:
            rows = todo[:size]
            if all(self.is_finished(sample) for sample in rows):
                bar.update(group.tail_length * len(rows))
                todo = todo[len(rows) :]
                continue
            answers = self._try_answers(group, rows, state, bar)
            if answers is None and len(rows) > 1:
                # Smaller for all that follows too: a longer prefix needs no less memory.
                size = self._largest_batch = len(rows) // 2
                continue
            if answers is None:
                done = [self._row(rows[0], "oom")]
            else:
                done = [self._judge(s, a) for s, a in zip(rows, answers, strict=True)]
            self._record([row for row in done if not self._has(row)], bar)
            todo = todo[len(rows) :]

    def _has(self, row: Row) -> bool:
        old = self.journal.rows.get(row["key"])
        return old is not None and old["status"] != "oom"

    def _try_answers(
        self, group: Group, samples: Sequence[Sample], state: State, bar: Any
    ) -> list[Answer] | None:
        """The answers of a batch, or None when memory ran out."""
        read = 0

        def advance(tokens: int) -> None:
            nonlocal read
            read += tokens
            bar.update(tokens)

        try:
            answers = self._answers(group, samples, state, advance)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            bar.update(-read)
            return None
        self.tokens_read += read
        return answers

    def _answers(
        self, group: Group, samples: Sequence[Sample], state: State, advance: Any
    ) -> list[Answer]:
        build, filler = self.plan.builder, self.plan.filler
        # The tails of one group have equal lengths, as prompt and prefix lengths are exact.
        tails = [build.tail(filler, group.length, group.depth, s.passkey) for s in samples]
        ids_BT = torch.stack([torch.from_numpy(tail) for tail in tails]).to(self.device)
        fork = self.tools.repeat(state, len(samples))
        piece = max(1, PIECE_TOKENS // len(samples))
        logits, fork = read_tokens(
            self.model, ids_BT, fork, logits="last", piece=piece, advance=advance
        )
        assert logits is not None
        return self._generate(logits, fork)

    def _generate(self, logits_B1V: Tensor, state: State) -> list[Answer]:
        """Greedy continuation of every row until its number has ended, or the limit is reached."""
        answers = [Answer([]) for _ in range(logits_B1V.shape[0])]
        pending = set(range(len(answers)))
        limit = self.plan.settings.max_new_tokens
        decoder = start(self.model, state, limit)
        for step in range(limit):
            row_logits = logits_B1V[:, -1].float()
            finite = torch.isfinite(row_logits).all(dim=-1).tolist()
            chosen = row_logits.argmax(dim=-1)
            for row in sorted(pending):
                if self._extend(answers[row], int(chosen[row]), finite[row]):
                    pending.discard(row)
            if not pending or step + 1 == limit:
                break
            logits_B1V = decoder.step(chosen[:, None])
        return answers

    def _extend(self, answer: Answer, token: int, finite: bool) -> bool:
        """Adds one token; returns whether the answer is complete."""
        if not finite:
            answer.valid = False
            return True
        if token == self.tokenizer.eos_token_id:
            return True
        answer.tokens.append(token)
        answer.text = self.tokenizer.decode(answer.tokens)
        return is_complete(answer.text)

    def _judge(self, sample: Sample, answer: Answer) -> Row:
        if not answer.valid:
            return self._row(sample, "invalid")
        correct = read_answer(answer.text) == str(sample.passkey)
        return self._row(sample, "ok", correct, answer.text, answer.tokens)

    @staticmethod
    def _row(
        sample: Sample,
        status: str,
        correct: bool = False,
        answer: str = "",
        tokens: Sequence[int] = (),
    ) -> Row:
        return {
            "length": sample.length,
            "depth": round(sample.depth, 6),
            "seed": sample.seed,
            "passkey": sample.passkey,
            "status": status,
            "correct": correct,
            "answer": answer,
            "tokens": list(tokens),
            "key": sample.key,
        }

    def _record(self, rows: Sequence[Row], bar: Any) -> None:
        for row in rows:
            self.journal.append([row])
        known = [self.journal.rows.get(sample.key) for sample in self.plan.samples]
        done = [row for row in known if row is not None]
        correct = sum(row["correct"] for row in done)
        bar.set_postfix_str(f"{correct}/{len(done)} right")
