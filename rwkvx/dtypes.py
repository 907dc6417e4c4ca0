"""The dtypes that weights may have, by name, and which one to try when numbers overflow."""

from typing import Any

__all__ = ["DTYPES", "wider"]

FLOATS = ("float32", "bfloat16", "float16", "float64")
DTYPES = (*FLOATS, "int8")  # for loading: int8 rounds the projections of a bfloat16 model
_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32", "float32": "float64"}


def wider(dtype: Any) -> str:
    """What to try where `dtype` (a name, or torch's own) is too narrow."""
    return _WIDER.get(str(dtype).removeprefix("torch."), "float32")
