"""The values that a setting may have, written once: beside its field, and for options.

A field says its range in its annotation, and the class checks all of them when it is made::

    @dataclass(frozen=True)
    class Shape:
        width: Annotated[int, Whole(1, 65536)]
        kind: Annotated[str | None, OneOf("flat", "tree")] = None

        def __post_init__(self) -> None:
            check_ranges(self)

Fields that hold dataclasses check themselves. `rwkvx.cli.options.Within` makes an option of one.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol, get_args, get_type_hints

from rwkvx.errors import InputError, shown

__all__ = [
    "Each",
    "Number",
    "OneOf",
    "Range",
    "Whole",
    "check",
    "check_ranges",
    "range_of",
    "ranges_of",
]


class Range(Protocol):
    """What may stand in an annotation; `words` follow "must be"."""

    @property
    def words(self) -> str: ...

    def holds(self, value: Any, /) -> bool:
        """Whether the value is one of these."""

    def parse(self, text: str, /) -> Any:
        """The value that a text spells; ValueError where it spells none. The range is not asked."""


class Whole:
    """Whole numbers from `least` to `most`, both included."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    @property
    def words(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def holds(self, value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.least <= value <= self.most

    def parse(self, text: str) -> int:
        return int(text)


class Number:
    """Numbers from `least` to `most`, both included, never NaN; `above`: without `least` itself."""

    def __init__(self, least: float, most: float, above: bool = False) -> None:
        self.least, self.most, self.above = least, most, above

    @property
    def words(self) -> str:
        if self.above:
            return f"a number above {self.least:g} and up to {self.most:g}"
        return f"a number from {self.least:g} to {self.most:g}"

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN is in no range.
        return (
            number and self.least <= value <= self.most and not (self.above and value == self.least)
        )

    def parse(self, text: str) -> float:
        return float(text)


class OneOf:
    """One of some values."""

    def __init__(self, *values: str) -> None:
        self.values = values

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.values)}"

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.values

    def parse(self, text: str) -> str:
        return text


class Each:
    """From `least` to `most` values in a row, each of them in `inner`."""

    def __init__(self, inner: Range, least: int, most: int) -> None:
        self.inner, self.least, self.most = inner, least, most

    @property
    def words(self) -> str:
        return f"a list of {self.least} to {self.most} values, each {self.inner.words}"

    def holds(self, value: Any) -> bool:
        row = isinstance(value, list | tuple) and self.least <= len(value) <= self.most
        return row and all(map(self.inner.holds, value))

    def parse(self, text: str) -> tuple[Any, ...]:
        return tuple(self.inner.parse(part.strip()) for part in text.split(","))


# What several commands and functions ask for.
SEED = Whole(0, (1 << 63) - 1)
TEMPERATURE = Number(0, 1e9)
TOP_P = Number(0, 1, above=True)
NEW_TOKENS = Whole(0, 1 << 24)
TOKENS = Whole(1, 1 << 28)  # of a text
THREADS = Whole(1, 1024)
COUNT = Whole(1, 1_000_000)  # of anything that is worked through one by one


def check(name: str, value: Any, hold: Range) -> None:
    """Check one value; raises InputError that names it."""
    if not hold.holds(value):
        raise InputError(f"{name} must be {hold.words}, got {shown(_culprit(hold, value))}")


def check_ranges(instance: Any) -> None:
    """Check every field of a dataclass whose annotation has a range; None only where its type says.

    Raises:
        InputError: the first that does not hold, by name.
    """
    kind: type = type(instance)
    for name, (hold, optional) in ranges_of(kind).items():
        value = getattr(instance, name)
        if not (optional and value is None):
            check(name, value, hold)


@cache
def ranges_of(kind: type) -> dict[str, tuple[Range, bool]]:
    """Range by name of field, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            if hasattr(extra, "holds"):
                found[name] = (extra, type(None) in get_args(hint.__origin__))
    return found


def range_of(kind: type, name: str) -> Range:
    """The range of one field."""
    return ranges_of(kind)[name][0]


def _culprit(hold: Range, value: Any) -> Any:
    """Of a list the first value that is out of range, anything else as it is."""
    if isinstance(hold, Each) and isinstance(value, list | tuple):
        wrong: Iterable[Any] = (x for x in value if not hold.inner.holds(x))
        return next(iter(wrong), f"{len(value)} values")
    return value
