"""Models that answer passkey questions by reading their own token history: exact expectations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rwkvx_evals.interface import StateTools

QUESTION = b"What is the pass key? The pass key is"


class ByteTokenizer:
    """Ids are bytes; id 0 ends a document."""

    eos_token_id = 0

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], /) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass(frozen=True)
class History:
    """ids_BT: all tokens read so far, int64."""

    ids_BT: Tensor


class HistoryTools(StateTools):
    """Forking for models whose state is their history."""

    def repeat(self, state: History, rows: int) -> History:
        return History(state.ids_BT.repeat_interleave(rows, dim=0))

    def select(self, state: History, rows: Tensor) -> History:
        return History(state.ids_BT[rows])

    def join(self, states: Sequence[History]) -> History:
        return History(torch.cat([state.ids_BT for state in states]))

    def bytes(self, state: History) -> int:
        return state.ids_BT.nbytes


@dataclass
class Oracle:
    """Finds the key in its last `memory` tokens; counts what it reads.

    batch_limit: more rows than this "run out of memory". oom_at, nan_at: total lengths from which
    it does so always, or returns not-a-number.
    """

    memory: int | None = None
    batch_limit: int | None = None
    oom_at: int | None = None
    nan_at: int | None = None
    tokens_read: int = 0
    rows_seen: list[int] = field(default_factory=list)
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)

    def fingerprint(self) -> str:
        return f"oracle-{self.memory}"

    def __call__(
        self, ids_BT: Tensor, state: History | None = None, logits: str = "all"
    ) -> tuple[Tensor | None, History]:
        assert ids_BT.dtype == torch.int64
        assert logits in ("last", "none")
        rows = ids_BT.shape[0]
        self.rows_seen.append(rows)
        if self.batch_limit is not None and rows > self.batch_limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")
        before = ids_BT[:, :0] if state is None else state.ids_BT
        history = torch.cat([before, ids_BT], dim=1)
        if self.oom_at is not None and history.shape[1] >= self.oom_at:
            raise MemoryError
        self.tokens_read += ids_BT.numel()
        if logits == "none":
            return None, History(history)
        out = torch.zeros(rows, 1, 256)
        for row in range(rows):
            out[row, 0, self.next_token(bytes(history[row].tolist()))] = 1.0
        if self.nan_at is not None and history.shape[1] >= self.nan_at:
            out[:] = float("nan")
        return out, History(history)

    def next_token(self, text: bytes) -> int:
        """The next byte of ` N.` followed by the end of document."""
        start = text.rfind(QUESTION)
        asked, said = text[:start], text[start + len(QUESTION) :]
        window = asked if self.memory is None else asked[-self.memory :]
        found = re.search(rb"The pass key is (\d+)\. Remember", window)
        answer = b" " + (found[1] if found else b"no idea") + b".\0"
        return answer[min(len(said), len(answer) - 1)]
