"""RWKV-7 blocks that read each sequence in pieces (training), and settings of sparse blocks."""

import pytest
import torch
from small import HYBRID, random_model, variant
from torch import Tensor

from rwkvx import InputError, ModelConfig, ModelState
from rwkvx.kinds.rwkv7 import Rwkv7State
from rwkvx.kinds.sparse import SparseState


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(HYBRID.vocab_size, (2, 96), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_pieces_from_the_true_states_are_the_whole(ids: Tensor) -> None:
    """Two pieces, the second from what the first left behind: nothing may differ."""
    model = random_model(HYBRID)
    whole, _ = model(ids, keep_cache=False)
    _, middle = model(ids[:, :48])
    fresh = model.fresh_state(2)
    blocks = []
    for start, later in zip(fresh.blocks, middle.blocks, strict=True):
        if isinstance(start, Rwkv7State) and isinstance(later, Rwkv7State):
            # Rows: first piece of sequence 0, second piece of sequence 0, first of 1, second of 1.
            pairs = [torch.stack(x, 1).flatten(0, 1) for x in zip(start, later, strict=True)]
            blocks.append(Rwkv7State(*pairs))
        else:
            blocks.append(start)
    model.recurrent_pieces = 2
    pieces, _ = model(ids, ModelState(tuple(blocks), 0), keep_cache=False)
    assert torch.allclose(pieces, whole, rtol=0, atol=1e-11)


@torch.no_grad()
def test_pieces_of_rwkv7_alone_are_separate_sequences(ids: Tensor) -> None:
    model = random_model(variant("only_rwkv7"))
    separate, _ = model(ids.view(6, 32))
    model.recurrent_pieces = 3
    pieces, state = model(ids, keep_cache=False)
    assert torch.allclose(pieces, separate.view_as(pieces), rtol=0, atol=1e-11)
    assert len(state.blocks[0].ffn_shift) == 6


@torch.no_grad()
def test_attention_sees_across_pieces(ids: Tensor) -> None:
    """Change the first token: RWKV-7 alone cannot tell in the second piece, the hybrid can."""
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % HYBRID.vocab_size
    for config, differs in ((variant("only_rwkv7"), False), (dense(HYBRID), True)):
        model = random_model(config)
        model.recurrent_pieces = 2
        a, b = (model(x, keep_cache=False)[0][:, 48:] for x in (ids, other))
        assert bool((a != b).any()) is differs


def dense(config: ModelConfig) -> ModelConfig:
    return ModelConfig.from_dict({**config.to_dict(), "topk": 6})


@torch.no_grad()
def test_set_topk_is_the_config_s_topk(ids: Tensor) -> None:
    model, more = random_model(HYBRID), random_model(dense(HYBRID))
    few, _ = model(ids)
    model.set_topk(6)
    assert torch.equal(model(ids)[0], more(ids)[0])
    assert not torch.equal(model(ids)[0], few)
    for bad in (0, 1 << 30, 1.5):
        with pytest.raises(InputError, match="topk must be a whole number from 1 to"):
            model.set_topk(bad)
    assert torch.equal(model(ids)[0], more(ids)[0])


@torch.no_grad()
def test_a_prompt_s_cache_is_sized_at_once(ids: Tensor) -> None:
    """A cache that grew step by step would have held old and new together."""
    model = random_model(HYBRID)
    _, state = model(ids, logits="none")
    caches = [c for b in state.blocks if isinstance(b, SparseState) for c, _ in b.cached]
    assert [c.capacity for c in caches] == [96, 96]


def test_recurrent_state_keeps_its_rows(ids: Tensor) -> None:
    model = random_model(HYBRID)
    model.recurrent_pieces = 2
    _, state = model(ids, keep_cache=False)
    passed = state.recurrent()
    rows = [len(b.map(Tensor.detach).ffn_shift) for b in passed.blocks]
    assert rows == [4, 2, 4, 2]
