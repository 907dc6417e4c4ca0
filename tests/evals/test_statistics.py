"""Uncertainties against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rwkvx_evals.statistics import Z, accuracy, tally, wilson


def test_standard_error() -> None:
    assert accuracy(3, 4) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4)))
    assert accuracy(0, 7) == (0.0, None)
    assert accuracy(50, 50) == (1.0, None)


@pytest.mark.parametrize("asked", [1, 2, 50, 10_000])
def test_wilsons_ends_solve_its_equation(asked: int) -> None:
    """(share - p)² = Z² p (1 - p) / n at both ends p; all or none right leave one end open."""
    for correct in {0, 1, asked // 3, asked - 1, asked}:
        share = correct / asked
        low, high = wilson(correct, asked)
        assert 0.0 <= low <= share <= high <= 1.0
        for end in (low, high):
            left, right = (share - end) ** 2, Z * Z * end * (1 - end) / asked
            assert left == pytest.approx(right, rel=1e-6, abs=1e-12)
    assert wilson(asked, asked)[0] == pytest.approx(asked / (asked + Z * Z))
    assert wilson(0, asked)[1] == pytest.approx(Z * Z / (asked + Z * Z))


def test_wilson_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        draws = rng.binomial(50, share, size=4000)
        inside = sum(wilson(int(c), 50)[0] <= share <= wilson(int(c), 50)[1] for c in draws)
        assert 0.91 < inside / 4000 < 0.985


def test_fifty_of_fifty_is_not_certain() -> None:
    found = tally([{"status": "ok", "correct": True}] * 50)
    assert (found["accuracy"], found["stderr"]) == (1.0, None)
    assert found["interval"] == [pytest.approx(0.9287, abs=1e-4), 1.0]
    mixed = tally([{"status": "ok", "correct": n < 3} for n in range(4)])
    assert mixed["stderr"] == pytest.approx(0.216506)
