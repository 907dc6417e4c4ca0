"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bpe
import pytest
from small_data import write_data

from rwkvx.tokenizers import get_tokenizer
from rwkvx_evals.long.writer import Writer

TOKENIZERS = {
    "world": lambda: get_tokenizer("world"),
    "bytes": lambda: get_tokenizer("bytes"),
    "words": bpe.words,
    "marked": bpe.marked,
    "across": bpe.across,
}
MakeWriter = Callable[..., Writer]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, object]:
    """One of each kind, by name."""
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="session")
def writer(tokenizers: dict[str, object], data: Path) -> MakeWriter:
    """A new writer for a kind of tokenizer."""

    def make(kind: str = "world", **settings: object) -> Writer:
        return Writer(tokenizers[kind], **{"data": data, **settings})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def shared(writer: MakeWriter) -> MakeWriter:
    """The same writer each time for a kind of tokenizer: no test may depend on what it has made."""
    made: dict[str, Writer] = {}

    def get(kind: str = "world") -> Writer:
        if kind not in made:
            made[kind] = writer(kind)
        return made[kind]

    return get
