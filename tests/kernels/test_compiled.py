"""The cache of compiled loops on disk: never older than any source that a loop was made of."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rwkvx_kernels.tools import numba_loops

CALLED = """
from rwkvx_kernels.tools.numba_loops import loop
@loop
def called(x):
    return x + {}
"""
CALLING = """
from rwkvx_kernels.called import called
from rwkvx_kernels.tools.numba_loops import loop
@loop
def calling(x):
    return called(x)
print(calling(1), sum(calling.stats.cache_hits.values()))
"""


def test_a_change_in_what_a_loop_calls_is_noticed(tmp_path: Path) -> None:
    package = tmp_path / "rwkvx_kernels"
    (package / "tools").mkdir(parents=True)
    shutil.copy(numba_loops.__file__, package / "tools")
    (package / "calling.py").write_text(CALLING)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)

    def run(added: int) -> str:
        (package / "called.py").write_text(CALLED.format(added))
        command = [sys.executable, "-c", "import rwkvx_kernels.calling"]
        return subprocess.check_output(command, env=environment, cwd=tmp_path, text=True)

    assert run(1) == "2 0\n"
    assert run(1) == "2 1\n"
    assert run(5) == "6 0\n"
