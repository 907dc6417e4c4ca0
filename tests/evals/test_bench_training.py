"""`rwkvx bench training`: what it counts, that steps learn, its files, bad input."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rwkvx.cli.main import cli
from rwkvx.errors import InputError
from rwkvx_evals.bench.training import Products, Settings, step_of

SHAPE = """
model:
  vocab_size: 40
  width: 32
  head_size: 16
  pattern: [rwkv7, sparse]
  chunk_size: 16
  topk: 2
  key_conv: 4
"""


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "shape.yaml"
    path.write_text(SHAPE)
    return str(path)


def settings(shape: str, **changes: object) -> Settings:
    values = {"length": 32, "lengths": (), "processes": 1, "precision": "float32"}
    return Settings(shape, **{**values, "threads": 1, "repeats": 1, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_learns_and_products_are_those_of_its_matrices(shape: str, precision: str) -> None:
    step = step_of(settings(shape, precision=precision), 2, 16)
    before = {n: x.detach().clone() for n, x in step.model.named_parameters()}
    for _ in range(3):  # some factors are zeros at first, and so are gradients of others
        step()
    assert not any(
        torch.equal(x, before[n]) for n, x in step.model.named_parameters() if x.dim() > 1
    )
    from torch.utils.flop_counter import FlopCounterMode

    products = Products(step.model, 32, step.half)
    with FlopCounterMode(display=False) as counted:
        products()
    linear = sum(x.weight.numel() for x in step.model.modules() if isinstance(x, torch.nn.Linear))
    low_rank = sum(
        x.numel()
        for n, x in step.model.named_parameters()
        if n[-2:] in ("w1", "w2", "a1", "a2") or n[-2:] in ("v1", "v2", "g1", "g2")
    )
    assert products.flops == counted.get_total_flops() == 6 * 32 * (linear + low_rank)


def test_the_command_measures_all_three(shape: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["bench", "training", "--model", shape, "--length", "64", "--memory", "16,64"]
    done = CliRunner().invoke(cli, [*arguments, "--repeats", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert [(x["tokens"], x["rows"]) for x in results["memory"]] == [(16, 4), (64, 1)]
    assert all(x["peak"] > 1e6 for x in results["memory"])
    share, alone, together = (
        results["processes"][x]["median"] for x in ("share", "alone", "together")
    )
    assert share == pytest.approx(together / (2 * alone))
    report = (out / "report.md").read_text()
    assert f"**{share:.2f}** of the sum" in report
    assert f"{results['step']['ratio']['median']:.2f} times" in report


def test_bad_input(shape: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no multiple of 24"):
        settings(shape, lengths=(24, 64))
    with pytest.raises(InputError, match="2 tokens or more"):
        settings(shape, length=1)
    done = CliRunner().invoke(cli, ["bench", "training", "--model", "nothing"])
    assert isinstance(done.exception, InputError)
    assert "no shape 'nothing'" in str(done.exception)
