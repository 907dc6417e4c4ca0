"""Extension to long contexts: new blocks first, then weights by what a long context tells."""

import math
from pathlib import Path

import pytest
import torch
from running import Writer, assert_same_bits, weights

import rwkvx
from rwkvx import InputError
from rwkvx.cli import main
from rwkvx.training.batches import Batch
from rwkvx.training.config import read_config
from rwkvx.training.forward import LongContext, Objective, hidden_states, long_weights, scores
from rwkvx.training.trainer import Trainer


def a_batch(trainer: Trainer, length: int) -> Batch:
    ids = torch.randint(1, 256, (2, length + 1))
    none = torch.zeros(2, length, dtype=torch.bool)
    starts = none.clone().numpy()
    starts[:, 0] = True
    starts[1, 21] = True  # a document that begins inside of a row
    chances = torch.rand(2, length)
    return Batch(ids[:, :-1], ids[:, 1:], chances / chances.sum(), none, starts)


def stirred(write_config: Writer) -> Trainer:
    """Past the initial values, where blocks put out nothing."""
    trainer = Trainer(read_config(write_config()))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    trainer.model.double()
    return trainer


def losses_alone(trainer: Trainer, batch: Batch, row: int, start: int, end: int) -> torch.Tensor:
    """Losses of one row's targets, the row read from nothing at `start`."""
    part = batch.cut(slice(row, row + 1), slice(start, end))
    part = part._replace(starts=part.starts.copy())
    part.starts[:, 0] = True
    hidden, _ = hidden_states(trainer.model, part, None)
    return scores(trainer.model, hidden, part.targets).losses[0]


@pytest.mark.parametrize("most", [1.5, 1e9])
def test_weights_compare_a_short_context_with_the_whole(write_config: Writer, most: float) -> None:
    trainer = stirred(write_config)
    batch, size = a_batch(trainer, 40), 8
    with torch.no_grad():
        hidden, _ = hidden_states(trainer.model, batch, None)
        whole = scores(trainer.model, hidden, batch.targets).losses
        found = long_weights(trainer.model, batch, whole, LongContext(size, most))
        for row in range(2):
            expected = torch.ones(40, dtype=found.dtype)
            for window in range(2, 5):
                start = (window - 1) * size
                short = losses_alone(trainer, batch, row, start, start + 2 * size)[size:]
                after = slice(start + size, start + 2 * size)
                difference = short - whole[row, after]
                expected[after] = difference.exp().clamp(max=most)
            torch.testing.assert_close(found[row], expected)
    assert (found[:, : 2 * size] == 1).all()
    assert float(found.max()) <= most
    assert (found != 1).any()
    # What lies in the short context whole is scored alike: the document from 21 on, in 24 to 32.
    torch.testing.assert_close(found[1, 24:32], torch.ones(8, dtype=found.dtype))


def test_the_loss_is_weighted(write_config: Writer) -> None:
    """Its gradient is that of the weighted sum, the weights taken as constants."""
    torch.manual_seed(0)  # weights of a random batch may be near 1 by chance
    trainer = stirred(write_config)
    batch, long = a_batch(trainer, 32), LongContext(8, 4.0)
    objective, model = Objective(trainer.model), trainer.model
    loss, _ = objective(batch, None, long)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden, _ = hidden_states(model, batch, None)
    with torch.no_grad():
        each = scores(model, hidden, batch.targets).losses
        factors = long_weights(model, batch, each, long)
    logits = model.head(hidden)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
    )
    expected = (losses * (batch.weights * factors).flatten()).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = (losses * batch.weights.flatten()).sum().item()
    assert loss.item() != pytest.approx(plain, rel=1e-3)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_windows_must_fill_the_sequence(write_config: Writer) -> None:
    stages = "[{steps: 1, length: 24, batch: 2, long_ce: 5, long_ce_window: 7}]"
    with pytest.raises(InputError, match="multiple of long_ce_window, got 24 and 7"):
        read_config(write_config(), {"stages": stages})


def test_two_stages_of_an_extension(
    write_config: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From RWKV-7: the hybrid starts as the same function, new blocks learn alone, then all."""
    model = {**read_config(write_config()).model.to_dict(), "pattern": ["rwkv7", "rwkv7"]}
    plain = write_config("plain", model=model, stages=[{"steps": 2, "length": 24, "batch": 2}])
    before = weights(Trainer(read_config(plain)).run())
    hybrid = tmp_path / "hybrid"
    with pytest.raises(SystemExit) as status:
        main(["convert", str(tmp_path / "plain" / "small-step-2"), str(hybrid), "--expand", "1"])
    assert not status.value.code, capsys.readouterr().err
    start = weights(rwkvx.load(hybrid))
    stages = [
        {"steps": 3, "length": 24, "batch": 2, "learn": "sparse"},
        {"steps": 2, "length": 48, "batch": 2, "long_ce": 5, "long_ce_window": 8},
    ]
    path = write_config("extended", init=str(hybrid), model=None, stages=stages, save_every=1)
    trainer = Trainer(read_config(path, {"steps": "3"}))
    middle = weights(trainer.run())
    moved = {name for name in start if not torch.equal(start[name], middle[name])}
    assert moved
    assert all(name.startswith("blocks.2.") for name in moved)
    assert_same_bits({n: middle[n] for n in ("emb.weight",)}, {"emb.weight": before["emb.weight"]})
    again = Trainer(read_config(path))
    last = weights(again.run())
    assert not torch.equal(last["emb.weight"], middle["emb.weight"])
    assert all(math.isfinite(float(x.sum())) for x in last.values())
