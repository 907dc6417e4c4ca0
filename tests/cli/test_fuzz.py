"""Command lines of odd values: an answer, or one line on standard error; never a traceback."""

import io
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from mutation import ARGUMENTS, mutated

import rwkvx
from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli import cli, main
from rwkvx.training.trainer import Trainer

SECONDS = 20  # of the processor, for one command
CONFIG = """\
name: small
model: {vocab_size: 256, width: 16, head_size: 8, pattern: [rwkv7], tokenizer: bytes}
data: {kind: passkey, prose: 0.0}
stages: [{steps: 1, length: 400, batch: 1}]
"""


class Reached(Exception):
    """A command has come to its work with options that it takes."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model, a config and a prompt; long work is not begun in it."""
    config = rwkvx.ModelConfig(256, 16, ("rwkv7", "sparse"), 8, chunk_size=4, tokenizer="bytes")
    torch.manual_seed(0)
    save_folder(rwkvx.init_weights(rwkvx.Model(config)), tmp_path / "m")
    (tmp_path / "small.yaml").write_text(CONFIG)
    for name in ("a", "b"):
        finished_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RWKVX_DEBUG", raising=False)
    monkeypatch.delenv("RWKVX_DATA", raising=False)

    def reached(*args: object, **options: object) -> None:
        raise Reached

    for name in (
        "rwkvx_evals.passkey.evaluate.evaluate",
        "rwkvx_evals.passkey.command.evaluate",
        "rwkvx_evals.lm.evaluate.evaluate",
        "rwkvx_evals.long.evaluate.evaluate",
        "rwkvx_evals.long.export.export",
        "rwkvx_evals.bench.run.run",
        "rwkvx_evals.bench.load.run",
        "rwkvx_evals.bench.selection.run",
        "rwkvx_evals.bench.kernels.run.run",
    ):
        monkeypatch.setattr(name, reached)
    monkeypatch.setattr(Trainer, "run", reached)
    return tmp_path


def finished_run(folder: Path) -> None:
    """What `eval compare` reads of a run of `eval long`."""
    row = {
        "id": "passkey-64-0", "task": "passkey", "length": 64, "index": 0, "status": "ok",
        "prompt": "hash", "score": 1.0, "answer": "1", "expected": ["1"], "about": {},
        "prompt_tokens": 60, "answer_tokens": 1, "truncated": 0,
    }  # fmt: skip
    results = {"model": folder.name, "weights": "0" * 64, "date": "2026-01-02"}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")


def run(args: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit status and standard error; what a command prints is thrown away."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"prompt"), "utf-8"))
    try:
        main(args)
    except SystemExit as status:
        err.flush()
        return int(status.code or 0), err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    except Reached:
        pass
    return 0, ""


def sound(args: list[str], status: int, err: str) -> None:
    assert status in (0, 1, 2), (args, status, err)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (status != 0), (args, status, err)
    assert all(len(line) <= 300 for line in err.splitlines()), (args, err)
    assert "Traceback" not in err, args


# A command that works, word by word; the numbers and names in it are exchanged.
COMMANDS = {
    "info": "info m",
    "info --verify": "info --verify m",
    "generate": "generate x --model m --max-tokens 2 --temperature 1 --top-p 0.9 --seed 1 "
    "--device cpu --dtype float32",
    "generate -": "generate - --model m --max-tokens 1",
    "convert": "convert m OUT --dtype float32 --chunk-size 8 --topk 2 --init copy",
    "convert --to": "convert m OUT --to folder --verify",
    "eval passkey": "eval passkey --model m --lengths 1k,2k --depths 2 --seeds 2 --out OUT "
    "--device cpu --dtype float32 --batch 1 --max-new-tokens 4",
    "eval lm": "eval lm --model m --tasks piqa --limit 1 --batch 1 --max-length 100 --out OUT",
    "eval long": "eval long --model m --tasks passkey --lengths 1k,2k --samples 2 --seed 1 "
    "--out OUT --haystack small.yaml --batch 1 --device cpu --dtype float32 --truncate left "
    "--max-length 2048 --concurrency 2 --timeout 5",
    "eval long --export": "eval long --export OUT --tokenizer bytes --tasks niah_* --lengths 1k "
    "--samples 2",
    "eval compare": "eval compare a b --out OUT",
    "train": "train small.yaml --seed 1 --optimizer.lr 1e-3 --threads 1 --steps 1 --out OUT",
    "bench cpu": "bench cpu --model m --lengths 128 --decode 2 --long none --window 1k "
    "--threads 1 --repeats 1 --dtype float32 --out OUT",
    "bench selection": "bench selection --model m --lengths 1k --haystack small.yaml",
    "bench kernels": "bench kernels --family wkv7 --lengths 1k --budget 5 --out OUT",
}


def without_long_work(args: list[str]) -> bool:
    """Whether a command ends soon even if it takes all of its values."""
    large = [x for x in args if x.isdigit() and len(x) < 9 and int(x) > 100]
    return args[0] != "generate" or not large


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_values(name: str, place: Path, trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(name)
    threads = torch.get_num_threads()
    command = COMMANDS[name].replace("OUT", "out").split()
    assert run(command, monkeypatch)[0] == 0
    first = 1 + isinstance(cli.lazy[command[0]][0], click.Group)
    for _ in range(trials):
        args = list(command)
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.randrange(first, len(args))
            change = draw.randrange(6)
            if change == 0:
                args.insert(at, draw.choice(ARGUMENTS))
            elif change == 1:
                del args[at]
            elif change == 2:
                args[at] = os.fsdecode(mutated(os.fsencode(args[at]), draw).replace(b"\0", b""))
            else:
                values = [i for i in range(first, len(args)) if not args[i].startswith("--")]
                args[draw.choice(values or [at])] = draw.choice(ARGUMENTS)
            if len(args) <= first:
                break
        if without_long_work(args):
            began = time.process_time()
            sound(args, *run(args, monkeypatch))
            assert time.process_time() - began < SECONDS, args
            shutil.rmtree(place / "out", ignore_errors=True)
    torch.set_num_threads(threads)
