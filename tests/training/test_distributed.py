"""Two processes on one machine (gloo): they do what one does, and go on from one another."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Writer, weights

import rwkvx
from rwkvx import InputError
from rwkvx.training.batches import Batch, check_division, own_batches
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer
from rwkvx.training.world import World

pytestmark = pytest.mark.slow

# Sums over two processes round differently from sums over four rows, and Adam turns a rounding of a
# tiny gradient into one of a step; a step moves a weight by the learning rate.
RATE = 1e-3
TIMEOUT = 300  # seconds; a machine with nothing else to do takes twenty
STAGES = [
    {"steps": 2, "length": 24, "batch": 4, "learn": "sparse"},
    {"steps": 6, "length": 24, "batch": 4},
]
SETTINGS: dict[str, Any] = {
    # A constant rate: an extended run has the rates of one that was that long from the start.
    "optimizer": {"lr": RATE, "warmup": 1, "eps": 1e-6, "schedule": "wsd", "decay": 0},
    "average": 0.5,
    "eval_batches": 3,
    "save_every": 1,
}


def settings(steps: int) -> dict[str, Any]:
    """A run of two stages, of so many steps in all."""
    return {**SETTINGS, "stages": [STAGES[0], {**STAGES[1], "steps": steps - 2}]}


def launch(path: Path, *options: str, processes: int = 2, restarts: int = 0) -> Any:
    return start(
        "-m", "rwkvx", "train", str(path), *options, processes=processes, restarts=restarts
    )


def start(*what: str, processes: int = 2, restarts: int = 0) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--master-port={port}"),
        *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"),
        *what,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )


def children(process: Any) -> list[int]:
    """The processes that torchrun has started, by rank."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(x) for x in path.read_text().split()]


def run(path: Path, *options: str) -> str:
    process = launch(path, *options)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, out
    return str(out)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], steps: int) -> None:
    assert a.keys() == b.keys()
    for name in a:
        far = (a[name] - b[name]).abs()
        # Nearly all agree to rounding; where a gradient is no more than rounding, its sign is free.
        assert float(far.max()) <= 2.5 * RATE * steps, name
        assert float((far > 1e-5).float().mean()) < 0.01, name


def assert_same_run(one: Path, two: Path, steps: int) -> None:
    """Weights, losses of every step, evaluation: those of one process."""
    name = f"small-step-{steps}"
    found, expected = (weights(rwkvx.load(folder / name)) for folder in (two, one))
    assert_close(found, expected, steps)
    results = [json.loads((x / "results.json").read_text())[name] for x in (one, two)]
    losses = [x["evaluation"]["loss/eval"] for x in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    curves = []
    for folder in (one, two):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves.append([x["loss/train"] for x in lines if "loss/train" in x])
    assert len(curves[0]) == steps
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_two_processes_do_what_one_does(write_config: Writer, tmp_path: Path) -> None:
    """With a whole model each; one of them is killed, and torchrun goes on to the same bits."""
    Trainer(read_config(write_config("one", **settings(8)))).run()
    out = run(write_config("two", **settings(8)))
    assert out.count("saved ") == 1
    assert_same_run(tmp_path / "one", tmp_path / "two", 8)

    process = launch(write_config("killed", **settings(8)), restarts=2)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not list(checkpoints.glob("step-[3-7]")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(children(process)[-1], signal.SIGKILL)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, out
    found, expected = (
        weights(rwkvx.load(tmp_path / name / "small-step-8")) for name in ("killed", "two")
    )
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_processes_end_with_torchrun(write_config: Writer, tmp_path: Path) -> None:
    """One that waits for another would do so for half an hour, and hold the run's folder."""
    process = launch(write_config("left", **settings(100_000)))
    while not list((tmp_path / "left" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    ranks = children(process)
    os.kill(ranks[-1], signal.SIGSTOP)
    process.kill()
    try:
        process.communicate(timeout=30)  # all of them write to this pipe
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def test_parts_of_a_model_do_what_the_whole_does(write_config: Writer, tmp_path: Path) -> None:
    """FSDP2: two processes go on from one, and one from two."""
    Trainer(read_config(write_config("one", **settings(6)))).run()
    for steps, processes in ((3, 1), (5, 2), (6, 1)):
        path = write_config("two", **settings(steps))
        if processes == 2:
            run(path, "--parallel", "fsdp")
        else:
            Trainer(read_config(path)).run()
    assert_same_run(tmp_path / "one", tmp_path / "two", 6)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_steps_that_are_not_finite_move_nothing_anywhere(write_config: Writer, how: str) -> None:
    """Whole or in parts, read late: weights, averages and moments stay."""
    path = write_config(parallel=how, **{**settings(6), "stages": STAGES[1:]})
    process = start(str(Path(__file__).parent / "skip_worker.py"), str(path))
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, out
    assert "moved [0, 3, 4] skipped 2" in out


def test_two_processes_share_a_sequence(write_config: Writer, tmp_path: Path) -> None:
    """Each reads a half of every sequence, states are passed on; and one goes on from two."""
    # Chunks of 8 tokens: a half holds two. Scores of chunks that tie to rounding may be chosen
    # otherwise, so the runs agree as nearly as those above, not to the bit.
    stages = [{"steps": 4, "length": 32, "batch": 3, "state_passing": 0.5}]
    changes = {**SETTINGS, "stages": stages, "data": read_data(write_config, separate=False)}
    Trainer(read_config(write_config("one", **changes))).run()
    path = write_config("two", **changes, probe=[600])
    run(path, "--sequence-parallel", "2", "--steps", "3")
    Trainer(read_config(path, {"steps": "4"})).run()
    assert_same_run(tmp_path / "one", tmp_path / "two", 4)


def read_data(write_config: Writer, **changes: Any) -> dict[str, Any]:
    return {**read_config(write_config()).to_dict()["data"], **changes}


def test_what_cannot_be_shared_out(write_config: Writer) -> None:
    for fields, world, message in (
        ({"sequence_parallel": "2"}, World(0, 2, 2), "must be a multiple of 16"),
        ({"sequence_parallel": "2", "stages.0.long_ce": "5", "stages.0.long_ce_window": "12"},
         World(0, 2, 2), "long_ce must be 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            check_division(read_config(write_config(), fields), world.size)


def test_rows_are_shared_out() -> None:
    """Every row of a step is read once, by any number of processes."""
    config = read_config_of({"stages": [{"steps": 1, "length": 8, "batch": 4}], "accumulate": 3})
    ids = torch.arange(12)[:, None].expand(12, 8)
    step = Batch(ids, ids, ids.float(), ids > 0, (ids > 0).numpy())
    for size in (1, 2, 3, 4, 6, 12):
        check_division(config, size)
        parts = [own_batches(step, config.stages[0], World(r, size)) for r in range(size)]
        seen = [int(x) for part in parts for batch in part for x in batch.inputs[:, 0]]
        assert seen == list(range(12))
        assert all(len(batch.inputs) <= 4 for part in parts for batch in part)
    for size in (5, 7, 24):
        with pytest.raises(InputError, match=f"{size} processes cannot share them evenly"):
            check_division(config, size)


def read_config_of(changes: dict[str, Any]) -> Any:
    from running import BASE

    from rwkvx.training.config import parse_config

    return parse_config({**BASE, **changes}, "config")
