"""One of several processes that read a sequence together: what it computes, as a file."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import rwkvx
from rwkvx.sequence import SequenceParallel


def model_of(config: rwkvx.ModelConfig) -> rwkvx.Model:
    """In float64, with weights of which none is zero."""
    model = rwkvx.init_weights(rwkvx.Model(config), 0).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1 * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return model


def inputs_of(config: rwkvx.ModelConfig, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Ids [B, T] and what the hidden states are weighed with [B, T, C]."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=draw)
    shape = (rows, tokens, config.width)
    return ids, torch.randn(shape, generator=draw, dtype=torch.float64)


def state_of(model: rwkvx.Model, rows: int) -> Any:
    """A state that a sequence goes on from: nothing in it is zero."""
    draw = torch.Generator().manual_seed(3)
    blocks = (
        block.map(lambda x: 0.5 * torch.randn(x.shape, generator=draw, dtype=x.dtype))
        for block in model.fresh_state(rows).blocks
    )
    return rwkvx.ModelState(tuple(blocks), 0)


def computed(model: rwkvx.Model, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    """Hidden states and gradients of all weights; one process reads the whole as it is."""
    sequence = model.sequence
    state = state_of(model, len(ids))
    if sequence is not None:
        ids, weights = sequence.own(ids), sequence.own(weights)
    hidden, final = model(ids, state, logits="hidden", keep_cache=False)
    assert hidden is not None
    (hidden * weights).sum().backward()
    found = {f"gradient.{n}": x.grad for n, x in model.named_parameters() if x.grad is not None}
    ends = {f"final.{i}": block.ffn_shift for i, block in enumerate(final.blocks)}
    return {"hidden": hidden.detach(), **found, **{n: x.detach() for n, x in ends.items()}}


def work(rank: int, size: int, fields: dict[str, Any], tokens: int, folder: str) -> None:
    """Read one part."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        config = rwkvx.ModelConfig.from_dict(fields)
        model = model_of(config)
        model.sequence = SequenceParallel(dist.group.WORLD)
        model.gradient_checkpointing = size == 4
        found = computed(model, *inputs_of(config, 2, tokens))
        save_file({n: x.contiguous() for n, x in found.items()}, Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()
