"""Plain data, as YAML gives it, into frozen dataclasses: every key known, every type right."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from dacite import Config, DaciteError, UnexpectedDataError, from_dict

from rwkvx.errors import InputError, shown

__all__ = ["from_plain", "nearest"]

T = TypeVar("T")


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """An instance of a dataclass; values that are instances of their type already are kept.

    Args:
        where: what the data is, for messages.

    Raises:
        InputError: an unknown or missing key, a wrong type, a value out of its range.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where} holds no mapping: {shown(data)}")
    settings = Config(strict=True, type_hooks={float: _number, int: _integer, **_LISTS})
    try:
        return from_dict(kind, data, settings)
    except UnexpectedDataError as error:
        key = str(min(error.keys, key=str))
        raise InputError(
            f"unknown key {shown(key)} in {where}{nearest(key, _names(kind))}"
        ) from error
    except (DaciteError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    """ ", did you mean ...?", where known names (so many at most) are like `name`; else nothing."""
    found = get_close_matches(name[:100], known, most)
    return f", did you mean {' or '.join(found)}?" if found else ""


def _names(kind: Any) -> set[str]:
    """Fields of a dataclass and of those in it."""
    hints = get_type_hints(kind)
    inner = [x for x in hints.values() if is_dataclass(x)]
    return {f.name for f in fields(kind)}.union(*map(_names, inner))


# What has the wrong type becomes text: then dacite says so, with the name of the field.


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    try:
        return str(value) if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return shown(value)


def _list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else shown(value)


def _integer(value: Any) -> Any:
    return shown(value) if isinstance(value, bool) else value


_LISTS: dict[Any, Any] = dict.fromkeys(
    (tuple[str, ...], tuple[int, ...], tuple[float, float]), _list
)
