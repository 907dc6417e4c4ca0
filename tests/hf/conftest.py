"""Lets the tests of this folder share `adapters.py` and the small models of `tests/model`."""

import sys
from pathlib import Path

for folder in ("hf", "model"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
