"""Training itself: learning, accumulation, the loss, evaluation, what it starts from."""

import math
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from running import Writer, assert_same_bits, weights
from torch import Tensor

from rwkvx import InputError, Model
from rwkvx.training import forward as forward_module
from rwkvx.training import trainer as trainer_module
from rwkvx.training.batches import Batch, evaluation_batch
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer

STAGE = {"steps": 3, "length": 24, "batch": 2}


def _model(write_config: Writer) -> dict:
    return read_config(write_config()).model.to_dict()


def test_training_learns(write_config: Writer) -> None:
    stages = [{"steps": 40, "length": 32, "batch": 4}]
    trainer = Trainer(read_config(write_config(stages=stages, eval_every=100, save_every=100)))
    losses = [trainer.train_step()["loss/train"] for _ in range(40)]
    assert losses[0] == pytest.approx(5.545, abs=0.4)  # log 256, and the head's own spread
    assert sum(losses[-5:]) / 5 < 3.2


def test_accumulation_equals_a_larger_batch(write_config: Writer) -> None:
    """Two micro-batches of 2 have the gradient of one batch of the same 4 sequences."""
    trainers = [
        Trainer(read_config(write_config(name, stages=[{**STAGE, "batch": size}], accumulate=n)))
        for name, size, n in (("a", 2, 2), ("b", 4, 1))
    ]
    for trainer in trainers:  # float64: Adam amplifies the roundings of zero
        trainer.model.double()
    small, large = trainers
    for _ in range(3):
        a, b = (trainer.train_step()["loss/train"] for trainer in trainers)
        assert a == pytest.approx(b, rel=1e-6)
    for (name, a), b in zip(small.model.named_parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_by_tiles_is_the_plain_loss(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and all gradients of a step on random tokens, every one of another weight."""
    stages = [{"steps": 1, "length": 24, "batch": 3}]
    optimizer = {"lr": 0.01, "warmup": 2, "clip": 1e9}
    config = read_config(write_config(stages=stages, optimizer=optimizer))
    ids, chances = torch.randint(256, (2, 3, 24)), torch.rand(3, 24)
    none = torch.zeros(3, 24, dtype=torch.bool)
    batch = Batch(ids[0], ids[1], chances, none, none.numpy())

    def plain(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        chosen = (x @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
        return -(chosen * weights).sum()

    results = []
    for loss in (plain, partial(forward_module.linear_cross_entropy, most_logits=20 * 256)):
        monkeypatch.setattr(forward_module, "linear_cross_entropy", loss)
        trainer = Trainer(config)
        trainer.model.double()
        monkeypatch.setattr(trainer_module, "step_batch", lambda *_: batch)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda **_: None)
        total = torch.tensor(trainer.train_step()["loss/train"], dtype=torch.float64)
        results.append([total, *(x.grad for x in trainer.model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_compiled_blocks_learn_the_same(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, as the compiler traces them; an evaluation compiles nothing."""
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # without machine code
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    stages = [{"steps": 3, "length": 24, "batch": 2, "state_passing": 1.0}]
    path = write_config(stages=stages)
    eager, compiled = (Trainer(read_config(path, {"compile": x})) for x in ("false", "true"))
    for _ in range(2):
        a, b = (trainer.train_step()["loss/train"] for trainer in (eager, compiled))
        assert a == pytest.approx(b, rel=1e-5)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made >= 2
    assert compiled.evaluate()["loss/eval"] == pytest.approx(
        eager.evaluate()["loss/eval"], rel=1e-4
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


def test_noise_is_not_learned(write_config: Writer, tmp_path: Path) -> None:
    """A model that knows its random letters by heart has nothing to say about those held out."""
    rng = np.random.default_rng()
    (tmp_path / "noise.txt").write_bytes(rng.choice(np.frombuffer(b"abcdefgh", np.uint8), 300))
    trainer = Trainer(
        read_config(
            write_config(
                data={"kind": "text", "paths": [str(tmp_path / "noise.txt")], "eval_share": 0.5},
                stages=[{"steps": 400, "length": 37, "batch": 4}],
                model={**_model(write_config), "width": 32, "head_size": 16},
                optimizer={"lr": 0.02, "warmup": 5},
            )
        )
    )
    losses = [trainer.train_step()["loss/train"] for _ in range(200)]
    floor = math.log(8)
    assert sum(losses[-10:]) / 10 < 0.7 * floor
    assert trainer.evaluate()["loss/eval"] > floor


def test_evaluation_is_always_the_same(write_config: Writer) -> None:
    trainer = Trainer(read_config(write_config()))
    first = trainer.evaluate()
    assert first == trainer.evaluate()
    assert first["loss/eval"] == pytest.approx(5.545, abs=0.4)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_passkey_accuracy_is_of_whole_answers(write_config: Writer) -> None:
    stages = [{"steps": 1, "length": 300, "batch": 4}]
    data = {"kind": "passkey", "prose": 0.0}
    trainer = Trainer(read_config(write_config(stages=stages, data=data, eval_batches=1)))
    stage = trainer.config.stages[0]
    source = trainer.source(stage).evaluations()["standard"]
    batch = evaluation_batch(source, trainer.config, stage, 0)

    class Knowing(Model):
        def forward(self, ids, state=None, **kwargs):  # type: ignore[no-untyped-def]
            self.head = torch.nn.Linear(256, 256, bias=False)
            torch.nn.init.eye_(self.head.weight)
            hidden = torch.nn.functional.one_hot(batch.targets, 256).float()
            if self.wrong:
                hidden[0, batch.answers[0].nonzero()[1]] = 0  # one digit of one row is wrong
            return hidden, state

        wrong = True

    assert trainer.evaluate()["accuracy/standard"] == 0.0
    trainer.objective.model = Knowing(trainer.model.config)
    assert trainer.evaluate()["accuracy/standard"] == 0.75
    Knowing.wrong = False
    assert trainer.evaluate()["accuracy/standard"] == 1.0


def test_starting_from_a_model(write_config: Writer, tmp_path: Path) -> None:
    """Its config need not be said again; what is said changes it."""
    first = Trainer(read_config(write_config("first"))).run()
    init = str(tmp_path / "first" / "small-step-6")
    path = write_config("second", init=init, model={"topk": 3})
    longer = Trainer(read_config(path))
    assert_same_bits(weights(longer.model), weights(first))
    assert longer.model.config.topk == 3
    assert longer.model.config.width == 16
    assert longer.model.training
    plain = Trainer(read_config(write_config("third", init=init, model=None)))
    assert plain.model.config == first.config
    with pytest.raises(InputError, match=r"emb\.weight is \[256, 16\], expected \[256, 32\]"):
        read_config(path, {"model.width": "32"})
    with pytest.raises(InputError, match="no model 'nowhere'"):
        read_config(path, {"init": "nowhere"})


def test_unusable_devices_are_refused(write_config: Writer) -> None:
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        Trainer(read_config(write_config(device="abacus")))
