"""Every kernel compiles for a GPU, the largest families for one of each maker.

Here the short list of cases; `scripts/compile_kernels.sh` has all, for all that are supported, and
any version of Triton.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

SCRIPT = Path(__file__).parent / "ahead_of_time.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


FAMILIES = (
    *("wkv7", "chunk_select", "chunk_attention", "time_mix", "token_shift", "channel_mix"),
    *("linear", "one_token"),
)


@pytest.mark.parametrize(
    ("target", "families"), [("sm_90", FAMILIES), ("gfx942", ("wkv7", "chunk_attention"))]
)
def test_every_kernel(target: str, families: tuple[str, ...], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    process = run(*families, "--quick", "--targets", target, "--json", str(report))
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads(report.read_text())["results"]
    assert {x["target"] for x in results} == {target}
    assert len({x["kernel"] for x in results}) >= 4 * len(families)
    assert not [x for x in results if x["problems"]]


def test_what_is_wrong_is_found() -> None:
    process = run("broken", "--targets", "sm_90,gfx942")
    assert process.returncode == 1, process.stdout + process.stderr
    lines = {tuple(line.split()[:3:2]): line for line in process.stdout.splitlines()}
    assert "bytes of shared memory > 65536" in lines["gfx942", "greedy"]
    assert "spills registers" in lines["sm_90", "spilling"]
    assert "does not compile" in lines["sm_90", "wrong"]
    assert "does not wait" in lines["sm_90", "hasty"]
    assert lines["sm_90", "right"].endswith("mma.sync ok")
    assert lines["gfx942", "right"].endswith("v_mfma ok")
