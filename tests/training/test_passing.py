"""Recurrent states passed on between steps: to some rows, never into a document that begins."""

import numpy as np
import pytest
import torch
from running import Writer
from torch import Tensor

from rwkvx.kinds.rwkv7 import Rwkv7State
from rwkvx.state import ModelState
from rwkvx.training.batches import Batch, step_batch
from rwkvx.training.config import StageConfig, read_config
from rwkvx.training.forward import hidden_states
from rwkvx.training.passing import carried_state, initial_state
from rwkvx.training.trainer import Trainer


def a_step(write_config: Writer, rows: int, share: float) -> tuple[Trainer, StageConfig, Batch]:
    stages = [{"steps": 4, "length": 16, "batch": rows, "state_passing": share}]
    trainer = Trainer(read_config(write_config(stages=stages)))
    stage = trainer.config.stages[0]
    batch = step_batch(trainer.source(stage), trainer.config, 1)
    assert initial_state(trainer.model, trainer.carried, stage, batch, (0,)) is None
    trainer.train_step()
    return trainer, stage, batch


def first_block(state: ModelState | None) -> Rwkv7State:
    assert state is not None
    assert isinstance(state.blocks[0], Rwkv7State)
    return state.blocks[0]


def test_states_are_passed_on(write_config: Writer) -> None:
    """With share 1 every row starts from a carried state, with 0 from nothing."""
    trainer, stage, batch = a_step(write_config, 3, 1.0)
    state = initial_state(trainer.model, trainer.carried, stage, batch, (0,))
    block = first_block(state)
    assert state is not None
    assert state.length == 0
    assert all(row.any() for row in block.wkv)
    assert not block.ffn_shift.requires_grad
    assert state.blocks[1].cached == ()  # type: ignore[union-attr]
    trainer, stage, batch = a_step(write_config, 3, 0.0)
    assert initial_state(trainer.model, trainer.carried, stage, batch, (0,)) is None


def test_some_rows_start_afresh(write_config: Writer) -> None:
    trainer, stage, batch = a_step(write_config, 64, 0.5)
    block, again, other = (
        first_block(initial_state(trainer.model, trainer.carried, stage, batch, (seed,)))
        for seed in (1, 1, 2)
    )
    carried = [bool(row.any()) for row in block.wkv]
    assert 16 < sum(carried) < 48
    assert all(torch.equal(x, y) for x, y in zip(block, again, strict=True))
    assert carried != [bool(row.any()) for row in other.wkv]


def packed(batch: Batch, *places: tuple[int, int]) -> Batch:
    starts = np.zeros_like(batch.starts)
    starts[:, 0] = True
    for row, place in places:
        starts[row, place] = True
    return batch._replace(starts=starts)


def test_documents_inside_of_a_row_start_from_nothing(write_config: Writer) -> None:
    trainer, stage, batch = a_step(write_config, 3, 1.0)
    batch = packed(batch, (0, 5), (2, 1), (2, 9))
    assert batch.offsets is not None
    assert batch.offsets.tolist() == [0, 5, 16, 32, 33, 41, 48]
    block = first_block(initial_state(trainer.model, trainer.carried, stage, batch, (0,)))
    assert [bool(row.any()) for row in block.wkv] == [True, False, True, True, False, False]


def test_documents_do_not_see_one_another(write_config: Writer) -> None:
    """Hidden states of packed rows are those of every document alone; so are the states after."""
    trainer = Trainer(read_config(write_config()))
    model = trainer.model.double()
    with torch.no_grad():  # past the initial values, where blocks put out nothing
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(1, 256, (3, 16))
    none = torch.zeros_like(ids, dtype=torch.bool)
    batch = packed(Batch(ids, ids, torch.ones(3, 16), none, none.numpy()), (0, 5), (2, 1), (2, 9))

    def alone(row: int, start: int, end: int) -> tuple[Tensor, ModelState]:
        hidden, state = model(ids[row : row + 1, start:end], logits="hidden")
        return hidden[0], state

    with torch.no_grad():
        hidden, final = hidden_states(model, batch, None)
        carried = carried_state(final, batch)
        parts = [(0, 0, 5), (0, 5, 16), (1, 0, 16), (2, 0, 1), (2, 1, 9), (2, 9, 16)]
        for row, start, end in parts:
            expected, state = alone(row, start, end)
            torch.testing.assert_close(hidden[row, start:end], expected)
            if end == 16:
                for x, y in zip(first_block(carried), first_block(state), strict=True):
                    torch.testing.assert_close(x[row], y[0])
        whole, _ = hidden_states(model, packed(batch), None)
    assert not torch.allclose(whole[0, 5:], hidden[0, 5:])
    torch.testing.assert_close(whole[1], hidden[1])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_packed_rows_learn(write_config: Writer, share: float) -> None:
    """A step over rows with documents inside gives every parameter a finite gradient."""
    trainer, _, _ = a_step(write_config, 3, share)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    plain = trainer.source(trainer.config.stages[0]).rows

    def rows(wanted):  # type: ignore[no-untyped-def]
        found = plain(wanted)
        found.starts[1, 7] = True
        return found

    trainer.source(trainer.config.stages[0]).rows = rows  # type: ignore[method-assign]
    for _ in range(2):
        trainer.train_step()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)
    )
