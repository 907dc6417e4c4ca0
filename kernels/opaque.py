"""Functions that `torch.compile` takes whole, without a look inside.

What looks at the values of its tensors, or calls compiled loops, cannot be traced. Such a function
becomes an operator of torch here, for the compiler alone: called eagerly it is not in the way.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def opaque(name: str, fake: Callable[..., R]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Make the operator `rwkvx::name` of a function of tensors and plain values; differentiable.

    The backward pass is the operator `rwkvx::name_backward`, which keeps the arguments and runs the
    function again.

    Args:
        fake: says what comes out: empty contiguous tensors of the same shapes and dtypes.
    """

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        schema = torch.library.infer_schema(function, mutates_args=())
        operator = torch.library.custom_op(
            f"rwkvx::{name}",
            lambda *args: _contiguous(function(*args)),
            mutates_args=(),
            schema=schema,
        )
        operator.register_fake(fake)
        arguments = schema.rpartition(" -> ")[0].removeprefix("(")
        backward = torch.library.custom_op(
            f"rwkvx::{name}_backward",
            lambda grads, *args: _gradients(function, grads, args),
            mutates_args=(),
            schema=f"(Tensor[] grads, {arguments} -> Tensor[]",
        )
        backward.register_fake(
            lambda grads, *args: [x.new_empty(x.shape) for x in args if _has_gradient(x)]
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

        def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
            args = [other if tensor is None else tensor for tensor, other in pairs]
            made = iter(backward(list(grads), *args))
            return tuple(next(made) if _has_gradient(x) else None for x in args)

        operator.register_autograd(differentiate, setup_context=save)
        return operator

    return wrap


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _contiguous(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    return tuple(x.contiguous() for x in outputs)


def _gradients(function: Callable[..., Any], grads: list[Tensor], args: Any) -> list[Tensor]:
    # An operator's own code runs below autograd, which is wanted here.
    autograd = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with torch.enable_grad(), autograd:
        leaves = [x.detach().requires_grad_() if _has_gradient(x) else x for x in args]
        inputs = [x for x in leaves if _has_gradient(x)]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        made = torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)
    return [x.contiguous() for x in made]
