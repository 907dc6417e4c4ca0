"""Reading YAML whose size when expanded is known before it is."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rwkvx.errors import InputError, shown
from rwkvx.files.plain import collector_paused, decoded, read_bytes

YAML_BYTES = 100_000  # a configuration has a few thousand; the parser takes seconds for this much
_MOST_NODES = 20_000


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: no regular file, too large, or damaged.
    """
    return parse_yaml(decoded(read_bytes(path, YAML_BYTES), path), str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """The plain value that YAML spells; a name that is given twice in one mapping is a mistake.

    Raises:
        InputError: damaged, nested too deeply, or aliases that expand to very much.
    """
    if len(text) > YAML_BYTES:
        raise InputError(f"{origin} has more than {YAML_BYTES:,} characters: no configuration")
    try:
        with collector_paused():
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, {})
            return loader.construct_document(node)
    except RecursionError:
        raise InputError(f"{origin} is damaged: nested too deeply") from None
    except Exception as error:  # its constructors of numbers, dates and keys raise anything
        raise InputError(f"{origin} is damaged: {error}") from error


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below a node, each alias counted as what it stands for."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_NODES + 1  # until it is known: found again below itself, too many
        children = node.value
        if isinstance(node, yaml.MappingNode):
            names = Counter(key.value for key, _ in node.value if key.tag.endswith(":str"))
            if twice := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"it names {shown(twice[0])} twice")
            children = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_check_size(child, sizes) for child in children)
    if sizes[id(node)] > _MOST_NODES:
        raise ValueError(f"it holds more than {_MOST_NODES:,} values")
    return sizes[id(node)]
