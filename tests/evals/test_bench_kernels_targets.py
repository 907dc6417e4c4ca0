"""The summary of a kernel benchmark, its report and pictures, from rows made for these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rwkvx_evals.bench.kernels import chunk_attention, models, training, wkv7
from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_evals.bench.kernels.plot import draw
from rwkvx_evals.bench.kernels.report import between, pictures, render
from rwkvx_evals.bench.kernels.run import FAMILIES
from rwkvx_evals.bench.kernels.targets import Rows, summary, targets
from rwkvx_evals.bench.timing import ratio

K = 1024
FLASH, CUDNN = "dense SDPA flash", "dense SDPA cuDNN"


def row(family: str, tokens: int, ours: list[float], **peers: list[float]) -> dict[str, Any]:
    """A measured row; what no test looks at is made up."""
    seconds = {OURS: ours, **peers}
    return {
        "family": family,
        "tokens": tokens,
        "status": "measured",
        "units": models.STEPS if family == models.DECODE else tokens,
        "flops": 1e12,
        "errors": dict.fromkeys(seconds, 2e-3) | {OURS: 1e-3},
        "seconds": seconds,
        "left_out": {},
        "floor_seconds": {"bytes": 1e-3, "products": 5e-4},
        "times_floor": ours[0] / 1e-3,
        "faster_than": {n: ratio(x, ours) for n, x in seconds.items() if n != OURS},
        "extra_bytes": 2**30,
        "over_inputs_and_outputs": 0.75,
        "joules_per_token": dict.fromkeys(seconds, 2e-3) if family in models.PLANS else {},
    }


def rows() -> list[dict[str, Any]]:
    """Enough for every target."""
    return [
        row(chunk_attention.FORWARD, 128 * K, [1.0, 1.1, 0.9],
            **{FLASH: [20.0, 20.0, 20.0], CUDNN: [13.0, 13.2, 12.6]}),
        row(chunk_attention.BOTH, 128 * K, [3.0], **{FLASH: [27.0]}),
        row(chunk_attention.FORWARD, 8 * K, [0.5], **{FLASH: [0.6], CUDNN: [0.4]}),
        row(chunk_attention.BOTH, 8 * K, [1.0], **{CUDNN: [1.0]}),
        row(chunk_attention.FORWARD, 32 * K, [0.5], **{CUDNN: [2.0]}),
        row(chunk_attention.BOTH, 32 * K, [1.0], **{FLASH: [2.5]}),
        row(chunk_attention.PART, 128 * K, [4e-3, 5e-3, 10e-3]),
        row(chunk_attention.COARSE, 64 * K, [1.0, 1.1, 0.9]),
        row(chunk_attention.COARSE, 1024 * K, [17.6, 17.6, 16.0]),
        row(chunk_attention.FORWARD, 512 * K, [8.0]),
        row(chunk_attention.BOTH, 512 * K, [8.0]) | {"over_inputs_and_outputs": 1.5},
        row(wkv7.FORWARD, 64 * K, [2.5e-3], **{wkv7.FLA: [5e-3]}),
        row(wkv7.ROWS, 4 * K, [1.0], **{wkv7.FLA: [1.25]}),
        row(training.STEP, 16 * K, [1e-3, 2e-3, 2.5e-3]),
        row(wkv7.FORWARD, 1024 * K, [64e-3]),
        row(wkv7.BOTH, 16 * K, [2.0]) | {
            "seconds": {OURS: [2.0], wkv7.FLA: [3.0], wkv7.FLA_BOUNDED: [2.5]},
            "errors": {OURS: 3e-3, wkv7.FLA: 4e-3, wkv7.FLA_BOUNDED: 2e-3},
            "faster_than": {n: ratio([x], [2.0])
                            for n, x in ((wkv7.FLA, 3.0), (wkv7.FLA_BOUNDED, 2.5))},
        },
        row(models.DECODE, 4 * K, [1.0], **{models.DENSE: [2.0]}),
        row(models.DECODE, 1024 * K, [1.05], **{models.DENSE: [30.0]}),
        row(models.PREFILL, 16 * K, [1.0], **{models.DENSE: [2.0]}),
    ]  # fmt: skip


def results(cases: list[dict[str, Any]]) -> dict[str, Any]:
    machine = dict.fromkeys(("gpu", "triton", "fla-core", "flash-attn", "commit"))
    return {
        "machine": {**machine, "cpu": "no machine: a test", "torch": "0", "date": "never"},
        "ceilings": {"copy, GB/s": 1000.0},
        "energy": "none",
        "budget_seconds": 1,
        "seconds": 1.0,
        "cases": cases,
        "summary": summary(cases),
    }


def test_every_target_is_judged() -> None:
    """Against the fastest of the peers, by the median of the turns."""
    found = [(x["reached"], x["measured"] and x["measured"]["median"]) for x in summary(rows())]
    expected = [
        (False, 1.25),  # 2.5 of fla's faster form over 2.0
        (False, 1.25),
        (True, 2.0),
        (False, 1.5),  # whose error is 2e-3
        (True, 2.5),
        (True, 13.0),  # cuDNN, in each turn
        (False, 9.0),
        (False, 0.8),
        (True, 4.0),
        (True, 1.0),
        (False, 2.5),
        (True, 200.0),
        (False, 1.6),
        (True, 1.1),
        (True, 0.75),
        (False, 1.5),
        (False, 25.0),
        (True, 1.05),
    ]
    assert [x for x, _ in found] == [x for x, _ in expected]
    assert [x for _, x in found] == pytest.approx([x for _, x in expected])
    growth = next(x for x in summary(rows()) if "coarse to fine" in x["what"])["measured"]
    assert growth["min"] == pytest.approx(16 / 1.1 / 16)
    assert growth["max"] == pytest.approx(17.6 / 0.9 / 16)


def test_what_was_not_measured_is_not_reached() -> None:
    failed = [{**x, "status": "failed"} for x in rows()]
    assert {(x["measured"], x["reached"]) for x in summary(failed)} == {(None, None)}
    alone = [row(chunk_attention.FORWARD, 128 * K, [1.0])]
    alone[0]["over_inputs_and_outputs"] = None
    assert all(x["reached"] is None for x in summary(alone))


def test_the_plan_measures_every_target_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that targets read are cases of the first importance, which all fit together."""
    asked: set[tuple[str, int]] = set()

    class Asked(Rows):
        def __getitem__(self, key: tuple[str, int]) -> dict[str, Any]:
            asked.add(key)
            return super().__getitem__(key)

    for target in targets():
        assert target.judge(Asked(rows()))["measured"]
    for module in (wkv7, chunk_attention):  # peers take time, too
        monkeypatch.setattr(f"{module.__name__}.installed", lambda _: "1", raising=False)
    cases = [case for family in FAMILIES.values() for case in family.cases("cuda", ())]
    first = {(case.family, case.tokens) for case in cases if case.importance == 1}
    assert asked <= first
    assert sum(case.cost for case in cases if case.importance == 1) < 400
    assert len({(case.family, case.tokens) for case in cases}) == len(cases)


def test_report_and_pictures(tmp_path: Path) -> None:
    left_out = {"family": "a|b", "tokens": 3, "status": "left out", "reason": "no time"}
    rows_ = rows()
    rows_[0]["left_out"] = {"flash-attn": "out of memory"}
    report = render(results([*rows_, left_out]))
    for text in (
        "tokens: times as fast as dense SDPA | ≥ 12 | 13 (12 … 14) | yes |",
        "| ≥ 200 TFLOP/s | 200 TFLOP/s (100 … 250) | yes |",
        "| a/b | 3 | left out | no time |",
        "| chunk attention forward: flash-attn | 131,072 | left out | out of memory |",
        "| hybrid | 32 |",
        "| dense Transformer | 16 |",
        "![time per token by length](models.png)",
    ):
        assert text in report, text
    for name, chosen in pictures(rows_).items():
        path = tmp_path / f"{name}.png"
        draw(chosen, results(rows_), path)
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("values", "text"),
    [((1.0, 1.0, 1.0), "1"), ((1234.5, 1000.0, 2000.0), "1,234 (1,000 … 2,000)")],
)
def test_spreads_as_text(values: tuple[float, float, float], text: str) -> None:
    assert between(dict(zip(("median", "min", "max"), values, strict=True))) == text
