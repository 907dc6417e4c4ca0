"""Within a step the host waits for no device; what it reads late is what it would have read."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import BASE, Stopped, Writer, assert_same_bits, stop_at, weights
from torch import Tensor
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkvx import InputError
from rwkvx.data.sources import Rows, Wanted
from rwkvx.training import outcome
from rwkvx.training import trainer as trainer_module
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer
from rwkvx_kernels import dispatch

STAGES = [
    {"steps": 2, "length": 32, "batch": 3, "state_passing": 0.5},
    {"steps": 4, "length": 48, "batch": 2, "state_passing": 0.5, "recurrent_length": 24},
]
# What there are Triton kernels for.
SIZES = {"width": 32, "head_size": 16, "window": 16, "chunk_size": 16}


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
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
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


def large_enough(write_config: Writer) -> Path:
    """Micro-batches, passed states, averaged weights, all kinds of block."""
    model = {**BASE["model"], **SIZES, "pattern": ["rwkv7", "sparse", "window", "rwkv7"]}
    return write_config(stages=STAGES, average=0.5, accumulate=2, model=model)


def with_documents(trainer: Trainer) -> Trainer:
    """One begins inside of a row, where rows are not read in pieces."""
    source = trainer.source(trainer.config.stages[0])
    plain = source.rows

    def rows(wanted: Wanted) -> Rows:
        found = plain(wanted)
        found.starts[1, 7] = not wanted.recurrent_length
        return found

    source.rows = rows  # type: ignore[method-assign]
    return trainer


@pytest.mark.usefixtures("meta")
def test_a_step_waits_for_nothing(write_config: Writer) -> None:
    path = large_enough(write_config)
    trainer = with_documents(Trainer(read_config(path, {"device": "meta"})))
    with NothingWaits():
        for _ in range(4):
            trainer.train_step()
    trainer.model.blocks[1].ffn.value.weight.register_hook(lambda g: g * g.sum().item())
    with pytest.raises(RuntimeError, match="item"), NothingWaits():
        trainer.train_step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_no_gpu(write_config: Writer) -> None:
    path = large_enough(write_config)
    trainer = with_documents(Trainer(read_config(path, {"device": "cuda"})))
    trainer.train_step()  # compiles
    trainer.settle()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.late = 9  # reading waits
        for _ in range(4):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------- read late


class Late(Trainer):
    """Reads a step when the next one has begun, as on a GPU; some steps are not finite."""

    infinite: tuple[int, ...] = ()

    def __init__(self, *args: Any, late: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.late = late

    def train_step(self) -> outcome.Outcome:
        """With a gradient that is not finite in the steps that are named (from 0)."""
        factor = torch.inf if self.step in self.infinite else 1.0
        weight = self.model.blocks[0].ffn.key.weight
        hook = weight.register_hook(lambda gradient: gradient * factor)
        try:
            return super().train_step()
        finally:
            hook.remove()


@pytest.mark.parametrize("infinite", [(), (0, 2), (1, 2, 3), (3, 4)], ids=str)
def test_a_run_read_late_is_the_same(
    write_config: Writer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    infinite: tuple[int, ...],
) -> None:
    """To the bit: weights, moments, curves, skipped steps, checkpoints; after a resumption too.
    The number of sequences changes with the stage, and so that of the carried states."""
    monkeypatch.setattr(Late, "infinite", infinite)
    changes = {"stages": STAGES, "average": 0.5, "accumulate": 2, "save_every": 3}
    found, curves = [], []
    for late, name in enumerate(("at_once", "late")):
        config = read_config(write_config(name, **changes))
        first = Late(config, late=late)
        with monkeypatch.context() as patch:
            stop_at(4, patch)
            with pytest.raises(Stopped):
                first.run()
        again = Late(config, late=late)
        model = again.run()
        states = again.optimizer.state_dict()["state"]
        moments = {f"{i}.{k}": x for i, state in states.items() for k, x in state.items()}
        found.append({**weights(model), **moments})
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        numbers = ("step", "loss/train", "gradient_norm", "loss/eval")
        curves.append([[x[n] for n in numbers if n in x] for x in lines])
        result = json.loads((tmp_path / name / "results.json").read_text())
        assert result["small-step-6"]["skipped_steps"] == len(infinite)
        assert again.progress.skipped_in_a_row == 0
    assert_same_bits(*found)
    assert curves[0] == curves[1]
    assert len(curves[0]) == 6 + 2


def test_the_culprit_is_named_late(write_config: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next step has begun, by the gradient of the step that was one too many."""
    monkeypatch.setattr(Late, "infinite", (1, 2))
    trainer = Late(read_config(write_config(most_skipped=1)))
    for _ in range(3):
        trainer.train_step()
    with pytest.raises(InputError, match=r"gradient of blocks\.0\.ffn\.key.* not finite at step 3"):
        trainer.train_step()
