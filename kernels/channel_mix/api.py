"""The public squared ReLU: chooses an implementation."""

from torch import Tensor

from rwkvx_kernels.channel_mix.reference import squared_relu_reference
from rwkvx_kernels.dispatch import resolve_impl

AVAILABLE = ("reference", "cpu", "triton")


def squared_relu(x: Tensor, impl: str = "auto") -> Tensor:
    """`relu(x)^2` (arXiv 2503.14456, eq. 22), differentiable.

    Args:
        x: of any shape. Without gradients it may be overwritten.
        impl: "auto", "reference", "cpu" (both plain torch) or "triton".

    Raises:
        ValueError: Triton kernels for float64 or without a GPU.
    """
    if resolve_impl(impl, x.device, AVAILABLE, x.dtype) != "triton":
        return squared_relu_reference(x)
    from rwkvx_kernels.channel_mix.triton_ops import squared_relu as operator  # may be missing

    squared: Tensor = operator(x.contiguous())
    return squared
