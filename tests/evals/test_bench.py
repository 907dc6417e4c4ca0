"""`rwkvx bench cpu` at a tiny shape: files complete, floor counted twice, errors in one line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import rwkvx
from rwkvx.cli import main
from rwkvx.costs import mixing_flops
from rwkvx.shipped import shipped_configs
from rwkvx_evals.bench import measure
from rwkvx_evals.bench.floor import (
    Products,
    bytes_per_token,
    plain_buffer,
    segments,
)
from rwkvx_evals.bench.subjects import open_model, random_model
from rwkvx_evals.bench.timing import Run, by_turns, ratio, spread

pytestmark = pytest.mark.slow

HAS_PEER = find_spec("rwkv_x") is not None
SHAPE: dict[str, Any] = {
    "vocab_size": 70,
    "width": 64,
    "pattern": ["rwkv7", "rwkv7", "sparse"],
    "chunk_size": 8,
    "topk": 3,
    "tokenizer": "bytes",
}


@pytest.fixture
def shape_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model": SHAPE}))
    return path


def bench(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(["bench", "cpu", "--threads", "1", *arguments])
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_everything_is_measured_and_written(
    shape_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status, printed, err = bench(
        [
            *("--model", str(shape_file), "--out", str(out), "--lengths", "5,24,40"),
            *("--decode", "2", "--repeats", "2", "--long", "40,100", "--window", "20"),
            *("--memory", "50"),
        ],
        capsys,
    )
    assert status == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["report.md", "results.json", "speed.png"]
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert results["machine"]["threads"] == 1
    assert {"cpu", "cores", "memory_bytes", "torch", "date", "commit"} <= set(results["machine"])
    names = {"ours", "floor"} | ({"peer"} if HAS_PEER else set())
    assert [entry["tokens"] for entry in results["prefill"]] == [5, 24, 40]
    for entry in results["prefill"]:
        assert set(entry["seconds"]) == names | {"low_rank"}
        assert set(entry["tokens_per_second"]) == names
        assert all(len(x) == 2 and min(x) > 0 for x in entry["seconds"].values())
        # Beyond topk · chunk_size the peer, which is dense, means something else.
        assert (entry["peer_difference"] is not None) == (HAS_PEER and entry["tokens"] <= 24)
    for entry in results["decode"]:
        assert set(entry["seconds_per_token"]) == names
        assert all(len(x) == 2 for x in entry["seconds_per_token"].values())
    assert [row["tokens"] for row in results["long"]["lengths"]] == [40, 100]
    assert results["long"]["lengths"][0]["ratio_to_shortest"]["of_means"] == 1.0
    memory = results["memory"]
    assert memory["peak_bytes"] >= memory["loaded_bytes"] > 50_000_000
    report = (out / "report.md").read_text()
    for part in ("Prefill", "Decoding", "Long prefill", "Memory"):
        assert f"## {part}\n" in report
    for line in ("prefill", "decode", "long", "memory", "report:"):
        assert line in printed
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_parts_can_be_left_out(
    tmp_path: Path, shape_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--model", str(shape_file), "--out", str(out), "--repeats", "1", "--no-peer"]
    status, _, err = bench([*options, "--lengths", "6", "--decode", "0"], capsys)
    assert status == 0, err
    results = json.loads((out / "results.json").read_text())
    assert not results["peer"]["measured"]
    assert "peer" not in results["prefill"][0]["seconds"]
    assert {"decode", "long", "memory"}.isdisjoint(results)
    assert "not asked for" in (out / "report.md").read_text()


def test_bfloat16_is_checked_against_float32(
    tmp_path: Path, shape_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--model", str(shape_file), "--out", str(out), "--dtype", "bfloat16"]
    status, _, err = bench([*options, "--lengths", "6", "--repeats", "1", "--decode", "1"], capsys)
    assert status == 0, err
    results = json.loads((out / "results.json").read_text())
    assert 0 < results["check"]["relative_error"]["ours"] < 0.1
    assert results["decode"][0]["bytes_per_token"] == 2 * expected_weights()


def config(**changes: Any) -> rwkvx.ModelConfig:
    return rwkvx.ModelConfig.from_dict({**SHAPE, **changes})


def expected_weights() -> int:
    """Weights of SHAPE that a decoded token reads, by hand."""
    width, rank, inner = 64, 32, 256
    mix = (
        4 * width**2 + 3 * 2 * width * rank + 6 * width + 2 * width + 2 * width + width + 2 * width
    )
    first, later = mix, mix + 2 * width * rank + width
    channel_mix, norms = 2 * width * inner + width, 4 * width
    return first + later + 4 * width**2 + 3 * (channel_mix + norms) + 4 * width + 70 * width


def test_the_floor_counts_what_it_computes() -> None:
    model = random_model(config())
    products, tokens = Products(model), 9000
    # By the shapes: four products of C² and two of 4C² in every block, and the head once.
    expected = 2 * (3 * (4 + 8) * 64**2 * tokens + 70 * 64)
    assert products.linear_flops(tokens) == expected
    low_rank = 2 * (2 * 4 - 1) * 2 * 64 * 32 * tokens  # w, a, g twice, v in the later block only
    assert products.low_rank_flops(tokens) == low_rank
    for run, flops in ((products.run_linear, expected), (products.run_low_rank, low_rank)):
        with FlopCounterMode(display=False) as counter:  # with gradients: others it cannot count
            run(tokens)
        assert counter.get_total_flops() == flops
    assert sum(segments(model, tokens)) == tokens
    assert segments(model, 5) == [5]


def test_a_model_computes_at_least_its_floor() -> None:
    model = random_model(config())
    products, tokens = Products(model), 50
    ids = measure.random_ids(model, tokens)
    with FlopCounterMode(display=False) as counter:  # with gradients: others it cannot count
        model(ids, logits="last")
    floor = products.linear_flops(tokens) + products.low_rank_flops(tokens)
    assert floor <= counter.get_total_flops() <= 2 * floor


def test_bytes_of_a_decoded_token() -> None:
    assert bytes_per_token(random_model(config())) == 4 * expected_weights()
    buffer = plain_buffer(1000)
    assert buffer.numel() * buffer.element_size() == 1000
    assert buffer.dtype == torch.float32


def test_flops_of_selection_and_attention() -> None:
    shape = config(pattern=["rwkv7", "sparse", "sparse"], chunk_size=4, topk=2)
    # Positions 6, 7, 8 have 1, 1, 2 past chunks and attend to 3 + 4, 4 + 4, 1 + 4 keys.
    assert mixing_flops(shape, 6, 9) == {
        "recurrence": 9 * 64 * 64 * 3,
        "selection": 2 * 2 * 64 * (1 + 1 + 2),
        "attention": 2 * 4 * 64 * (7 + 8 + 5),
    }


@pytest.mark.parametrize(
    ("window", "segment", "pieces"),
    [
        (8192, 682, [1364] * 5 + [1372]),
        (8192, 1024, [1024] * 8),
        (8192, 4096, [4096, 4096]),
        (20, 8192, [20]),
        (1500, 1024, [1500]),
    ],
)
def test_pieces_of_a_window_are_whole_segments(
    window: int, segment: int, pieces: list[int]
) -> None:
    assert measure.pieces_of(window, segment) == pieces


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = [Run("a", lambda: order.append("a"), units=2), Run("b", lambda: order.append("b"))]
    with tqdm(disable=True) as bar:
        seconds = by_turns(runs, 2, bar)
    assert "".join(order) == "ababab"
    assert [len(x) for x in seconds.values()] == [2, 2]
    assert ratio([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == {
        "median": 2.0, "min": 1.0, "max": 4.0, "of_smallest": 2.0
    }  # fmt: skip
    assert spread([3.0, 1.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_wrong_logits_are_not_timed() -> None:
    model = random_model(config())
    subjects = measure.Subjects(
        model,
        FlawedPeer(),
        Products(model),
        measure.random_ids(model, 9),  # type: ignore[arg-type]
    )
    with tqdm(disable=True) as bar, pytest.raises(rwkvx.InputError, match="nothing was timed"):
        measure.measure_prefill(subjects, 9, 1, bar)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    subjects.peer = None
    with tqdm(disable=True) as bar, pytest.raises(rwkvx.InputError, match="not numbers"):
        measure.measure_prefill(subjects, 9, 1, bar)


class FlawedPeer:
    """A peer with logits of its own."""

    dtype, tolerance, rounds = "float32", 2e-5, True

    def prefill(self, ids: list[int]) -> tuple[torch.Tensor, None]:
        return torch.ones(70), None


def test_random_weights_leave_nothing_out(shape_file: Path) -> None:
    model, origin = open_model(str(shape_file), "float32")
    assert "random" in origin
    assert all(x.count_nonzero() == x.numel() for x in model.parameters())
    assert "rwkvx_0b2" in shipped_configs()


ERRORS = [
    (["--model", "no-such-model"], "nor a shape (chat"),
    (["--model", "./missing.yaml"], "cannot read missing.yaml"),
    (["--model", "SHAPE", "--lengths", "1"], "2 tokens or more"),
    (["--model", "SHAPE", "--lengths", "none"], "nothing to measure"),
    (["--model", "SHAPE", "--lengths", "4,x"], "length 'x' is not a positive number"),
    (["--model", "SHAPE", "--long", "8k"], "leaves nothing before its last 8192 tokens"),
    (["--model", "SHAPE", "--repeats", "0"], "must be a whole number from 1"),
    (["--model", "SHAPE", "--out", "/dev/null/x"], "cannot write"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[e[1][:12] for e in ERRORS])
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    shape_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(shape_file) if x == "SHAPE" else x for x in arguments]
    status, out, err = bench(arguments, capsys)
    assert (status, out) == (2 if "whole number" in message else 1, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["model: 3", "- a", "model: {width: 64}", "model: {odd: 1}", "{"])
def test_shape_files_that_do_not_fit(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    status, _, err = bench(["--model", str(path)], capsys)
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
