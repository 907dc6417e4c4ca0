"""A small run on text: `write_config` makes the YAML file of one. Lets tests share `running.py`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20
BASE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {
        "vocab_size": 256,
        "tokenizer": "bytes",
        "width": 16,
        "head_size": 8,
        "pattern": ["rwkv7", "sparse"],
        "chunk_size": 8,
        "topk": 2,
        "key_conv": 2,
        "ffn_mult": 2,
        "decay_rank": 4,
        "iclr_rank": 4,
        "value_rank": 4,
        "gate_rank": 4,
    },
    "data": {"kind": "text", "paths": ["text.txt"]},
    "optimizer": {"lr": 0.01, "warmup": 2},
    "stages": [
        {"steps": 2, "length": 24, "batch": 3},
        {"steps": 4, "length": 40, "batch": 2, "state_passing": 0.5},
    ],
    "eval_every": 3,
    "eval_batches": 1,
    "save_every": 3,
}


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
