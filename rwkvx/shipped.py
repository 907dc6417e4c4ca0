"""What lies inside the package by name: models, and configs to train and measure."""

from importlib.resources import files
from pathlib import Path

from rwkvx.files import is_there, user_path

__all__ = ["MODELS", "find_config", "shipped_configs", "shipped_models"]

MODELS = Path(str(files("rwkvx"))) / "models"
CONFIGS = Path(str(files("rwkvx_configs")))


def shipped_models() -> list[str]:
    """Names of the models, for `rwkvx.load`."""
    return sorted(p.parent.name for p in MODELS.glob("*/config.json"))


def shipped_configs() -> list[str]:
    """Names of the configs, for `rwkvx train` and `rwkvx bench`."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def find_config(name: str) -> Path | None:
    """The YAML file that `name` means, a path (.yaml, .yml) or a shipped config; None: neither."""
    path = user_path(name)
    if path.suffix in (".yaml", ".yml") and ("/" in name or is_there(path)):
        return path
    shipped = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    return shipped if "/" not in name and shipped.is_file() else None
