"""The forecast counts the launches that there are, and bytes above the floor."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton (the extra gpu)")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from test_chunk_counts import call, inputs

from rwkvx_evals.bench.kernels.forecast import render, stages


def test_launches_are_those_counted() -> None:
    counts, forward, _ = call(inputs(8192))
    found = stages(8192)
    told = {name: sum(x.launches for x in parts) for name, parts in found.items()}
    assert told["selection"] + told["attention"] == forward
    assert sum(told.values()) == len(counts.kernels)


def test_more_tokens_take_longer_and_nothing_beats_the_floor() -> None:
    for tokens in (8192, 131072):
        one = 2.0 * 64 * 16 * tokens
        near, far = stages(tokens), stages(2 * tokens)
        assert sum(x.bytes for part in near.values() for x in part) > 12 * one
        for name, parts in near.items():
            for a, b in zip(parts, far[name], strict=True):
                assert a.seconds <= b.seconds
                assert a.seconds > a.bytes / 2.983e12


def test_table() -> None:
    lines = [x for x in render().splitlines() if x.startswith("| 131,072")]
    assert any("| forward | 7 |" in x and "37.8" in x for x in lines)
