"""Launch options beside each other, on a GPU or in Triton's interpreter."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx.errors import InputError
from rwkvx_evals.bench.command import bench_command
from rwkvx_evals.bench.kernels import stopwatch, variants
from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_kernels.chunk_attention import triton_ops
from rwkvx_kernels.tools.triton_options import Options

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"CHUNK": 16, "HEADS": 1, "SIZE": 16, "TOPK": 3, "SECONDS": 0.0, "VOCABULARY": 50}
    for name, value in tiny.items():
        monkeypatch.setattr(variants, name, value)
    monkeypatch.setattr(stopwatch, "REPEATS", (1, 1))
    monkeypatch.setattr(stopwatch, "WARM_UPS", 0)


@pytest.mark.parametrize("stage", ["chunk_select.flat", "chunk_attention.keys"])
def test_variants_of_a_stage(stage: str, tmp_path: Path) -> None:
    said: list[str] = []
    others = [Options(16, 16, 4, 1), Options(32, 16, 4, 1), Options(24, 16, 4, 1)]
    variants.run(stage, others, tmp_path, 70, DEVICE, said.append)
    results = json.loads((tmp_path / "variants.json").read_text())
    (row,) = results["stages"]
    assert row["stage"] == stage
    assert set(row["times_own"]) == {"16x16x4x1", "32x16x4x1"}
    assert len(row["seconds"][OURS]) == len(row["seconds"]["16x16x4x1"]) > 0
    assert list(row["left_out"]) == ["24x16x4x1"]  # no power of two
    assert said[0].startswith(f"{stage}: ")
    assert len(said) == 4


def test_what_computes_something_else_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = triton_ops.attend_sequences, []

    def broken(*args):  # type: ignore[no-untyped-def]
        o, lse = honest(*args)
        calls.append(1)
        return (o if len(calls) != 2 else 2 * o), lse

    monkeypatch.setattr(triton_ops, "attend_sequences", broken)
    results = variants.run("chunk_attention.own", [Options(16, 16, 4, 1)], tmp_path, 40, DEVICE)
    (row,) = results["stages"]
    assert "computes something else" in row["left_out"]["16x16x4x1"]


def test_neighbours_are_one_step_away() -> None:
    own = Options(64, 16, 4, 1)
    assert len(variants.neighbours(own)) == 5
    for other in variants.neighbours(own):
        assert sum(a != b for a, b in zip(own, other, strict=True)) == 1


@pytest.mark.parametrize("text", ["", "64", "64x64x4", "64x64x4x0", "axbxcxd", "64x64x4x2,"])
def test_bad_variants(text: str) -> None:
    with pytest.raises(InputError, match="ROWSxCOLUMNSxWARPSxSTAGES"):
        variants.parse(text)


def test_bad_stages(tmp_path: Path) -> None:
    for stage in ("fft", "chunk_select.fft"):
        with pytest.raises(InputError, match=r"choose a family or one of chunk_select.means"):
            variants.run(stage, None, tmp_path, device="cpu")
    result = CliRunner().invoke(bench_command, ["kernels", "--variants"])
    assert "--stage" in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    arguments = ["kernels", "--stage", "chunk_select", "--variants"]
    result = CliRunner().invoke(bench_command, arguments)
    assert isinstance(result.exception, InputError)
    assert "torch sees none here" in str(result.exception)
    assert "\n" not in str(result.exception)


SMALL = [
    "time_mix.keys",
    "time_mix.keys_gradients",
    "time_mix.finish",
    "time_mix.finish_gradients",
    "time_mix.step",
    "token_shift.forward",
    "token_shift.backward",
    "token_shift.norm_forward",
    "token_shift.norm_backward",
    "channel_mix.forward",
    "channel_mix.backward",
    "linear.entropy",
]


@pytest.mark.parametrize("stage", SMALL)
def test_variants_of_what_stands_beside_products(stage: str, tmp_path: Path) -> None:
    """Another size of programs computes the same; one that is no power of two is left out."""
    others = [Options(16, 16, 4, 1), Options(16, 2, 4, 1)]
    results = variants.run(stage, others, tmp_path, 20, DEVICE, lambda _: None)
    (row,) = results["stages"]
    assert set(row["times_own"]) == {"16x16x4x1", "16x2x4x1"}


def test_every_stage_of_these_tables_has_a_call() -> None:
    found = variants.families()
    families = {stage.partition(".")[0] for stage in SMALL}
    assert {f"{x}.{row.stage}" for x in families for row in found[x].table} == set(SMALL)
    assert {f"{x}.{stage}" for x in families for stage in found[x].calls} == set(SMALL)
