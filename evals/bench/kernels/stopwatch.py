"""Seconds and bytes of calls on a GPU, by its own clock; on a CPU for tests."""

from __future__ import annotations

import gc
import time

import torch

from rwkvx_evals.bench.kernels.case import OURS, Call

REPEATS = (3, 50)  # at least and at most
WARM_UPS = 2  # one for calls that take longer than
SLOW = 2.0  # seconds


def by_turns(
    calls: dict[str, Call], device: str, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in every turn A B C A B C, after warm-ups; about `seconds` in all.

    A slow moment of the machine meets all of them. What fails in its warm-up is left out, except
    ours: its error is the caller's.

    Returns:
        seconds by name, and why others were left out.
    """
    taken: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    turn = 0.0
    for name, call in calls.items():
        try:
            once = 0.0
            for number in range(WARM_UPS + 1):
                if number < 2 or once < SLOW:  # the first may have compiled
                    once = seconds_of(call, device)
            turn += once
            taken[name] = []
        except Exception as error:
            if name == OURS:
                raise
            left_out[name] = reason(error)
        if name in left_out:
            free(device)
    for _ in range(max(REPEATS[0], min(REPEATS[1], int(seconds / max(turn, 1e-6))))):
        for name, one in taken.items():
            one.append(seconds_of(calls[name], device))
    return taken, left_out


def seconds_of(call: Call, device: str) -> float:
    """Of one call."""
    if device != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_bytes(call: Call, device: str) -> int | None:
    """Bytes beyond what was there before the call, its outputs included; None on a CPU."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def free(device: str) -> None:
    """Gives memory back; raises what the GPU has to complain about."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
