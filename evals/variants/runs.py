"""The four architectures and their runs: equal in depth, width, data, tokens and schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rwkvx.training.config import TrainConfig, parse_config

# The longest sequence that any measurement reads: a window that long is dense attention.
DENSE = 1 << 20
# Patterns by name, as functions of the depth; every third block of a hybrid attends.
NAMES = ("rwkv7", "hybrid", "hybrid-conv", "dense")
LABELS = {
    "rwkv7": "RWKV-7 alone",
    "hybrid": "hybrid",
    "hybrid-conv": "hybrid, key convolution",
    "dense": "dense attention",
}


def variants(base: TrainConfig, out: Path, seed: int) -> dict[str, TrainConfig]:
    """A run for each architecture, from the config of a hybrid; depth a multiple of three."""
    return {name: _variant(base, name, out, seed) for name in NAMES}


def _variant(base: TrainConfig, name: str, out: Path, seed: int) -> TrainConfig:
    depth = len(base.model.pattern)
    own: dict[str, Any] = {"key_conv": 0}
    if name == "rwkv7":
        own |= {"pattern": ["rwkv7"] * depth}
    elif name == "dense":
        own |= {"pattern": ["window"] * depth, "window": DENSE}
    else:
        own |= {"pattern": [("rwkv7", "rwkv7", "sparse")[i % 3] for i in range(depth)]}
        own |= {"key_conv": (base.model.key_conv or 4) if name == "hybrid-conv" else 0}
    plain = base.to_dict()
    fields = {k: v for k, v in plain["model"].items() if k not in base.model.options}
    plain.pop("probe")  # retrieval is measured at the end
    plain |= {"model": {**fields, **own}, "name": name, "seed": seed}
    plain |= {"out": str(out / f"{name}-seed-{seed}")}
    if name == "dense":  # it has no state that could be passed on
        plain["stages"] = [{**x, "state_passing": 0.0} for x in plain["stages"]]
    return parse_config(plain, f"variant {name}")


def train(config: TrainConfig, data: str | None) -> Path:
    """Run it, or go on with it, or find it done; the folder of the model."""
    from rwkvx.training.run_folder import RunFolder
    from rwkvx.training.trainer import Trainer

    folder = RunFolder(config.folder).model(config.name, config.total_steps)
    if not folder.exists():
        Trainer(config, data).run()
    return folder


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """With fewer steps of its last stage."""
    return replace(config, steps=steps) if steps else config
