"""Turning RWKV-7 into a hybrid: sparse blocks between the blocks that are there."""

from dataclasses import replace

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.config import ModelConfig, hybrid_pattern
from rwkvx.errors import InputError
from rwkvx.init import init_sparse_block
from rwkvx.model import Block

INITS = ("zero", "copy")
# What the training code of RWKV-X copies from the RWKV-7 block before a sparse block.
COPIED = (
    "att.receptance.weight",
    "att.key.weight",
    "att.value.weight",
    "att.output.weight",
    "ffn.key.weight",
    "ffn.value.weight",
)
CHECK_TOKENS = 64


def expand(source: Checkpoint, sparse_blocks: int, init: str = "zero") -> Checkpoint:
    """L RWKV-7 blocks with M sparse blocks between them: one after every L // M.

    Args:
        init: "zero": new blocks put out nothing until they are trained, so the function stays the
            same, as the paper has it (arXiv 2504.21463). "copy": their projections are those of
            the RWKV-7 block before, as in the official training code; that changes the function.

    Raises:
        InputError: there are sparse blocks already, or M does not divide L.
    """
    rwkv_blocks = len(source.config.pattern)
    if "sparse" in source.config.pattern:
        raise InputError("the model has sparse blocks already: only pure RWKV-7 can be expanded")
    if not 0 < sparse_blocks <= rwkv_blocks or rwkv_blocks % sparse_blocks:
        raise InputError(
            f"{rwkv_blocks} RWKV-7 blocks cannot be spread evenly before {sparse_blocks} sparse "
            f"blocks: choose a divisor of {rwkv_blocks}"
        )
    config = replace(source.config, pattern=hybrid_pattern(rwkv_blocks, sparse_blocks))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    old = 0  # the RWKV-7 block that comes next
    for position, kind in enumerate(config.pattern):
        if kind == "rwkv7":
            tensors |= _renamed(_block(source, old), position)
            old += 1
            continue
        before, index = _block(source, old - 1), position - old
        # The official code counts sparse blocks by themselves here, over the depth of RWKV-7.
        ratio = 1 - (index / rwkv_blocks if init == "copy" else position / len(config.pattern))
        tensors |= _renamed(_sparse_block(config, before, init, ratio, generator), position)
    outer = {n: x for n, x in source.tensors.items() if not n.startswith("blocks.")}
    return Checkpoint(config, tensors | outer, source.tokenizer)


@torch.inference_mode()
def assert_same_function(before: Checkpoint, after: Checkpoint) -> None:
    """Run both models on random tokens: every logit must be the same.

    Raises:
        InputError: one is not.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(before.config.vocab_size, (1, CHECK_TOKENS), generator=draw)
    dtypes = {x.dtype for x in before.tensors.values()}
    if len(dtypes) > 1:  # matrix products take operands of one dtype
        before, after = before.to(torch.float32), after.to(torch.float32)
    (expected, _), (found, _) = before.model()(ids), after.model()(ids)
    if not torch.equal(expected, found):
        raise InputError("the expanded model does not compute what the model before it does")


def _block(source: Checkpoint, index: int) -> dict[str, Tensor]:
    """Tensors of one block by their names in it."""
    prefix = f"blocks.{index}."
    return {n.removeprefix(prefix): x for n, x in source.tensors.items() if n.startswith(prefix)}


def _renamed(block: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    return {f"blocks.{position}.{name}": x for name, x in block.items()}


def _sparse_block(
    config: ModelConfig,
    before: dict[str, Tensor],
    init: str,
    ratio: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A new sparse block, each tensor with the dtype of its namesake in the block before."""
    block = Block(config, "sparse", first=False)
    init_sparse_block(block, ratio, generator)
    like = {name: before.get(name, before["ln1.weight"]) for name in block.state_dict()}
    new = {name: x.detach().to(like[name].dtype) for name, x in block.state_dict().items()}
    if init == "copy":
        new |= {name: before[name].clone() for name in COPIED}
    return new
