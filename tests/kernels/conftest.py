"""Lets the tests of this folder share `measure.py`; not-a-number in all uninitialised memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """`torch.empty` is full of NaN, so that reading what nobody wrote cannot pass."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # On a GPU, references use operations that have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
