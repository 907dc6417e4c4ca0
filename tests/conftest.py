"""Before any kernel is imported: without a GPU, Triton's interpreter runs the kernels.

Whether a kernel is interpreted is decided when its module is imported, so it holds for the whole
process. Compiling ahead of time is impossible in such a process: see kernels/ahead_of_time.py.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `mutation.py`, which folders share

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Read when the first matrix product starts: without it deterministic ones are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --slow`: ten times as many changed inputs for the tests that change some."""
    parser.addoption("--slow", action="store_true", help="1,000 changed inputs a test, not 100")


@pytest.fixture(scope="session")
def trials(pytestconfig: pytest.Config) -> int:
    """How many changed inputs a test tries."""
    return 1000 if pytestconfig.getoption("--slow") else 100


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none.

    The others of a module that names a DEVICE run kernels at small shapes, wherever they are: they
    are marked `small`, and where there is a GPU `gpu` as well.
    """
    there = torch.cuda.is_available()
    for item in items:
        real = item.get_closest_marker("gpu") is not None
        if real and not there:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if not real and hasattr(getattr(item, "module", None), "DEVICE"):
            item.add_marker("small")
            if there:
                item.add_marker("gpu")
