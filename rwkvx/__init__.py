"""Hybrid long-context language models: RWKV-7 blocks and top-k sparse attention blocks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkvx.auto import register_when_used

if TYPE_CHECKING:
    from rwkvx.checkpoint.load import load
    from rwkvx.config import ModelConfig, hybrid_pattern
    from rwkvx.errors import InputError
    from rwkvx.init import init_weights
    from rwkvx.model import Model
    from rwkvx.route import explain
    from rwkvx.state import ModelState, repeat_state, select_state

__version__ = "0.1.0"

_HOME = {
    "load": "rwkvx.checkpoint",
    "explain": "rwkvx.route",
    "ModelConfig": "rwkvx.config",
    "hybrid_pattern": "rwkvx.config",
    "InputError": "rwkvx.errors",
    "init_weights": "rwkvx.init",
    "Model": "rwkvx.model",
    "ModelState": "rwkvx.state",
    "repeat_state": "rwkvx.state",
    "select_state": "rwkvx.state",
}
__all__ = [
    "InputError",
    "Model",
    "ModelConfig",
    "ModelState",
    "explain",
    "hybrid_pattern",
    "init_weights",
    "load",
    "repeat_state",
    "select_state",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `rwkvx --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'rwkvx' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Also what is imported on first use."""
    return sorted({*globals(), *_HOME})


register_when_used()
