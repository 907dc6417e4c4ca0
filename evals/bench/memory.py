"""Peak memory of one prefill, in a process of its own: python -m rwkvx_evals.bench.memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from rwkvx.errors import InputError
from rwkvx_evals.bench.measure import random_ids
from rwkvx_evals.bench.subjects import open_model
from rwkvx_evals.files import peak_memory_bytes

PIECE = 8192  # tokens between two signs of progress


def measure_memory(
    subject: tuple[str, str, str], tokens: int, threads: int, bar: tqdm[Any]
) -> dict[str, Any]:
    """Peak resident bytes of a fresh process that loads a model and reads `tokens` tokens.

    subject: the model's name, its dtype and its selection.

    Raises InputError when that process ends early, as it does when memory runs out.
    """
    settings = json.dumps({"subject": subject, "tokens": tokens, "threads": threads})
    command = [sys.executable, "-m", "rwkvx_evals.bench.memory", settings]
    row: dict[str, Any] = {"tokens": tokens}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                sign = json.loads(line)
                bar.update(sign.pop("read", 0))
                row.update(sign)
        except BaseException:
            child.kill()
            raise
    if child.returncode or "peak_bytes" not in row:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"{child.returncode}"
        raise InputError(f"reading {tokens:,} tokens in a fresh process failed (status {how})")
    return row


@torch.inference_mode()
def child(settings: dict[str, Any]) -> None:
    """Load, read in pieces, print one JSON object per line."""
    torch.set_num_threads(settings["threads"])
    model, _ = open_model(*settings["subject"])
    _say(loaded_bytes=peak_memory_bytes())
    began, state = time.perf_counter(), model.fresh_state(1, settings["tokens"])
    for part in random_ids(model, settings["tokens"]).split(PIECE, dim=1):
        _, state = model(part, state, logits="none")
        _say(read=part.shape[1])
    _say(peak_bytes=peak_memory_bytes(), seconds=time.perf_counter() - began)


def _say(**values: float) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
