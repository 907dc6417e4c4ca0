"""Loss by position in whole books, and LongPPL: does more context still help?

A window of a book is read once; the loss of each token belongs to its position, that is to the
number of tokens before it. LongPPL (arXiv 2410.23771) is the perplexity of key tokens only: those
that the far context makes much more likely (gain in log-probability over a short context above
ALPHA) and that are then likely (log-probability above BETA). Here the model that is measured is
itself the judge of what is key.

Axes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvx.data.folder import DATA_VARIABLE, read_text
from rwkvx.errors import InputError, is_out_of_memory
from rwkvx_evals.files import digest
from rwkvx_evals.interface import Advance, Tokenizer
from rwkvx_evals.long.task import Ids
from rwkvx_evals.models.reader import Reader

NAME = "loss_by_position"
ABOUT = "Loss of a book's tokens by the length of their context, and LongPPL; no score."

# The paper's: windows of SHORT tokens, of which the last STRIDE are scored.
SHORT, STRIDE = 4096, 1024
ALPHA, BETA = 2.0, -2.0
FIRST_BUCKET = 16
LOGITS_BYTES = 256_000_000

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """`length` tokens of a book, from token `start` on."""

    book: str
    start: int
    ids: Ids


class Books:
    """The long documents of a data folder, or one book, as windows of tokens."""

    def __init__(self, tokenizer: Tokenizer, data: Path | None, book: Path | None) -> None:
        self._tokenizer = tokenizer
        if book is not None:
            self._files = [book]
        else:
            folder = data / "long_docs" if data is not None else None
            self._files = sorted(folder.glob("*.xz")) if folder is not None else []
        self._tokens = lru_cache(maxsize=None)(self._encode)

    def _encode(self, file: Path) -> NDArray[np.int32]:
        ids = self._tokenizer.encode(read_text(file), add_special_tokens=False)
        return np.asarray(ids, dtype=np.int32)

    def window(self, length: int, index: int) -> Window:
        """Window number `index`: the first of every book, then the second of every book, ...

        Raises InputError where there are no books, or not so many windows of that length.
        """
        if not self._files:
            raise InputError(
                f"{NAME} reads long_docs/*.xz of the data folder (--data or {DATA_VARIABLE}), or "
                "one book by --haystack: there is neither"
            )
        counts = [len(self._tokens(file)) // length for file in self._files]
        place = index
        for turn in range(max(counts)):
            books = [file for file, count in zip(self._files, counts, strict=True) if count > turn]
            if place < len(books):
                ids = self._tokens(books[place])[turn * length : (turn + 1) * length]
                return Window(books[place].name, turn * length, ids.astype(np.int64))
            place -= len(books)
        raise InputError(f"the books have {sum(counts)} windows of {length:,} tokens")


@dataclass(frozen=True)
class Question:
    """A window as it is measured; `key` is what the journal calls it."""

    id: str
    length: int
    index: int
    key: str
    prompt: str


class LossPlan:
    """Which windows are measured, and which are not, with the reason."""

    def __init__(
        self,
        books: Books,
        lengths: Sequence[int],
        samples: int,
        *,
        common: Sequence[str],
        room: int | None,
    ) -> None:
        """common: what decides a loss besides the window: weights, code, settings.

        room: tokens that the model can read, None for any number. Raises InputError when there is
        no window at all, with the reason.
        """
        self.books = books
        self.questions: list[Question] = []
        self.skipped: dict[int, list[str]] = {}
        for length in sorted(lengths, reverse=True):
            for index in range(samples):
                try:
                    if room is not None and length > room:
                        raise InputError(f"{length} tokens are more than the {room} of the model")
                    window = books.window(length, index)
                except InputError as error:
                    self.skipped.setdefault(length, []).append(str(error))
                    continue
                label, sha = f"{NAME}-{length}-{index}", hashlib.sha256(window.ids.tobytes())
                key = digest([*common, NAME, SHORT, STRIDE, label, sha.hexdigest()])
                self.questions.append(Question(label, length, index, key, sha.hexdigest()))
        if not self.questions:
            reason = next(iter(self.skipped.values()))[0]
            raise InputError(f"{NAME} cannot be measured at any of these lengths: {reason}")

    def answer(self, model: Reader, question: Question, advance: Advance) -> dict[str, Any]:
        """The journal's row of one window; "oom" where memory ran out."""
        window = self.books.window(question.length, question.index)
        row: dict[str, Any] = {
            "key": question.key,
            "kind": "window",
            "id": question.id,
            "task": NAME,
            "length": question.length,
            "index": question.index,
            "prompt": question.prompt,
            "book": window.book,
            "start": window.start,
            "buckets": [],
            "compared": 0,
            "key_tokens": 0,
            "key_loss": 0.0,
        }
        try:
            return row | measure(model, window.ids, advance)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return row | {"status": "oom"}


def tokens_to_read(length: int) -> int:
    """Tokens that one window costs: itself, and the short windows for LongPPL."""
    return length + sum(len(batch) * width for batch, width in short_windows(length))


def short_windows(length: int, rows: int = 4) -> Iterator[tuple[list[int], int]]:
    """Starts of short windows that are read together, and how many tokens each has."""
    starts = range(STRIDE, length - SHORT + STRIDE, STRIDE)
    whole = [s for s in starts if s + SHORT <= length]
    for first in range(0, len(whole), rows):
        yield whole[first : first + rows], SHORT
    for start in starts[len(whole) :]:
        yield [start], length - start


