"""The kinds of block. To add one, write its file after `contract.py` and name it here."""

from collections.abc import Mapping

from rwkvx.errors import InputError
from rwkvx.kinds.contract import BlockState, Memory, Mixer, Option
from rwkvx.kinds.rwkv7 import TimeMix
from rwkvx.kinds.sparse import SparseAttention
from rwkvx.kinds.window import WindowAttention

__all__ = ["KINDS", "BlockState", "Memory", "Mixer", "Option", "kind_of", "options"]

KINDS: dict[str, type[Mixer]] = {
    "rwkv7": TimeMix,
    "sparse": SparseAttention,
    "window": WindowAttention,
}


def kind_of(name: object) -> type[Mixer]:
    """The kind of that name.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(f"pattern must name blocks of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def options() -> Mapping[str, Option]:
    """Fields of the config that kinds bring, by name."""
    return {name: option for kind in KINDS.values() for name, option in kind.options.items()}
