"""Loading, saving and converting models: one module a format, `formats.py` names them all."""

from rwkvx.checkpoint.load import load

__all__ = ["load"]
