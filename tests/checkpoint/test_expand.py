"""RWKV-7 expanded to a hybrid: the same function, or the projections of the block before."""

import pytest
import torch
from weights import config, random_checkpoint, random_ids

from rwkvx import InputError, hybrid_pattern
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.expand import COPIED, assert_same_function, expand

SHAPE = config(width=64, pattern=["rwkv7"] * 12, chunk_size=8, topk=2)


def logits(checkpoint: Checkpoint, tokens: int = 100) -> torch.Tensor:
    with torch.inference_mode():
        return checkpoint.model()(random_ids(tokens, 300)[None])[0]


def block(checkpoint: Checkpoint, position: int) -> dict[str, torch.Tensor]:
    prefix = f"blocks.{position}."
    named = checkpoint.tensors.items()
    return {n.removeprefix(prefix): x for n, x in named if n.startswith(prefix)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse_blocks", [1, 2, 4, 12])
def test_zero_keeps_the_function(sparse_blocks: int, dtype: torch.dtype) -> None:
    before = random_checkpoint(SHAPE, dtype)
    after = expand(before, sparse_blocks, "zero")
    assert after.config.pattern == hybrid_pattern(12, sparse_blocks)
    assert torch.equal(logits(after), logits(before))
    assert_same_function(before, after)
    assert {x.dtype for x in after.tensors.values()} == {dtype}
    rwkv = [i for i, kind in enumerate(after.config.pattern) if kind == "rwkv7"]
    for old, new in enumerate(rwkv):
        for name, x in block(before, old).items():
            assert torch.equal(block(after, new)[name], x), name


def test_zero_blocks_learn() -> None:
    """Only what is multiplied by zero stays without a gradient at first."""
    after = expand(random_checkpoint(SHAPE), 4, "zero")
    model = after.model().train()
    model(random_ids(20, 300)[None])[0].square().mean().backward()
    for position, kind in enumerate(after.config.pattern):
        if kind == "sparse":
            assert model.blocks[position].att.output.weight.grad.abs().max() > 0
            assert model.blocks[position].ffn.value.weight.grad.abs().max() > 0


def test_copy_takes_the_projections_of_the_block_before() -> None:
    before = random_checkpoint(SHAPE, torch.bfloat16)
    after = expand(before, 4, "copy")
    for index, position in enumerate((3, 7, 11, 15)):
        new, source = block(after, position), block(before, 3 * index + 2)
        for name in COPIED:
            assert torch.equal(new[name], source[name])
            assert new[name].data_ptr() != source[name].data_ptr()
        assert torch.equal(new["ln1.weight"].float(), torch.ones(64))
        # The training code numbers the sparse blocks by themselves, over the 12 of RWKV-7.
        mix = 1 - (torch.arange(64) / 64) ** ((1 - index / 12) ** 4)
        assert torch.equal(new["ffn.x_k"], mix.bfloat16())
    with pytest.raises(InputError, match="does not compute what the model before it does"):
        assert_same_function(before, after)


def test_dtypes_may_differ_within_the_model() -> None:
    before = random_checkpoint(SHAPE, torch.bfloat16)
    before.tensors["blocks.5.att.w0"] = before.tensors["blocks.5.att.w0"].float()
    after = expand(before, 2, "zero")
    assert_same_function(before, after)
    assert after.tensors["blocks.5.att.w0"].dtype == torch.float32
    assert after.tensors["blocks.6.att.key.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("count", [-1, 0, 5, 24])
def test_depths_that_do_not_divide(count: int) -> None:
    with pytest.raises(InputError, match=rf"{count} (sparse|new) blocks.*a divisor"):
        expand(random_checkpoint(SHAPE), count)


def test_hybrids_are_not_expanded() -> None:
    with pytest.raises(InputError, match="has rwkv7, sparse blocks already"):
        expand(random_checkpoint(config(width=64)), 2)
    with pytest.raises(InputError, match=r"has rwkv7 blocks already: .* by another"):
        expand(random_checkpoint(SHAPE), 2, kind="rwkv7")


@pytest.mark.parametrize("init", ["zero", "copy"])
def test_blocks_of_another_kind(init: str) -> None:
    before = random_checkpoint(SHAPE)
    after = expand(before, 3, init, "window")
    assert after.config.pattern == (("rwkv7",) * 4 + ("window",)) * 3
    after.model()
    if init == "zero":
        assert_same_function(before, after)
