"""The kernel benchmark: on the CPU with tiny cases, whose times mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from rwkvx.errors import InputError
from rwkvx_evals.bench.command import bench_command
from rwkvx_evals.bench.kernels import run as bench
from rwkvx_evals.bench.kernels import stopwatch
from rwkvx_evals.bench.kernels.budget import Budget, ordered
from rwkvx_evals.bench.kernels.case import OURS, Case, planned


def raises(error: Exception) -> Callable[[], Any]:
    def call() -> None:
        raise error

    return call


def sum_case(tokens: int, **changes: Any) -> Case:
    x = torch.ones(8)
    case = Case(
        family="sum",
        tokens=tokens,
        bytes=32.0,
        flops=8.0,
        subjects=lambda: {OURS: x.sum, "peer": x.mean},
        errors={OURS: lambda: 1e-3, "peer": lambda: 0.5},
        tolerance=1e-2,
    )
    return replace(case, **changes)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the cases given in the place of all others."""
    monkeypatch.setattr(bench, "SECONDS", 0.0)

    def run(*cases: Case, seconds: float = 100, said: list[str] | None = None) -> dict[str, Any]:
        made = SimpleNamespace(cases=lambda device, lengths: cases)
        monkeypatch.setitem(bench.FAMILIES, "tiny", made)
        say = (lambda _: None) if said is None else said.append
        return bench.run(["tiny"], (), tmp_path, "cpu", seconds, say)

    return run


def test_files(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    said: list[str] = []
    assert run(sum_case(16), sum_case(32), said=said)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"]
    assert [row["tokens"] for row in results["cases"]] == [16, 32]
    row = results["cases"][0]
    assert row["status"] == "measured"
    assert row["floor_seconds"]["bytes"] == 32 / (1e9 * results["ceilings"][bench.COPY])
    assert row["floor_seconds"]["products"] == 8 / (1e12 * results["ceilings"][bench.PRODUCT])
    ours, peer = row["seconds"][OURS], row["seconds"]["peer"]
    assert len(ours) == len(peer) == stopwatch.REPEATS[0]
    pairs = [b / a for a, b in zip(ours, peer, strict=True)]
    assert row["faster_than"]["peer"]["max"] == max(pairs)
    assert row["errors"] == {OURS: 1e-3, "peer": 0.5}
    assert [line.split(":")[0] for line in said[:2]] == ["ceiling", "ceiling"]
    assert said[-1].startswith("[2/2, ")
    assert " s left] sum, 32 tokens: " in said[-1]
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert "| sum | 32 |" in report
    assert "| not measured |" in report
    assert "## Not measured" not in report


def test_what_is_wrong_is_not_timed_and_the_others_go_on(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = raises(AssertionError("timed"))
    wrong = sum_case(
        16, family="wrong", errors={OURS: lambda: float("nan")}, subjects=lambda: {OURS: timed}
    )
    rows = run(wrong, sum_case(32))["cases"]
    assert [row["status"] for row in rows] == ["wrong", "measured"]
    assert "relative error nan, at most 1.0e-02" in rows[0]["reason"]
    assert "| wrong | 16 | wrong | relative error nan" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(bench, "run", partial(bench.run, device="cpu"))
    arguments = ["kernels", "--family", "tiny", "--out", str(tmp_path), "--budget", "50"]
    result = CliRunner().invoke(bench_command, arguments)
    assert "report:" in result.output
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "computed wrong: wrong"
    assert json.loads((tmp_path / "results.json").read_text())["budget_seconds"] == 50


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [
        (NotImplementedError("not here"), "not there", "not here"),
        (torch.OutOfMemoryError("Tried to allocate ..."), "failed", "out of memory"),
        (RuntimeError("first\nsecond"), "failed", "RuntimeError: first"),
        (AssertionError(), "failed", "AssertionError"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_failures_are_recorded(
    error: Exception, status: str, why: str, run: Callable[..., dict[str, Any]]
) -> None:
    """Of ours, wherever they happen; a peer that fails is left out alone."""
    x = torch.ones(3)
    cases = [
        sum_case(1, errors={OURS: raises(error)}),
        sum_case(2, subjects=raises(error)),
        sum_case(3, subjects=lambda: {OURS: raises(error)}),
        sum_case(4, subjects=lambda: {OURS: x.sum, "peer": raises(error)}),
        sum_case(5, errors={OURS: lambda: 0.0, "peer": raises(error)}),
    ]
    rows = run(*cases)["cases"]
    assert [row["status"] for row in rows] == [status] * 3 + ["measured"] * 2
    assert {row["reason"] for row in rows[:3]} == {why}
    for row in rows[3:]:
        left_out = why if status != "not there" else f"NotImplementedError: {why}"
        assert row["left_out"] == {"peer": left_out}
        assert set(row["seconds"]) == {OURS}


def test_nothing_follows_on_a_broken_gpu(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "free", lambda _: raises(RuntimeError("illegal memory access"))())
    rows = run(sum_case(16), sum_case(32))["cases"]
    assert [row["status"] for row in rows] == ["measured", "left out"]
    assert "illegal memory access" in rows[1]["reason"]


def test_budget(run: Callable[..., dict[str, Any]]) -> None:
    """Dear cases are left out, cheap ones after them still fit; importance comes first."""
    now = 100.0
    budget = Budget(10, clock=lambda: now)
    assert budget.lacks(sum_case(1, cost=10.0)) is None
    now = 107.0
    assert budget.left() == 3
    assert budget.lacks(sum_case(1, cost=4.0)) == "takes about 4 s, 3 s were left"
    now = 120.0
    assert budget.lacks(sum_case(1, cost=1.0)) == "takes about 1 s, 0 s were left"
    dear = sum_case(16, importance=2, cost=1e6)
    cases = [sum_case(8, importance=3), dear, sum_case(32), sum_case(64)]
    assert [case.tokens for case in ordered(cases)] == [32, 64, 16, 8]
    rows = run(*cases)["cases"]
    assert [row["status"] for row in rows] == ["measured", "measured", "left out", "measured"]
    assert [row["tokens"] for row in rows] == [32, 64, 16, 8]


def test_lengths_choose_of_a_plan() -> None:
    assert planned({8: 1, 16: 2}, ()) == {8: 1, 16: 2}
    assert planned({8: 1, 16: 2}, (16, 32)) == {16: 2, 32: 3}


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
