"""Tolerances that are derived: the error of an implementation against that of the reference.

Both are measured against the reference in float64. The implementation's error may exceed the
reference's own error in the same dtype by a stated factor, because it sums in another order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FLOOR = {torch.float64: 1e-15, torch.float32: 1.2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


# What a factor of a product loses: of the sum of two numbers of 8 bits (bfloat16 twice), or of two
# of 11 (tf32x3, which cuts the rest off).
FACTOR_ERROR = {torch.bfloat16: 2.0**-18, torch.float16: 2.0**-18, torch.float32: 2.0**-22}


def wkv7_error(dtype: torch.dtype) -> float:
    """Bound of the relative error of a state of WKV7 from products on a GPU.

    Four of them, one after the other, stand between tokens and a state (scores, inverse, U, sum);
    each loses the rest of either factor and the product of both low parts. Later chunks forget the
    state with its error, so it does not grow with length.
    """
    return 4 * 3 * FACTOR_ERROR[dtype]


def attention_error(dtype: torch.dtype) -> float:
    """Bound of the relative error of attention and its gradients from products on a GPU.

    Three of them stand one after the other (scores, their gradients, those of q and k).
    """
    return 3 * 3 * FACTOR_ERROR[dtype]


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root of the mean squared error, in units of the exact values' own size."""
    assert x.shape == exact.shape
    if not exact.numel():
        return 0.0
    difference = (x.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-30))


def assert_as_good(
    got: Sequence[Tensor | None],
    reference: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    factor: float,
    names: Sequence[str],
    least: float = 0.0,
) -> None:
    """Every tensor of `got` errs at most `factor` times as much as that of `reference`.

    One rounding of the reference's dtype is always allowed (the reference may be exact by luck),
    and `least`: what products of the kernels give where they are not those of float32.
    """
    for name, a, b, c in zip(names, got, reference, exact, strict=True):
        assert (a is None) == (c is None), name
        if a is None or b is None or c is None:
            continue
        assert a.isfinite().all(), f"{name} is not finite"
        allowed = max(factor * max(relative_error(b, c), FLOOR[b.dtype]), least)
        error = relative_error(a, c)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out
