"""How often coarse-to-fine selection reads what flat selection does: measure and command."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from rwkvx_evals.bench import selection
from rwkvx_evals.bench.command import bench_command
from rwkvx_kernels.chunk_attention import KeyValueCache


def cache_of(keys: list[list[float]]) -> KeyValueCache:
    """Chunks of one token, so that a chunk's mean is its key."""
    k = torch.tensor(keys)[None, :, None]
    return KeyValueCache(1, 1, k.shape[-1], 1, k, len(keys)).append(0, k, k)


def test_agreement_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores 4, 3, 3 (a copy), 1: of the chunks 0 and 2, flat takes 0 and (say) 1."""
    cache = cache_of([[4, 0], [3, 0], [3, 0], [1, 0], [0, 0]])
    found = {"flat": [0, 1], "coarse_to_fine": [0, 2]}

    def chosen(*_: object) -> Tensor:
        return torch.tensor(found[str(_[-1])])[None, None, None]

    monkeypatch.setattr(selection, "selected_chunks", chosen)
    q = torch.tensor([1.0, 0.0])[None, None, None]
    assert selection.agreement(q, cache, 5, 3) == {"same": 0.5, "as_good": 1.0}
    found["coarse_to_fine"] = [0, 3]
    assert selection.agreement(q, cache, 5, 3) == {"same": 0.5, "as_good": 0.5}
    found["coarse_to_fine"] = [3, -1]  # -1: none, which counts for nothing
    assert selection.agreement(q, cache, 5, 3) == {"same": 0.0, "as_good": 0.0}


def test_random_keys_are_found_while_all_are_scored() -> None:
    """Up to 768 chunks the two are the same; beyond, no order groups random keys."""
    assert selection.on_random_keys(700, 8, 4)["same"] == 1.0
    assert 0.2 < selection.on_random_keys(6000, 32, 4)["as_good"] < 0.99


def test_command(tmp_path: Path) -> None:
    arguments = ["selection", "--lengths", "2k", "--out", str(tmp_path)]
    result = CliRunner().invoke(bench_command, arguments)
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((tmp_path / "results.json").read_text())["lengths"]
    assert entry["chunks"] == 128
    assert [x["same"] for x in entry["blocks"]] == [1.0, 1.0]
    assert "| 2k | 128 | 100.00% |" in (tmp_path / "report.md").read_text()


def test_lengths_that_are_too_short(tmp_path: Path) -> None:
    arguments = ["selection", "--lengths", "1k", "--out", str(tmp_path)]
    assert CliRunner().invoke(bench_command, arguments).exit_code != 0
