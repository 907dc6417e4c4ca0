"""A run with every field, to begin a config from: `rwkvx train --show-config`."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import yaml

from rwkvx.config import ModelConfig, hybrid_pattern
from rwkvx.data.sources import KINDS, Part
from rwkvx.training.config import StageConfig, TrainConfig, override, parse_config

__all__ = ["example_run"]

# Fields without a default.
EXAMPLE: dict[str, Any] = {
    "name": "my_run",
    "model": {"vocab_size": 65536, "width": 512, "pattern": list(hybrid_pattern(8, 2))},
    "data": {"kind": "text", "paths": ["my_text.txt"]},
    "stages": [{"steps": 1000, "length": 1024, "batch": 8}],
}
HEAD = """\
# A run of rwkvx, every field with its default: delete what you leave at it.
# What is marked "required" has no default: its value is an example. With init (a model to start
# from), model holds only what differs, or nothing.
"""
MARK = "  # required"


def example_run(overrides: Mapping[str, str]) -> str:
    """A whole run in YAML, each field at its default, those without one marked.

    Args:
        overrides: values in YAML syntax by dotted name, as for `read_config`.

    Raises:
        InputError: as `read_config`.
    """
    data = yaml.safe_load(yaml.safe_dump(EXAMPLE))
    # The example's own would not suit another kind of data, or the model of init.
    if "data.kind" in overrides:
        data["data"] = {}
    if "init" in overrides:
        del data["model"]
    for name, text in overrides.items():
        override(data, name, text)
    run = parse_config(data, "the example").to_dict()
    for stage in run["stages"]:
        stage.setdefault("data", None)
    parts = run["data"] if isinstance(run["data"], list) else [run["data"]]
    own = [KINDS[part["kind"]] for part in parts]
    classes = {"model": (ModelConfig,), "stages": (StageConfig,), "data": (Part, *own)}
    if run["init"]:
        del classes["model"]
    out, top = [HEAD], [x for x in _required(TrainConfig) if x in ("name", "data", *classes)]
    for name, value in run.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, width=100)
        inner = [x for kind in classes.get(name, ()) for x in _required(kind)]
        out += [_marked(line, inner if line[0] in " -" else top) for line in text.splitlines(True)]
    return "".join(out)


def _required(kind: type) -> list[str]:
    """Names of the fields without a default."""
    return [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]


def _marked(line: str, required: list[str]) -> str:
    found = re.match(r"(?:  |- )?(\w+):", line)
    return f"{line.rstrip()}{MARK}\n" if found and found[1] in required else line
