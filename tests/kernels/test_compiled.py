"""The cache of compiled loops on disk: never older than any source that a loop was made of, and
whole or not there, whatever was killed or damaged; a loaded loop is the one that was compiled."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from rwkvx_kernels.tools import numba_loops

pytestmark = pytest.mark.slow

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
# Too long for the compiler to inline of itself, wherever it is called.
LONG = "import math\n" + CALLED.format("0").replace(
    "return x", "\n    ".join(f"x += math.sin(x * {i})" for i in range(99)) + "\n    return x"
)
NAMED = (
    CALLING.replace("called(x)", "called(x) * called(x + 1)")
    + """
lines = calling.inspect_llvm().popitem()[1].splitlines()
print(any(" call " in line and "6called6called" in line for line in lines))
"""
)
THREADS = """
import numba
import numpy as np
from rwkvx_kernels.tools.numba_loops import loop, parallel_loop
@parallel_loop
def doubled(x, y):
    for i in numba.prange(len(x)):
        y[i] = 2 * x[i]
@loop
def summed(x):
    y = np.empty_like(x)
    doubled(x, y)
    return y.sum()
"""
NUMBERS = "import numpy as np\nfrom rwkvx_kernels.threads import {0}\nx = np.arange(1000.0)\n"
INNER, OUTER = NUMBERS + "doubled(x, x.copy())", NUMBERS + "print(summed(x))"
RIGHT = "999000.0\n"


class Package(NamedTuple):
    """A package of that name with this cache, and its own sources."""

    folder: Path

    def write(self, name: str, source: str) -> None:
        (self.folder / f"{name}.py").write_text(source)

    def start(self, source: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            **variables,
            "PYTHONPATH": str(self.folder.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment.pop("NUMBA_CACHE_DIR", None)
        return subprocess.Popen(
            [sys.executable, "-c", source],
            env=environment,
            cwd=self.folder.parent,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, source: str, **variables: str) -> str:
        """What is printed; the process ends well."""
        process = self.start(source, **variables)
        out, _ = process.communicate()
        assert process.returncode == 0
        return out

    def cached(self, name: str = "") -> list[Path]:
        return sorted(self.folder.rglob(f"{name}*.nbc"))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    folder = tmp_path / "rwkvx_kernels"
    (folder / "tools").mkdir(parents=True)
    for part in (folder, folder / "tools"):  # or an installed package of that name came before
        (part / "__init__.py").touch()
    shutil.copy(numba_loops.__file__, folder / "tools")
    return Package(folder)


def test_a_change_in_what_a_loop_calls_is_noticed(package: Package) -> None:
    package.write("calling", CALLING)

    def run(added: int) -> str:
        package.write("called", CALLED.format(added))
        return package.run("import rwkvx_kernels.calling")

    assert run(1) == "2 0\n"
    assert run(1) == "2 1\n"
    files = package.cached()
    assert run(5) == "6 0\n"
    assert len(package.cached()) == len(files)  # the old ones are gone
    assert not set(package.cached()) & set(files)


def test_threads_run_where_a_loaded_loop_calls_a_parallel_one(package: Package) -> None:
    """The first process is killed between the two loops; then the second loads one of them."""
    package.write("threads", THREADS)
    package.run(INNER.format("doubled"))
    for _ in range(2):
        assert package.run(OUTER.format("summed")) == RIGHT


@pytest.mark.parametrize("ours", ["1", "2", "3"])
def test_the_number_of_torch_threads_stays(package: Package, ours: str) -> None:
    """Sums of a run that is resumed in another process are made in the same order."""
    package.write("threads", THREADS)
    count = "import torch\nprint(torch.get_num_threads())\n"
    source = count + INNER.format("doubled") + "\n" + count
    assert package.run(source, OMP_NUM_THREADS="2", NUMBA_NUM_THREADS=ours) == "2\n2\n"


def test_what_a_loop_calls_is_inlined(package: Package) -> None:
    """Called by its name, it could be that of another loop, which was optimised otherwise."""
    package.write("called", LONG)
    package.write("calling", NAMED)
    assert package.run("import rwkvx_kernels.calling").endswith("False\n")


def test_of_processes_that_start_together_one_compiles(package: Package) -> None:
    """They would round sums otherwise, and the next process as one of them."""
    package.write("threads", THREADS)
    source = OUTER.format("summed") + "\nprint(sum(summed.stats.cache_misses.values()))"
    processes = [package.start(source) for _ in range(3)]
    printed = [process.communicate()[0] for process in processes]
    assert sorted(printed) == [RIGHT + "0\n", RIGHT + "0\n", RIGHT + "1\n"]


@pytest.mark.parametrize("damage", ["cut", "changed", "another's"])
def test_damaged_code_is_compiled_again(package: Package, damage: str) -> None:
    package.write("threads", THREADS)
    package.run(OUTER.format("summed"))
    inner, outer = package.cached("threads.doubled")[0], package.cached("threads.summed")[0]
    whole = outer.read_bytes()
    changed = {
        "cut": whole[: len(whole) // 2],
        "changed": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "another's": inner.read_bytes(),
    }
    outer.write_bytes(changed[damage])
    assert package.run(OUTER.format("summed")) == RIGHT
    assert outer.read_bytes() != changed[damage]


def test_a_kill_at_any_moment_of_a_first_run(package: Package, trials: int) -> None:
    package.write("threads", THREADS)
    began = time.monotonic()
    package.run(OUTER.format("summed"))
    longest = time.monotonic() - began
    draw = random.Random(0)
    for _ in range(trials // 20):
        for path in package.cached():
            path.unlink()
        process = package.start(OUTER.format("summed"))
        time.sleep(draw.uniform(0.2, 1) * longest)
        process.kill()
        process.communicate()
        for _ in range(2):
            assert package.run(OUTER.format("summed")) == RIGHT


def test_no_place_for_the_code_is_no_error(package: Package) -> None:
    package.write("threads", THREADS)
    full = f"import numba\nnumba.config.CACHE_DIR = '{package.folder}/kept'\n"
    gone = f"import shutil\nshutil.rmtree('{package.folder}/kept')\n"
    source = full + "import rwkvx_kernels.threads as t\n" + gone + OUTER.format("summed")
    package.folder.joinpath("kept").mkdir()
    assert package.run(source) == RIGHT
