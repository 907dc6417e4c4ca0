"""Training stages in which RWKV-7 blocks read in pieces: data, states, resumption."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvx import InputError
from rwkvx.kinds.rwkv7 import Rwkv7State
from rwkvx.training.batches import step_batch
from rwkvx.training.config import read_config
from rwkvx.training.passing import initial_state
from rwkvx.training.trainer import Trainer

Writer = Callable[..., Path]
STAGES = "[{steps: 6, length: 24, batch: 2, recurrent_length: 8, state_passing: 0.5}]"


def test_every_piece_goes_on_from_a_passed_state(write_config: Writer) -> None:
    stages = STAGES.replace("state_passing: 0.5", "state_passing: 0.0")
    trainer = Trainer(read_config(write_config(), {"stages": stages}))
    trainer.train_step()
    stage = trainer.config.stages[0]
    batch = step_batch(trainer.source(stage), trainer.config, 1)
    state = initial_state(trainer.model, trainer.carried, stage, batch, (0,))
    assert state is not None
    assert trainer.carried is not None
    old, new = trainer.carried.blocks[0], state.blocks[0]
    assert isinstance(old, Rwkv7State)
    assert isinstance(new, Rwkv7State)
    assert len(new.wkv) == 6
    for row, wkv in enumerate(new.wkv):
        passed = any(torch.equal(wkv, x) for x in old.wkv)
        assert passed is (row % 3 != 0)  # without state passing, first pieces start from zero


def test_a_resumed_run_in_pieces_has_the_same_bits(write_config: Writer, tmp_path: Path) -> None:
    path = write_config()
    models = []
    for name, stops in (("once", [6]), ("twice", [3, 6])):
        for stop in stops:
            overrides = {"stages": STAGES, "out": str(tmp_path / name)}
            trainer = Trainer(read_config(path, overrides))
            while trainer.step < stop:
                trainer.train_step()
            trainer.save()
        models.append(trainer.model.state_dict())
    assert all(np.array_equal(models[0][n], models[1][n]) for n in models[0])


def test_pieces_must_fill_the_sequence(write_config: Writer) -> None:
    stages = "[{steps: 1, length: 24, batch: 2, recurrent_length: 7}]"
    with pytest.raises(InputError, match="multiple of recurrent_length"):
        read_config(write_config(), {"stages": stages})


def test_pieces_of_packed_documents_are_refused(write_config: Writer, tmp_path: Path) -> None:
    lines = [f'{{"text": "number {i} of many"}}' for i in range(50)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    data = "{kind: text, paths: [" + str(tmp_path / "many.jsonl") + "]"
    with pytest.raises(InputError, match="documents begin inside"):
        Trainer(read_config(write_config(), {"stages": STAGES, "data": data + "}"}))
    data += ", separate: false}"
    Trainer(read_config(write_config(), {"stages": STAGES, "data": data})).train_step()
