"""Energy of a GPU through NVML (the package nvidia-ml-py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch

from rwkvx_evals.bench.kernels.case import Call
from rwkvx_evals.bench.kernels.stopwatch import reason

PERIOD = 0.02  # seconds between two readings of the power


@dataclass
class Reading:
    """What a `with` block took.

    Attributes:
        joules: of the whole GPU, idle power included; 0 until the block ends.
    """

    joules: float = 0.0


class EnergyMeter:
    """The energy counter of one GPU, or where it has none, its power summed over time."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self.method = "NVML energy counter"
        except nvml.NVMLError:
            nvml.nvmlDeviceGetPowerUsage(handle)
            self.method = f"NVML power every {1e3 * PERIOD:.0f} ms"
        self._counts = "counter" in self.method

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Joules between the start and the end of the block."""
        found = Reading()
        if self._counts:
            before = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            yield found
            after = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            found.joules = 1e-3 * (after - before)
            return
        samples, done = [self._sample()], threading.Event()
        thread = threading.Thread(target=self._watch, args=(samples, done), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
        samples.append(self._sample())
        found.joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(samples))

    def joules_of(self, call: Call, seconds: float, device: str) -> float:
        """Of one call, on average over as many as take `seconds`: counters move in steps of up to
        a tenth of a second."""
        _wait(device)
        calls, began = 0, time.perf_counter()
        with self.reading() as found:
            while not calls or time.perf_counter() - began < seconds:
                call()
                _wait(device)
                calls += 1
        return found.joules / calls

    def _sample(self) -> tuple[float, float]:
        """Seconds and watts."""
        return time.perf_counter(), 1e-3 * self._nvml.nvmlDeviceGetPowerUsage(self._handle)

    def _watch(self, samples: list[tuple[float, float]], done: threading.Event) -> None:
        while not done.wait(PERIOD):
            samples.append(self._sample())


def open_meter(device: str, nvml: Any = None) -> tuple[EnergyMeter | None, str]:
    """The meter of torch's current GPU and how it measures; None, and why, where there is none.

    nvml: a module in the place of pynvml.
    """
    if device != "cuda" and nvml is None:
        return None, "no GPU"
    try:
        if nvml is None:
            nvml = import_module("pynvml")
        nvml.nvmlInit()
        meter = EnergyMeter(nvml, nvml.nvmlDeviceGetHandleByUUID(_uuid(device)))
    except ModuleNotFoundError:
        return None, "nvidia-ml-py is not installed (pip install 'rwkvx[gpu]')"
    except Exception as error:  # NVML raises classes of its own, and others where a driver is old
        return None, reason(error)
    return meter, meter.method


def _uuid(device: str) -> str:
    name = str(torch.cuda.get_device_properties().uuid) if device == "cuda" else ""
    return name if name.startswith(("GPU-", "MIG-")) else f"GPU-{name}"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
