"""What a kind of data offers to training.

A kind is one file of this folder: a frozen dataclass of its options, which stand in the YAML beside
`kind:`, and whose `open` gives a `Source`. `KINDS` in `__init__.py` lists them.

Axes: R rows, T time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rwkvx.data.sources.reader import Reader

Ids = NDArray[np.int64]


class Wanted(NamedTuple):
    """Rows that are asked for. Equal requests get equal rows: nothing is to be saved for a resume.

    Attributes:
        order: seed of the order in which data is read, the same for all of a stage.
        fresh: seed of what is drawn anew, another one in every step.
        numbers: of the rows, counted from the start of the stage; never the same twice in one.
        length: tokens of a row.
        recurrent_length: tokens of a piece that recurrent blocks read at once, 0 for whole rows.
    """

    order: tuple[int, ...]
    fresh: tuple[int, ...]
    numbers: Sequence[int]
    length: int
    recurrent_length: int = 0


class Rows(NamedTuple):
    """Rows of tokens.

    Attributes:
        ids: [R, T + 1] int64: inputs, each followed by its target.
        weights: [R, T] float32, of the loss of each target. What a row asks for sums to 1 over all
            rows; passkey's `other_weight` comes on top.
        answers: [R, T] bool, targets that must all be right for a row to count as answered.
        starts: [R, T] bool, inputs before which everything is forgotten: a document begins. The
            first of a row need not be marked.
    """

    ids: Ids
    weights: NDArray[np.float32]
    answers: NDArray[np.bool]
    starts: NDArray[np.bool]


class Source(Protocol):
    """Opened data."""

    def rows(self, wanted: Wanted) -> Rows:
        """`len(wanted.numbers)` rows.

        Raises:
            InputError: the data has no row of that length.
        """
        ...

    def evaluations(self) -> dict[str, "Source"]:
        """What to evaluate on, by name; it shares no token with what `rows` gives."""
        ...

    def identity(self) -> dict[str, Any]:
        """What its rows depend on, as JSON: equal for equal rows, wherever they were read from."""
        ...


@runtime_checkable
class Options(Protocol):
    """Options of a kind."""

    def open(self, reader: Reader) -> Source:
        """Read what is to be read.

        Raises:
            InputError: files that are missing or damaged.
        """
        ...


def even_weights(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Every target counts alike."""
    return np.full(shape, 1.0 / (shape[0] * shape[1]), dtype=np.float32)
