"""Adapters: the base stays as it is, what is learned is written, and only its own base takes it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Stopped, Writer, assert_same_bits, stop_at, weights
from safetensors.torch import load_file, save_file

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.adapter import fingerprint
from rwkvx.cli import main
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer

LORA = {"kind": "lora", "rank": 3, "alpha": 6, "targets": ["receptance", "value"]}
STATE = {"kind": "state"}
FAST = {"lr": 1.0, "warmup": 1}
Captured = pytest.CaptureFixture[str]
STAGES = [{"steps": 4, "length": 24, "batch": 2}]


@pytest.fixture
def base(write_config: Writer, tmp_path: Path) -> Path:
    Trainer(read_config(write_config("base", stages=STAGES))).run()
    return tmp_path / "base" / "small-step-4"


def config(
    write_config: Writer, base: Path, name: str, adapter: dict[str, Any], **more: Any
) -> Any:
    settings = {"init": str(base), "model": None, "adapter": adapter, "stages": STAGES, **more}
    return read_config(write_config(name, **settings))


def logits(model: rwkvx.Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found, _ = model(ids)
    assert found is not None
    return found


@pytest.mark.parametrize("adapter", [LORA, STATE], ids=lambda x: x["kind"])
def test_an_adapter_learns_beside_its_base(
    write_config: Writer, tmp_path: Path, base: Path, adapter: dict[str, Any]
) -> None:
    """It starts as the base, ends as something else, and is what its folder says it is."""
    before = rwkvx.load(base)
    trainer = Trainer(config(write_config, base, "new", adapter, average=0.5))
    ids = torch.randint(1, 256, (2, 20))
    torch.testing.assert_close(logits(trainer.model, ids), logits(before, ids))
    learned = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    # Two matrices for each of three projections (one of them in the channel mix) of two blocks.
    assert len(learned) == (2 * 3 * 2 if adapter is LORA else 1)
    trainer.run()
    kept = [n for n, p in trainer.model.named_parameters() if n not in learned]
    own = weights(before)
    for name in kept:
        plain = name.replace(".parametrizations.weight.original", ".weight")
        assert torch.equal(trainer.model.get_parameter(name), own[plain])
    trained = logits(trainer.result.model, ids)
    assert not torch.allclose(trained, logits(before, ids))

    folder = tmp_path / "new" / "small-step-4"
    assert (folder / "README.md").exists()
    model = rwkvx.load(base, adapter=folder, verify=True)
    torch.testing.assert_close(logits(model, ids), trained)
    torch.testing.assert_close(logits(rwkvx.load(folder), ids), trained)
    if adapter is LORA:
        assert set(weights(model)) == set(own)
    about = json.loads((folder / "adapter.json").read_text())
    assert about["base"] == fingerprint(own)
    assert about["base_model"] == str(base)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_it_is_merged_on_request(
    write_config: Writer, tmp_path: Path, base: Path, stored: str, capsys: Captured
) -> None:
    """Into a base of any dtype: the updates are those that training saw, added in float32."""
    command(["convert", str(base), str(tmp_path / "base2"), "--dtype", stored], capsys)
    Trainer(config(write_config, tmp_path / "base2", "new", LORA, optimizer=FAST)).run()
    adapter = str(tmp_path / "new" / "small-step-4")
    merged, target = str(tmp_path / "merged"), rwkvx.load(adapter)
    base2 = str(tmp_path / "base2")
    command(["convert", base2, merged, "--adapter", adapter, "--dtype", "float32"], capsys)
    assert_same_bits(weights(rwkvx.load(merged)), weights(target))
    command(["convert", adapter, str(tmp_path / "again")], capsys)
    found = rwkvx.load(tmp_path / "again", dtype=stored)
    assert_same_bits(weights(found), weights(rwkvx.load(adapter, dtype=stored)))
    plain = weights(rwkvx.load(base2, dtype=stored))
    name = "blocks.0.att.value.weight"
    assert not torch.equal(weights(found)[name], plain[name])


def test_the_first_step_is_that_of_the_equation(write_config: Writer, base: Path) -> None:
    """W + alpha / R · up down: only `up` has a gradient at first, that of W times `down`."""
    trainer = Trainer(config(write_config, base, "new", LORA))
    name = "blocks.0.att.value"
    update = trainer.model.get_submodule(name).parametrizations.weight[0]  # type: ignore[index, union-attr]
    assert not update.up.any()
    assert update.down.abs().max().item() <= 1 / math.sqrt(16) + 1e-6
    gradients: dict[str, torch.Tensor] = {}
    update.up.register_hook(lambda g: gradients.__setitem__("up", g.clone()))
    plain = Trainer(read_config(write_config("plain", init=str(base), model=None, stages=STAGES)))
    weight = plain.model.get_parameter(f"{name}.weight")
    weight.register_hook(lambda g: gradients.__setitem__("weight", g.clone()))
    a, b = trainer.train_step()["loss/train"], plain.train_step()["loss/train"]
    assert a == pytest.approx(b, rel=1e-6)
    with torch.no_grad():
        expected = 6 / 3 * gradients["weight"] @ update.down.T
    # `down` has learned nothing yet: its gradient was zero.
    torch.testing.assert_close(gradients["up"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("adapter", [LORA, STATE], ids=lambda x: x["kind"])
def test_it_resumes_to_the_same_bits(
    write_config: Writer,
    tmp_path: Path,
    base: Path,
    adapter: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Trainer(config(write_config, base, "whole", adapter, save_every=1)).run()
    settings = config(write_config, base, "parts", adapter, save_every=1)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Stopped):
            Trainer(settings).run()
    Trainer(settings).run()
    found = [
        (tmp_path / name / "small-step-4" / "adapter.safetensors").read_bytes()
        for name in ("whole", "parts")
    ]
    assert found[0] == found[1]


def test_another_base_is_refused(write_config: Writer, tmp_path: Path, base: Path) -> None:
    settings = config(write_config, base, "new", LORA)
    Trainer(settings).run()
    adapter = tmp_path / "new" / "small-step-4"
    original = (base / "model.safetensors").read_bytes()
    other = load_file(base / "model.safetensors")
    other["emb.weight"][3, 2] += 1e-3
    save_file(other, base / "model.safetensors")
    for path, beside in ((base, adapter), (adapter, None)):
        with pytest.raises(InputError, match="adapter of another model"):
            rwkvx.load(path, adapter=beside)
    (base / "model.safetensors").write_bytes(original)
    with pytest.raises(InputError, match="cannot read"):
        rwkvx.load(base, adapter=tmp_path)
    file = adapter / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=r"adapter\.safetensors"):
        rwkvx.load(base, adapter=adapter)
    file.write_bytes(whole)
    longer = read_config(tmp_path / "new.yaml", {"stages.0.steps": "5", "adapter.rank": "4"})
    with pytest.raises(InputError, match=r"whose adapter\.rank is 3, not 4"):
        Trainer(longer).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ""}, "adapter lora needs init"),
        ({"parallel": "fsdp"}, "is not cut in parts"),
        ({"adapter": {"kind": "lora", "targets": ["query"]}}, "no projection is called 'query'"),
        ({"adapter": {"kind": "lora", "rank": 0}}, "rank must be a whole number from 1"),
        ({"stages": [{**STAGES[0], "learn": "sparse"}]}, "learn must be all"),
        (
            {"adapter": STATE, "stages": [{**STAGES[0], "state_passing": 0.5}]},
            "state_passing and recurrent_length must be 0",
        ),
    ],
    ids=str,
)
def test_mistakes(write_config: Writer, base: Path, changes: Any, message: str) -> None:
    model = None if changes.get("init", "x") else read_config(write_config()).model.to_dict()
    settings = {"init": str(base), "model": model, "adapter": LORA, "stages": STAGES, **changes}
    with pytest.raises(InputError, match=message):
        Trainer(read_config(write_config("new", **settings)))


def test_commands_take_an_adapter(
    write_config: Writer, tmp_path: Path, base: Path, capsys: Captured
) -> None:
    Trainer(config(write_config, base, "new", STATE, optimizer=FAST)).run()
    adapter = str(tmp_path / "new" / "small-step-4")
    texts = []
    for options in (["--model", str(base)], ["--model", str(base), "--adapter", adapter],
                    ["--model", adapter]):  # fmt: skip
        asked = ["generate", *options, "--seed", "1", "--max-tokens", "3", "It was"]
        texts.append(command(asked, capsys))
    assert texts[1] == texts[2] != texts[0]
    status, err = failing(["convert", adapter, str(tmp_path / "x")], capsys)
    assert status == 1
    assert "is a starting state: no weight" in err


def command(arguments: list[str], capsys: Captured) -> str:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    out, err = capsys.readouterr()
    assert not status.value.code, err
    return out


def failing(arguments: list[str], capsys: Captured) -> tuple[int, str]:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    return int(status.value.code or 0), capsys.readouterr().err
