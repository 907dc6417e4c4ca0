"""kill -9 at random moments of training: do all runs end with the weights of one that nobody stops?

    python scripts/kills.py --processes 2 --kills 50 --seed 0

A hybrid of two blocks learns bytes for 70 steps in two stages, with states that are passed on and
averaged weights. Every second kill of several processes takes one of them, every other one all with
their torchrun; then the same command goes on. A trial whose run had ended before counts for
nothing. Exits with 1 if weights differ or a run fails.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 60
CONFIG = """
name: small
seed: 3
threads: 1
model:
  vocab_size: 256
  tokenizer: bytes
  width: 32
  head_size: 32
  pattern: [rwkv7, sparse]
  chunk_size: 8
  topk: 2
  key_conv: 2
optimizer: {lr: 0.01, warmup: 2}
stages:
  - {steps: 30, length: 24, batch: 4}
  - {steps: 40, length: 40, batch: 2, state_passing: 0.5}
average: 0.9
eval_every: 20
eval_batches: 1
save_every: 3
"""
MOMENTS = (0.15, 0.95)  # of the time that a whole run takes
PATIENCE = 300  # seconds: processes that have not ended by then hang
SHARED = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")


def start(folder: Path, name: str, processes: int) -> subprocess.Popen[bytes]:
    """`rwkvx train` into folder / name, in a session of its own."""
    data = {"kind": "text", "paths": [str(folder / "text.txt")]}
    config = folder / f"{name}.yaml"
    config.write_text(
        yaml.safe_dump({**yaml.safe_load(CONFIG), "data": data, "out": str(folder / name)})
    )
    several = (*SHARED, "--nproc-per-node", str(processes)) if processes > 1 else ()
    command = [sys.executable, *several, "-m", "rwkvx", "train", str(config)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes], out: Path) -> str:
    """The sum of the weights that a run ends with."""
    _, said = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise SystemExit(f"error: a run failed: {said.decode(errors='replace')[-600:]}")
    total = hashlib.sha256()
    for path in sorted(out.glob("small-step-*/*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


def ranks(session: int) -> list[int]:
    """Processes of a session that train, torchrun not among them."""
    table = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()[1:]]
    return [
        int(pid)
        for pid, sid, words in rows
        if int(sid) == session and "rwkvx train" in words and "distributed.run" not in words
    ]


def kill(process: subprocess.Popen[bytes], one: bool, draw: random.Random) -> None:
    """One rank, whose torchrun then ends the others, or everything."""
    found = ranks(process.pid) if one else []
    if found:
        os.kill(draw.choice(found), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, same, kills, trial = random.Random(asked.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "text.txt").write_text(TEXT)
        # The first run may compile; the second says how long one takes.
        expected = finish(start(folder, "first", asked.processes), folder / "first")
        began = time.monotonic()
        again = finish(start(folder, "second", asked.processes), folder / "second")
        seconds = time.monotonic() - began
        if again != expected:
            raise SystemExit("error: two runs that nobody stopped differ")
        while kills < asked.kills:
            trial += 1
            shutil.rmtree(folder / "cut", ignore_errors=True)
            process = start(folder, "cut", asked.processes)
            time.sleep(draw.uniform(*MOMENTS) * seconds)
            if process.poll() is not None:
                seconds *= 0.9
                continue
            kill(process, asked.processes > 1 and trial % 2 == 0, draw)
            kills += 1
            same += finish(start(folder, "cut", asked.processes), folder / "cut") == expected
            print(f"identical after a kill: {same} of {kills}", flush=True)
    raise SystemExit(int(same != kills))


if __name__ == "__main__":
    main()
