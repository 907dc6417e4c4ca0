"""Turning a model of one kind of block into a hybrid: blocks of another kind between them."""

from dataclasses import replace

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.config import ModelConfig, spread
from rwkvx.errors import InputError
from rwkvx.init import init_block
from rwkvx.model import Block

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


def expand(source: Checkpoint, count: int, init: str = "zero", kind: str = "sparse") -> Checkpoint:
    """L blocks of one kind with M new ones between them: one after every L // M.

    Args:
        init: "zero": new blocks put out nothing until they are trained, so the function stays the
            same, as the paper has it (arXiv 2504.21463). "copy": their projections are those of
            the block before, as in the official training code; that changes the function.
        kind: of the new blocks.

    Raises:
        InputError: the model is a hybrid already, or M does not divide L.
    """
    (base, *others), depth = dict.fromkeys(source.config.pattern), len(source.config.pattern)
    if others or base == kind:
        raise InputError(
            f"the model has {', '.join([base, *others])} blocks already: only a model of one kind "
            f"can be expanded, by another"
        )
    if not 0 < count <= depth:
        raise InputError(f"{count} new blocks between {depth}: choose a divisor of {depth}")
    config = replace(source.config, pattern=spread(base, depth, kind, count))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    old = 0  # the block of the source that comes next
    for position, own in enumerate(config.pattern):
        if own == base:
            tensors |= _renamed(_block(source, old), position)
            old += 1
            continue
        before, index = _block(source, old - 1), position - old
        # The official code counts new blocks by themselves here, over the depth of the others.
        height = 1 - index / depth if init == "copy" else None
        tensors |= _renamed(_new_block(config, position, before, height, generator), position)
        if init == "copy":
            copied = {name: before[name].clone() for name in COPIED}
            tensors |= _renamed(copied, position)
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


def _new_block(
    config: ModelConfig,
    position: int,
    before: dict[str, Tensor],
    height: float | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Each tensor with the dtype of its namesake in the block before."""
    block = Block(config, position)
    init_block(block, generator, height)
    like = next(iter(before.values())).dtype
    return {
        name: x.detach().to(before[name].dtype if name in before else like)
        for name, x in block.state_dict().items()
    }
