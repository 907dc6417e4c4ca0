"""Sources of training data: one file for a kind, all with the contract of `contract.py`.

In YAML, `data: {kind: text, paths: [a.txt]}` or `data: [{weight: 0.7, kind: ...}, ...]`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from rwkvx.data.sources.chat import Chat
from rwkvx.data.sources.contract import Options, Rows, Source, Wanted
from rwkvx.data.sources.mixture import Mixture
from rwkvx.data.sources.passkey import Passkey
from rwkvx.data.sources.reader import Reader
from rwkvx.data.sources.text import Hub, Text
from rwkvx.data.sources.tokens import Tokens
from rwkvx.errors import InputError, shown
from rwkvx.ranges import Number, check_ranges
from rwkvx.settings import from_plain

__all__ = ["KINDS", "Data", "Part", "Reader", "Rows", "Source", "Wanted", "read_data"]

KINDS: dict[str, Any] = {
    "text": Text,
    "tokens": Tokens,
    "hub": Hub,
    "chat": Chat,
    "passkey": Passkey,
}


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        kind: one of the kinds below.
        options: the fields of that kind; in YAML they stand beside `kind`.
        weight: its share of the rows, beside those of the others.
    """

    kind: str
    options: Options
    weight: Annotated[float, Number(0, 1e6, above=True)] = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def to_dict(self) -> dict[str, Any]:
        """As in YAML."""
        options: Any = self.options
        found = {name: _plain(x) for name, x in asdict(options).items()}
        return {"weight": self.weight, "kind": self.kind, **found}


@dataclass(frozen=True)
class Data:
    """All data of a run or a stage."""

    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any] | list[dict[str, Any]]:
        """As in YAML."""
        parts = [part.to_dict() for part in self.parts]
        return parts[0] if len(parts) == 1 else parts

    def open(self, reader: Reader) -> Source:
        """Read what is to be read.

        Raises:
            InputError: files that are missing or damaged.
        """
        sources = [part.options.open(reader) for part in self.parts]
        if len(sources) == 1:
            return sources[0]
        kinds = [part.kind for part in self.parts]
        names = [k if kinds.count(k) == 1 else f"{k}-{i + 1}" for i, k in enumerate(kinds)]
        return Mixture(names, sources, [part.weight for part in self.parts])


def read_data(value: Any, where: str = "data") -> Data:
    """What stands after `data:` in YAML: one source, or a list of weighted ones.

    Raises:
        InputError: an unknown kind, key or type, a value out of its range.
    """
    if isinstance(value, list):
        if not value:
            raise InputError(f"{where} lists no source")
        return Data(tuple(_part(x, f"{where}[{i}]") for i, x in enumerate(value)))
    return Data((_part(value, where),))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _part(value: Any, where: str) -> Part:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} holds no mapping: {shown(value)}")
    options = {name: x for name, x in value.items() if name not in ("kind", "weight")}
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}.kind must be one of {', '.join(KINDS)}, got {shown(kind)}")
    whole = {"kind": kind, "options": from_plain(KINDS[kind], options, f"{where} ({kind})")}
    if "weight" in value:
        whole["weight"] = value["weight"]
    return from_plain(Part, whole, where)
