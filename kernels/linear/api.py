"""Products of activations with weights, by the fastest routine at hand; differentiable.

Axes: I inputs, O outputs, R rank.
"""

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import Choice, Facts, compiled_lacks, decide, facts_of, remembered
from rwkvx_kernels.linear.reference import linear_reference, low_rank_reference
from rwkvx_kernels.linear.torch_form import linear_torch, low_rank_torch


@remembered
def choose(facts: Facts, rows: int, impl: str = "auto", contiguous: bool = True) -> Choice:
    """Which implementation `linear` (of a weight that is contiguous) and `low_rank` run for so
    many rows of x."""
    compiled = compiled_lacks(facts, torch.float32, torch.bfloat16)
    if facts.traced or facts.autocast:
        compiled = compiled or "is not seen by torch.compile and autocast"
    lacks = {"compiled": compiled, "torch": "", "reference": ""}
    slow = "reads the weights for every row" if rows != 1 else ""
    return decide(
        impl, facts, lacks, {"compiled": slow or ("" if contiguous else "reads contiguous rows")}
    )


def linear(
    x: Tensor, weight_OI: Tensor, scale_O: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] of one dtype -> [..., O].

    One row, without gradients on a CPU, is bound by reading the weights, which BLAS does on one
    core and in bfloat16 at half of the speed: a compiled loop reads them with all cores.

    Args:
        scale_O: with it an int8 weight stands for `weight * scale[:, None]`, without gradients.
        impl: "auto", "reference", "torch" or "compiled" (Numba; a CPU, without gradients).

    Raises:
        UnsupportedError: a compiled loop for what it cannot do.
    """
    facts = facts_of(x, weight_OI)
    chosen = choose(facts, _rows(x), impl, weight_OI.is_contiguous()).impl
    if chosen == "compiled":
        from rwkvx_kernels.linear.numba_products import matrix_times_vectors

        return matrix_times_vectors(weight_OI, x, scale_O)
    if chosen == "reference":
        return linear_reference(x, weight_OI, scale_O)
    return linear_torch(x, weight_OI, scale_O, facts)


def low_rank(
    x: Tensor, down_IR: Tensor, up_RO: Tensor, activation: str = "none", impl: str = "auto"
) -> Tensor:
    """`activation(x @ down) @ up`: [..., I] -> [..., O]; activation "none", "tanh" or "sigmoid".

    One row on a CPU, without gradients, in a compiled loop: one call instead of three. `impl` and
    errors as for `linear`.
    """
    facts = facts_of(x, down_IR, up_RO)
    chosen = choose(facts, _rows(x), impl).impl
    if chosen == "compiled":
        from rwkvx_kernels.linear.numba_products import low_rank_of_vectors

        return low_rank_of_vectors(x, down_IR, up_RO, activation)
    if chosen == "reference":
        return low_rank_reference(x, down_IR, up_RO, activation)
    return low_rank_torch(x, down_IR, up_RO, activation, facts)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])
