"""Before any kernel is imported: without a GPU, Triton's interpreter runs the kernels.

Whether a kernel is interpreted is decided when its module is imported, so it holds for the whole
process. Compiling ahead of time is impossible in such a process: see kernels/ahead_of_time.py.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
