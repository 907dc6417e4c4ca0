"""Texts into tokens, each text only once for all stages of a run."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rwkvx.data.documents import find_files, read_documents
from rwkvx.data.hub import hub_documents
from rwkvx.errors import InputError

__all__ = ["Documents", "FileDocuments", "HubDocuments", "Reader", "Stream"]


class Stream(NamedTuple):
    """Documents one after the other, each ended by the end of document.

    Attributes:
        tokens: [N] of any integer type, in memory or mapped.
        documents: [D + 1] int64, where each begins.
        name: what the tokens are, where that is known without looking at them.
    """

    tokens: NDArray[Any]
    documents: NDArray[np.int64]
    name: str = ""

    @property
    def identity(self) -> str:
        """Equal for equal tokens, hexadecimal."""
        digest = hashlib.sha256(self.name.encode())
        if not self.name:
            for start in range(0, len(self.tokens), 1 << 20):
                digest.update(self.tokens[start : start + (1 << 20)].astype("<u4").tobytes())
            digest.update(self.documents.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def split(self, at: int) -> tuple["Stream", "Stream"]:
        """What stands before token number `at`, and the rest."""
        inside = self.documents[(self.documents > 0) & (self.documents < len(self.tokens))]
        before, after = inside[inside < at], inside[inside > at] - at
        names = (f"{self.name} to {at}", f"{self.name} from {at}") if self.name else ("", "")
        size = len(self.tokens) - at
        return (
            Stream(self.tokens[:at], np.concatenate([[0], before, [at]]), names[0]),
            Stream(self.tokens[at:], np.concatenate([[0], after, [size]]), names[1]),
        )

    def tail_start(self, share: float) -> int:
        """Where a tail of at most that share begins: of whole documents, if one begins in it."""
        first = len(self.tokens) - int(share * len(self.tokens))
        whole = self.documents[(self.documents >= first) & (self.documents < len(self.tokens))]
        return int(whole[0]) if len(whole) else first


class Documents(Protocol):
    """Texts that can be read again; equal ones have equal texts."""

    def __hash__(self) -> int: ...

    def texts(self, data: str | None) -> Iterator[str]:
        """One document after the other; `data` is the data folder."""
        ...


@dataclass(frozen=True)
class FileDocuments:
    """Of files."""

    paths: tuple[str, ...]
    unwrap: bool = False

    def texts(self, data: str | None) -> Iterator[str]:
        return read_documents(find_files(self.paths, data), self.unwrap)


@dataclass(frozen=True)
class HubDocuments:
    """Of a Hugging Face data set."""

    name: str
    subset: str
    split: str
    column: str
    streaming: bool

    def texts(self, data: str | None) -> Iterator[str]:
        return hub_documents(self.name, self.subset, self.split, self.column, self.streaming)


class Reader:
    """What opening a source needs: the tokenizer, the data folder, and what was read before."""

    def __init__(self, tokenizer: Any, data: str | None = None) -> None:
        self.tokenizer, self.data = tokenizer, data
        self._read: dict[tuple[Documents, float], Stream] = {}

    def find(self, name: str) -> Path:
        """A file as it is named, else in the data folder."""
        return find_files([name], self.data)[0]

    def stream(self, documents: Documents, limit_mb: float) -> Stream:
        """All tokens of the first `limit_mb` megabytes of text.

        Raises:
            InputError: no text at all.
        """
        key = (documents, limit_mb)
        if key not in self._read:
            self._read[key] = self._tokenised(documents, int(limit_mb * 1e6))
        return self._read[key]

    def _tokenised(self, documents: Documents, room: int) -> Stream:
        parts: list[NDArray[np.int32]] = []
        for text in documents.texts(self.data):
            if room <= 0:
                break
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            parts.append(np.asarray([*ids, self.tokenizer.eos_token_id], dtype=np.int32))
            room -= len(text.encode("utf-8", "surrogatepass"))
        if not parts:
            raise InputError(f"no text in {documents}")
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return Stream(np.concatenate(parts), offsets)
