"""One token through blocks: all of them in one call on a CPU, a few launches for each on a GPU.

Axes: B rows of the batch, C width, H heads, D head size, L blocks, V vocabulary.
"""

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import Choice, Facts, compiled_lacks, decide, remembered, triton_lacks
from rwkvx_kernels.one_token.common import BlockWeights, Cache, Memory
from rwkvx_kernels.token_shift import Norm


@remembered
def choose(facts: Facts, rows: int = 1, head_size: int = 64, impl: str = "auto") -> Choice:
    """What reads one token of so many rows: "compiled" (`OneToken`), "triton" (`read_block`) or
    "torch": neither, so that the operations are called one by one."""
    triton = triton_lacks(facts)
    if not triton:
        from rwkvx_kernels.one_token.options import MOST_SIZE, STAGES, TABLE  # may be missing
        from rwkvx_kernels.tools.triton_options import missing

        if head_size > MOST_SIZE:
            triton = f"has heads of at most {MOST_SIZE} channels, not {head_size}"
        triton = triton or missing(TABLE, STAGES, facts.dtype, head_size, facts.device)
    compiled = compiled_lacks(facts, torch.float32, torch.bfloat16)
    if rows != 1:
        compiled = compiled or "is slower for several rows, which share the reading of weights"
    if facts.traced or facts.autocast:
        unseen = "is not seen by torch.compile and autocast"
        triton, compiled = triton or unseen, compiled or unseen
    if facts.gradients:
        triton = triton or "has no gradients"
    lacks = {"triton": triton, "compiled": compiled, "torch": "", "reference": ""}
    return decide(impl, facts, lacks)


class OneToken:
    """The blocks of a model, to be read by one token at a time.

    x + mixer(ln1(x)), then x + channel_mix(ln2(x)) (arXiv 2503.14456, eq. 4-22), in float32.
    Weights are used where they are: when one has moved, make this anew.
    """

    def __init__(self, blocks: list[BlockWeights]) -> None:
        """blocks: all of them, those too that are never read here."""
        from rwkvx_kernels.one_token.numba_blocks import Table  # half a second

        self._table = Table(blocks)

    def read(
        self,
        blocks: range,
        x: Tensor,
        v_first: Tensor,
        shifts: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        caches: list[Cache | None],
        new_shifts: Tensor,
        new_states: list[Tensor | None],
    ) -> None:
        """Through consecutive blocks, in place; lists have an entry for each of them.

        Args:
            x: [C] float32, changed. v_first: [C] float32, written by a time mix without v0.
            shifts: the last inputs of the two mixers, each of C elements of the weights' dtype.
            states: [1, H, D, D] float32, contiguous, of a time mix; None of an attention.
            caches: of an attention.
            new_shifts: [L, 2, C] float32, written. new_states: as `states`, written.
        """
        self._table.read(blocks, x, v_first, shifts, states, caches, new_shifts, new_states)


def read_block(x: Tensor, v_first: Tensor, weights: BlockWeights, memory: Memory) -> None:
    """One token of each row through a block, by Triton kernels: in place, waiting for nothing.

    The same equations as `OneToken`, for any number of rows: 5 launches for a time mix, 7 for an
    attention, one more for each level of nodes where it selects coarse to fine.

    Args:
        x: [B, C] float32, changed. v_first: [B, C] float32, written by a time mix without v0.
        memory: changed. Rows never meet: a row that is not finite leaves others as they are.

    Raises:
        ValueError: a memory that is not of that block and of B rows.
    """
    from rwkvx_kernels.one_token.triton_blocks import read_block as read  # Triton may be missing

    memory.check(weights, len(x))
    read(x, v_first, weights, memory)


def embed(ids: Tensor, table: Tensor, norm: Norm) -> Tensor:
    """ids [B] -> layer norm of table[ids], [B, C] float32: one launch."""
    from rwkvx_kernels.one_token.triton_products import embed_rows  # Triton may be missing

    return embed_rows(ids, table, norm)


def logits(
    x: Tensor,
    norm: Norm,
    head: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Product of the head [V, C] (int8 with a scale) and the norm of x [B, C] float32: [B, V] of
    that dtype, in one launch."""
    from rwkvx_kernels.one_token.triton_products import Matrix, read_token

    (y,), *_ = read_token(x, None, norm, [Matrix(head, scale)], [], dtype=dtype)
    return y
