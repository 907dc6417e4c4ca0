"""The route that is told is the one that runs, and all routes compute the equations."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from small import HYBRID, VARIANTS, random_ids, random_model, variant

import rwkvx
from rwkvx import InputError
from rwkvx.check import check
from rwkvx.cli import main
from rwkvx_kernels import dispatch
from rwkvx_kernels.dispatch import UnsupportedError


def run_and_record(monkeypatch: pytest.MonkeyPatch, model: rwkvx.Model, tokens: int) -> set[str]:
    """Implementations that a forward chooses, by operation, behind tokens to select among."""
    with torch.no_grad():
        _, state = model(random_ids(70, batch=1), logits="none")
    chosen: set[str] = set()

    def recorded(choose: Callable[..., dispatch.Choice]) -> Callable[..., dispatch.Choice]:
        def record(*args: Any, **kwargs: Any) -> dispatch.Choice:
            choice = choose(*args, **kwargs)
            chosen.add(choice.impl)
            return choice

        return record

    families = ("linear", "token_shift", "channel_mix", "wkv7", "chunk_select", "chunk_attention")
    with monkeypatch.context() as patch, torch.no_grad():
        for name in families:
            api = import_module(f"rwkvx_kernels.{name}.api")
            patch.setattr(api, "choose", recorded(api.choose))
        model(random_ids(tokens, batch=1), state)
    return chosen


@pytest.mark.parametrize("impl", ["auto", "reference", "torch", "compiled"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_what_is_told_is_what_runs(monkeypatch: pytest.MonkeyPatch, impl: str, tokens: int) -> None:
    model = random_model(HYBRID).float()
    model.impl = impl
    steps = [s for s in rwkvx.explain(model, 1, tokens) if s.where != "decoding"]
    told = {step.impl for step in steps}
    # Where few chunks are, attention to one token chooses among them by the way.
    always = {step.impl for step in steps if tokens > 1 or step.operation != "selection"}
    assert always <= run_and_record(monkeypatch, model, tokens) <= told
    assert all(step.why for step in steps)
    operations = [step.operation for step in steps]
    assert {"decay, recurrence, norm and gate", "selection", "attention", "head"} <= set(operations)


def test_the_decoder_is_told() -> None:
    model = random_model(HYBRID).float()
    (step,) = (s for s in rwkvx.explain(model) if s.where == "decoding")
    assert step.impl == "compiled"
    (step,) = (s for s in rwkvx.explain(model.double()) if s.where == "decoding")
    assert step.impl == "eager"
    assert "float64" in step.why


def test_impl_goes_through_the_whole_model() -> None:
    model = random_model(HYBRID).float()
    for impl in ("reference", "torch", "compiled", "auto"):
        model.impl = impl
        assert model.impl == impl
        assert {m.impl for m in model.modules() if "impl" in vars(m)} == {impl}
    with pytest.raises(InputError, match="impl must be one of"):
        model.impl = "cpu"
    model.impl = "compiled"
    with pytest.raises(UnsupportedError, match="no gradients"):
        model(random_ids(5))  # with gradients
    with pytest.raises(UnsupportedError):
        rwkvx.explain(model, 1, 5, training=True)
    with pytest.raises(InputError, match="batch and tokens must be 1 or more"):
        rwkvx.explain(model, 0, 5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_route_computes_the_equations(name: str) -> None:
    rows = list(check(random_model(variant(name)), tokens=60))
    assert all(row.passed for row in rows), rows
    there = {row.impl for row in rows if row.error is not None}
    assert {"reference", "torch", "compiled"} <= there


def test_a_wrong_route_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkvx_kernels.token_shift import torch_form

    original = torch_form.token_shift_torch

    def wrong(*args: Any) -> Any:
        return [x * 1.001 for x in original(*args)]

    monkeypatch.setattr("rwkvx_kernels.token_shift.api.token_shift_torch", wrong)
    rows = list(check(random_model(HYBRID), tokens=40))
    assert {row.impl for row in rows if not row.passed} >= {"torch"}
    assert all(row.passed for row in rows if row.impl == "reference")


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["check", "passkey-tiny", "--tokens", "24"],
        ["info", "passkey-tiny", "--route"],
    ):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert not status.value.code
        out = capsys.readouterr().out
        assert "compiled" in out
        assert "WRONG" not in out
