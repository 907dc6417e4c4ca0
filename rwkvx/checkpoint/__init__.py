"""Loading and saving models."""

from rwkvx.checkpoint.load import load

__all__ = ["load"]
