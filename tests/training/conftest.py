"""A small run on text: `write_config` makes the YAML file of one. Lets tests share `running.py`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from running import BASE, TEXT


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the config with changes (whole top-level values) and returns its path."""
    (tmp_path / "text.txt").write_text(TEXT)

    def write(name: str = "run", **changes: Any) -> Path:
        data = {**BASE, "out": str(tmp_path / name)}
        data["data"] = {**BASE["data"], "paths": [str(tmp_path / "text.txt")]}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**data, **changes}))
        return path

    return write