def measure(model: Reader, ids: Ids, advance: Advance) -> dict[str, Any]:
    """What the journal keeps of a window; its status is "invalid" where logits are not numbers.

    ids: int64 [T]. advance: told the tokens read.
    """
    long = losses(model, ids[None], 1, advance)[0]
    far = np.full(len(ids) - 1, np.inf)  # of the same tokens, with a short context
    for starts, width in short_windows(len(ids)):
        batch_BT = np.stack([ids[s : s + width] for s in starts])
        scored = SHORT - STRIDE
        for start, found in zip(starts, losses(model, batch_BT, scored, advance), strict=True):
            far[start + scored - 1 : start + width - 1] = found
    return measured(long, far)


def measured(long: Losses, far: Losses | None = None) -> dict[str, Any]:
    """The part of a row that losses decide; far: the same with a short context, inf where none."""
    far = np.full(len(long), np.inf) if far is None else far
    if not (np.isfinite(long).all() and not np.isnan(far).any()):
        return {"status": "invalid"}
    compared = np.isfinite(far)
    key = compared & (far - long > ALPHA) & (-long > BETA)
    return {
        "status": "ok",
        "buckets": buckets(long),
        "compared": int(compared.sum()),
        "key_tokens": int(key.sum()),
        "key_loss": round(float(long[key].sum()), 6),
    }


@torch.inference_mode()
def losses(model: Reader, ids_BT: Ids, first: int, advance: Advance) -> Losses:
    """Loss (nats) of the tokens `first` >= 1 to the last of each row, [B, T - first]."""
    rows = len(ids_BT)
    before = np.tile(np.asarray(model.frame.before, dtype=np.int64), (rows, 1))
    shift = before.shape[1] - 1  # the logits after a token are of the next one
    all_BT = torch.from_numpy(np.concatenate([before, ids_BT], axis=1)).to(model.device)
    width = max(1, LOGITS_BYTES // (4 * model.vocab_size * rows))
    at, found = first + shift, []
    for logits_BTV in model.logits_in_slices(all_BT[:, :-1], at, width):
        wanted_BT = all_BT[:, at + 1 : at + 1 + logits_BTV.shape[1]]
        found.append(_cross_entropy(logits_BTV, wanted_BT))
        at += logits_BTV.shape[1]
        advance(wanted_BT.numel())
    advance(rows * first)
    return np.concatenate(found, axis=1)


def _cross_entropy(logits_BTV: Tensor, wanted_BT: Tensor) -> Losses:
    logprobs = logits_BTV.float().log_softmax(dim=-1)
    found_BT = -logprobs.gather(2, wanted_BT[..., None].to(logprobs.device))[..., 0]
    return found_BT.double().cpu().numpy()


def buckets(loss_T: Losses) -> list[list[float]]:
    """[from, to, tokens, sum of losses] by position, each bucket twice as long as the one before.

    loss_T: of the tokens at positions 1, 2, ...
    """
    found: list[list[float]] = []
    low, high = 1, FIRST_BUCKET
    while low <= len(loss_T):
        part = loss_T[low - 1 : high - 1]
        found.append([low, low + len(part), len(part), round(float(part.sum()), 6)])
        low, high = high, 2 * high
    return found


def collect(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Loss by position and LongPPL over windows of one length, each with its standard error."""
    fine = [row for row in rows if row["status"] == "ok"]
    found: dict[str, Any] = {"windows": len(fine), "buckets": []}
    for column in zip(*(row["buckets"] for row in fine), strict=True):
        mean, error = _mean([total / count for _, _, count, total in column])
        found["buckets"].append(
            {"from": column[0][0], "to": column[0][1], "loss": mean, "stderr": error}
        )
    totals = [sum(b[3] for b in row["buckets"]) / sum(b[2] for b in row["buckets"]) for row in fine]
    found["loss"], found["stderr"] = _mean(totals)
    found["compared"] = sum(row["compared"] for row in fine)
    found["key_tokens"] = sum(row["key_tokens"] for row in fine)
    pairs = [(row["key_loss"], row["key_tokens"]) for row in fine if row["key_tokens"]]
    found["long_ppl"], found["long_ppl_stderr"] = _ratio(pairs)
    return found


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error over windows; no error from a single one."""
    if not values:
        return None, None
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return round(mean, 6), None
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return round(mean, 6), round(math.sqrt(variance / n), 6)


def _ratio(pairs: Sequence[tuple[float, int]]) -> tuple[float | None, float | None]:
    """exp of a ratio of sums, and its standard error by the jackknife over windows."""
    if not pairs:
        return None, None
    total, count = math.fsum(p[0] for p in pairs), sum(p[1] for p in pairs)
    value = math.exp(total / count)
    n = len(pairs)
    if n == 1:
        return round(value, 6), None
    left = [math.exp((total - a) / (count - b)) for a, b in pairs]
    mean = math.fsum(left) / n
    variance = (n - 1) / n * math.fsum((x - mean) ** 2 for x in left)
    return round(value, 6), round(math.sqrt(variance), 6)
