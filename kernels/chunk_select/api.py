"""The public selection of chunks: checks its arguments, chooses an implementation and calls it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.chunk_select.common import from_groups, scored_whole, to_groups
from rwkvx_kernels.chunk_select.reference import select_reference
from rwkvx_kernels.chunk_select.torch_form import select_torch
from rwkvx_kernels.chunk_select.trees import Trees
from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    UnsupportedError,
    compiled_lacks,
    decide,
    remembered,
    triton_lacks,
    without_autocast,
)
from rwkvx_kernels.names import SELECTIONS
from rwkvx_kernels.tools.operators import operator


@remembered
def choose(facts: Facts, selection: str = "flat", impl: str = "auto", dim: int = 64) -> Choice:
    """Which implementation `select_chunks` runs; a choice has no gradient."""
    facts = facts._replace(gradients=False)
    triton = triton_lacks(facts)
    if not triton:
        from rwkvx_kernels.chunk_select.options import STAGES, TABLE  # Triton may be missing
        from rwkvx_kernels.tools.triton_options import missing

        triton = missing(TABLE, STAGES, facts.dtype, dim, facts.device)
    lacks = {
        "triton": triton,
        "compiled": compiled_lacks(facts),
        "torch": "",
        "reference": "",
    }
    flat = "scores every chunk slower than matrix products" if selection == "flat" else ""
    return decide(impl, facts, lacks, {"compiled": flat})


@without_autocast
def select_chunks(
    q: Tensor,
    means: Tensor,
    chunk_size: int,
    topk: int,
    offset: int = 0,
    selection: str = "flat",
    impl: str = "auto",
    trees: Trees | None = None,
) -> Tensor:
    """The best `topk - 1` completed chunks before each query's own, to be read with that one.

    The score of a chunk is the unscaled product of the query and the mean of the chunk's keys
    (MoBA, arXiv 2502.13189, eq. 5-6). An unfinished chunk never competes. No gradient.

    Args:
        q: [B, T, H, D] at positions offset ... offset + T - 1.
        means: [B, G, C, D] from `chunk_means`, at least float32, of every chunk that is complete
            before the last query's own; H a multiple of G.
        chunk_size, topk: at least 1; topk counts the own chunk.
        selection: "flat" scores every past chunk; "coarse_to_fine" those that a descent of a tree
            of chunks visits, at a cost that grows with the logarithm of their number, and finds
            nearly always the same (README.md). The first 1,536 past chunks are always scored.
        impl: "auto", "reference", "torch", "compiled" (Numba; a CPU) or "triton".
        trees: of these means, kept from call to call (`KeyValueCache.trees`).

    Returns:
        [B, T, H, topk - 1] integers: chunk numbers in no particular order; -1 where fewer past
        chunks exist, after those that do.

    Raises:
        ValueError: arguments that do not fit together.
        UnsupportedError: an implementation asked for by name that cannot do this.
    """
    check_selection(chunk_size, topk, selection)
    if q.dim() != 4 or means.dim() != 4 or q.shape[0] != means.shape[0]:
        raise ValueError(
            f"q must be [B, T, H, D], means [B, G, C, D]: {list(q.shape)}, {list(means.shape)}"
        )
    if q.shape[3] != means.shape[3] or q.shape[2] % max(1, means.shape[1]):
        raise ValueError(f"heads of q {list(q.shape)} and means {list(means.shape)} do not fit")
    past = past_chunks(q, offset, chunk_size)
    if offset < 0 or past > means.shape[2]:
        raise ValueError(f"queries at {offset}, behind {past} chunks: means has {means.shape[2]}")
    facts = Facts(q.device, q.dtype, traced=torch.compiler.is_compiling())
    impl = choose(facts, selection, impl, q.shape[3]).impl
    if facts.traced and impl != "triton":
        return _traced(q, means, chunk_size, topk, offset, selection, impl)
    # More than there are chunks cost nothing but their -1.
    slots = slots_of(topk, past, impl)
    if selection == "flat":
        trees = None
    elif trees is None:
        trees = Trees(means.detach().flatten(0, 1))
    chosen = select(impl, q, means, chunk_size, slots + 1, offset, trees)
    return F.pad(chosen, (0, topk - 1 - slots), value=-1)


@operator(
    "select_chunks_plain",
    lambda q, means, size, topk, *_: q.new_empty((*q.shape[:3], topk - 1), dtype=torch.int64),
)
def _traced(
    q: Tensor, means: Tensor, chunk_size: int, topk: int, offset: int, selection: str, impl: str
) -> Tensor:
    return select_chunks(q, means, chunk_size, topk, offset, selection, impl)


def slots_of(topk: int, chunks: int, impl: str) -> int:
    """How many chunks a query can read, of so many; Triton compiles for each number above 16."""
    least = 16 if impl == "triton" else 0
    return topk - 1 if topk - 1 <= least else min(topk - 1, max(least, chunks))


def past_chunks(q: Tensor, offset: int, chunk_size: int) -> int:
    """Chunks before the last query's own."""
    return max(0, offset + q.shape[1] - 1) // chunk_size


@torch.no_grad()
def select(
    impl: str,
    q: Tensor,
    means: Tensor,
    chunk_size: int,
    topk: int,
    offset: int,
    trees: Trees | None,
) -> Tensor:
    """`select_chunks` by an implementation that was chosen; None for `trees` is flat selection."""
    q, means = q.detach(), means.detach()
    if topk == 1 or q.numel() == 0:
        return q.new_empty((*q.shape[:3], topk - 1), dtype=torch.int64)
    if impl == "reference":
        wide = torch.promote_types(q.dtype, torch.float32)
        q, means = q.to(wide), means.to(wide)
        return select_reference(q, means, chunk_size, topk, offset, trees is not None)
    if impl == "triton":
        from rwkvx_kernels.chunk_select.triton_ops import select_triton  # Triton may be missing

        past = past_chunks(q, offset, chunk_size)
        forest = trees.forest(past) if trees and past > scored_whole(topk) else []
        return select_triton(q, means, forest, offset, chunk_size, topk)
    q_NTRD = to_groups(q, means.shape[1])
    args = (means.flatten(0, 1), trees and trees.tree, offset, chunk_size, topk)
    return from_groups(select_groups(impl, q_NTRD, *args), len(q))


def select_groups(impl: str, q_NTRD: Tensor, *args: Any) -> Tensor:
    """ "torch" or "compiled" selection of queries that are laid out by group."""
    if impl == "torch":
        return select_torch(q_NTRD, *args)
    from rwkvx_kernels.chunk_select.numba_form import select_compiled  # takes half a second

    return select_compiled(q_NTRD, *args)


def check_selection(chunk_size: int, topk: int, selection: str) -> None:
    """Raises ValueError for numbers below 1, UnsupportedError for a selection that is not there."""
    if chunk_size < 1 or topk < 1:
        raise ValueError(f"chunk_size and topk must be >= 1, got {chunk_size} and {topk}")
    if selection not in SELECTIONS:
        raise UnsupportedError(f'selection="{selection}" is not there; available: {SELECTIONS}')
