"""States of other models are refused wherever they enter; what a state says of itself."""

import pytest
import torch
from small import HYBRID, random_ids, random_model, variant

import rwkvx
from rwkvx import InputError, ModelConfig, decoding
from rwkvx.state import ModelState

WINDOW = variant("window")
# A model, and one whose state it must not read.
OTHERS = {
    "kv heads": (HYBRID, {"sparse_kv_heads": 2}),
    "head size": (HYBRID, {"head_size": 16}),
    "chunk size": (HYBRID, {"chunk_size": 8}),
    "key convolution": (HYBRID, {"key_conv": 3}),
    "no key convolution": (variant("key_conv"), {"key_conv": 0}),
    "another convolution": (variant("key_conv"), {"key_conv": 2}),
    "window": (WINDOW, {"window": 21}),
    "kind": (WINDOW, {"pattern": ("rwkv7", "sparse", "rwkv7", "sparse")}),
    "order": (HYBRID, {"pattern": ("sparse", "rwkv7", "rwkv7", "sparse")}),
    "depth": (HYBRID, {"pattern": ("rwkv7", "sparse")}),
    "width": (HYBRID, {"width": 64}),
}


def changed(config: ModelConfig, **fields: object) -> ModelConfig:
    return ModelConfig.from_dict({**config.to_dict(), **fields})


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_states_of_other_models_are_refused(name: str) -> None:
    config, fields = OTHERS[name]
    model, other = (random_model(c).float() for c in (config, changed(config, **fields)))
    ids = random_ids(50, batch=1)
    _, state = other(ids)
    for tokens in (1, 20):
        with pytest.raises(InputError):
            model(ids[:, :tokens], state)
    with pytest.raises(InputError):
        decoding.start(model, state, 10)


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_states_of_other_batches_are_refused(rows: int) -> None:
    model, ids = random_model(WINDOW), random_ids(40, batch=2)
    _, state = model(ids)
    with pytest.raises(InputError, match=f"the state is of 2 sequences, the model reads {rows}"):
        model(random_ids(3, batch=rows), state)
    packed = torch.arange(rows + 1)
    with pytest.raises(InputError, match=f"the state is of 2 sequences, the model reads {rows}"):
        model(random_ids(rows, batch=1), state, cu_seqlens=packed)


def test_what_is_no_state_is_refused() -> None:
    model, ids = random_model(HYBRID), random_ids(5)
    for wrong in ((), [1], torch.zeros(3), "state"):
        with pytest.raises(InputError, match="state must be a ModelState"):
            model(ids, wrong)
    with pytest.raises(InputError, match="block 0 takes a Rwkv7State, not a int"):
        model(ids, ModelState((1, 2, 3, 4), 0))
    with pytest.raises(InputError, match="ids must be a tensor"):
        model([1, 2])


@torch.no_grad()
def test_a_state_prints_on_one_line() -> None:
    _, state = random_model(HYBRID)(random_ids(30))
    assert repr(state) == str(state) == "ModelState(4 blocks, 2 rows, 30 tokens)"


@torch.no_grad()
def test_a_state_holds_no_more_than_it_says() -> None:
    """A view of one token would keep the activations of a whole segment alive."""
    _, state = random_model(variant("key_conv"))(random_ids(200, batch=1))
    for block in state.blocks:
        for x in rwkvx.kinds.contract.tensors_of(block).values():
            assert x.untyped_storage().nbytes() == x.nbytes


@torch.no_grad()
def test_a_window_s_cache_stays_small() -> None:
    model = random_model(variant("only_window"))
    _, short = model(random_ids(2 * 13 - 1, batch=1))
    _, state = model(random_ids(500, batch=1))
    assert rwkvx.state.state_bytes(state) <= rwkvx.state.state_bytes(short)
