"""The kernel benchmark: on the CPU with tiny cases, whose times mean nothing."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from rwkvx.errors import InputError
from rwkvx_evals.bench.command import bench_command
from rwkvx_evals.bench.kernels import run as bench
from rwkvx_evals.bench.kernels.case import Case


def cases(device: str, lengths: tuple[int, ...], error: float = 1e-3) -> list[Case]:
    x = torch.ones(8, device=device)
    return [
        Case(
            family="sum",
            tokens=tokens,
            bytes=32.0,
            flops=8.0,
            subjects=lambda: {"ours": x.sum, "peer": x.mean},
            errors=lambda: {"ours": error, "peer": 0.5},
            tolerance=1e-2,
        )
        for tokens in lengths
    ]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setitem(bench.FAMILIES, "tiny", SimpleNamespace(cases=cases))
    wrong = SimpleNamespace(cases=partial(cases, error=float("nan")))
    monkeypatch.setitem(bench.FAMILIES, "wrong", wrong)


def test_files(tiny: None, tmp_path: Path) -> None:
    said: list[str] = []
    bench.run(["tiny"], (16, 32), tmp_path, "cpu", said.append)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"]
    assert [row["tokens"] for row in results["cases"]] == [16, 32]
    row = results["cases"][0]
    floor = 32 / (1e9 * results["ceilings"]["copy, GB/s"])
    assert row["times_floor"] == pytest.approx(row["seconds"]["ours"] / floor)
    assert row["faster_than"]["peer"] == row["seconds"]["peer"] / row["seconds"]["ours"]
    assert [line.split(":")[0] for line in said[:2]] == ["ceiling", "ceiling"]
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    report = (tmp_path / "report.md").read_text()
    assert "| sum | 32 |" in report
    assert "peer" in report


def test_what_is_wrong_is_not_timed(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sum computes something wrong .* nothing was timed"):
        bench.run(["wrong"], (16,), tmp_path, "cpu", lambda _: None)
    assert not json.loads((tmp_path / "results.json").read_text())["complete"]


def test_wkv7_cases_compute_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.FAMILIES["wkv7"], "CHECKED_TOKENS", 24)
    forward, both = bench.FAMILIES["wkv7"].cases("cpu", (16,))
    assert forward.subjects()["ours"]().shape == (1, 16, 16, 64)
    gradients = both.subjects()["ours"]()
    assert len(gradients) == 6
    for case in (forward, both):
        assert 0 < case.errors()["ours"] < case.tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    result = CliRunner().invoke(bench_command, ["kernels"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).count("\n") == 0
    assert "torch sees none here" in str(result.exception)


def test_unknown_family() -> None:
    result = CliRunner().invoke(bench_command, ["kernels", "--family", "fft"])
    assert isinstance(result.exception, InputError)
    assert "no kernels 'fft'" in str(result.exception)
