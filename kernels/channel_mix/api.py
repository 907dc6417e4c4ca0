"""The public squared ReLU: chooses an implementation."""

from torch import Tensor

from rwkvx_kernels.channel_mix.reference import squared_relu_reference
from rwkvx_kernels.channel_mix.torch_form import squared_relu_torch
from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    decide_elementwise,
    facts_of,
    remembered,
    triton_lacks,
)


@remembered
def choose(facts: Facts, impl: str = "auto") -> Choice:
    """Which implementation `squared_relu` runs."""
    triton = triton_lacks(facts)
    if not triton:
        from rwkvx_kernels.channel_mix.options import STAGES, TABLE
        from rwkvx_kernels.tools.triton_options import missing  # Triton may be missing

        triton = missing(TABLE, STAGES, facts.dtype, 1, facts.device)
    return decide_elementwise(impl, facts, triton)


def squared_relu(x: Tensor, impl: str = "auto", overwrite: bool = False) -> Tensor:
    """`relu(x)^2` (arXiv 2503.14456, eq. 22), differentiable.

    Args:
        x: of any shape and floating-point dtype.
        impl: "auto", "reference", "torch", "compiled" (Numba, on a CPU; traced by `torch.compile`,
            it is torch's form) or "triton".
        overwrite: x may be overwritten, where no gradient is wanted: nobody else reads it.

    Raises:
        UnsupportedError: Triton kernels for float64 or without a GPU.
    """
    facts = facts_of(x)
    chosen = choose(facts, impl).impl
    if chosen == "reference":
        return squared_relu_reference(x)
    overwrite = overwrite and not facts.gradients and x.is_contiguous()
    if chosen == "torch":
        return squared_relu_torch(x, overwrite)
    if chosen == "compiled":
        from rwkvx_kernels.channel_mix.numba_relu import squared_relu_compiled  # half a second

        return squared_relu_compiled(x, overwrite)
    from rwkvx_kernels.channel_mix.triton_relu import squared_relu as operator  # may be missing

    return operator(x.contiguous())
