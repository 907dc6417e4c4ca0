"""Within a step the host waits for no device; what it reads late is what it would have read."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import BASE, Writer, assert_same_bits, weights
from torch import Tensor
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rwkvx
from rwkvx import InputError
from rwkvx.training import outcome, trainer as trainer_module
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer
from rwkvx_kernels import dispatch

STAGES = [
    {"steps": 2, "length": 32, "batch": 3},
    {"steps": 4, "length": 48, "batch": 2, "state_passing": 0.5, "recurrent_length": 24},
]


class NothingWaits(TorchDispatchMode):
    """The "meta" device in the place of a GPU: its tensors have no values that could be read, so
    all that looks at one fails; here also copies from the CPU that would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {x.device.type for x in tree_leaves((args, out)) if isinstance(x, Tensor)}
        if name == "lift_fresh":
            assert "meta" not in devices, "a tensor made of numbers is copied at once"
        if name in ("_to_copy", "copy_") and devices == {"cpu", "meta"}:
            assert (kwargs or {}).get("non_blocking") or True in args[2:], f"{name} waits"
        return out


class Unread:
    """Numbers that are on their way."""

    def __init__(self, x: Tensor) -> None:
        assert x.device.type == "meta"

    def numbers(self) -> list[float]:
        return [0.0] * 1000


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The "meta" device is taken for a GPU, where operators in Triton run."""
    kinds = ("cuda", "meta")
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(dispatch, "on_gpu", lambda device: device.type in kinds)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind)
    )
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **x: nothing if kind == "meta" else autocast(kind, **x)
    )
    monkeypatch.setattr(trainer_module, "usable_device", lambda device: device)
    monkeypatch.setattr(outcome, "Reading", Unread)
    supported = [*_foreach_utils._get_fused_kernels_supported_devices(), "meta"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: supported)
    yield


def test_a_step_waits_for_nothing(write_config: Writer, meta: None) -> None:
    trainer = Trainer(read_config(write_config(stages=STAGES, average=0.5, accumulate=2), {"device": "meta"}))
    with NothingWaits():
        for _ in range(4):
            trainer.train_step()
