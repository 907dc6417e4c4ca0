"""Functions as operators of torch: `torch.compile` takes them whole, autograd differentiates them.

For launches of Triton kernels, and (`opaque`) for what looks at the values of its tensors or calls
compiled loops, which cannot be traced.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

R = TypeVar("R")
NONE = slice(0)
# Of gradients of results, of the results that are kept, and of all arguments: a gradient for each
# floating-point tensor among the arguments, those in lists too, in their order.
Gradients = Callable[[list[Tensor], list[Tensor], tuple[Any, ...]], Sequence[Tensor]]


def operator(
    name: str,
    fake: Callable[..., Any],
    gradients: Gradients | None = None,
    outputs: int | None = None,
    kept: slice = NONE,
    mutates: Sequence[str] = (),
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Make the operator `rwkvx::name` of a function of tensors, lists of them and plain values.

    Args:
        fake: says what comes out: empty tensors of the same shapes and dtypes.
        gradients: makes the operator differentiable, itself as `rwkvx::name_backward`.
        outputs: so many of the first results have gradients (None: all).
        kept: which results `gradients` needs; the arguments are always kept.
        mutates: names of arguments that are written to.
    """

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        made = torch.library.custom_op(
            f"rwkvx::{name}",
            lambda *args: _contiguous(function(*args)),
            mutates_args=tuple(mutates),
            schema=schema,
        )
        made.register_fake(fake)
        if gradients is not None:
            arguments = schema.rpartition(" -> ")[0].removeprefix("(")
            backward = torch.library.custom_op(
                f"rwkvx::{name}_backward",
                lambda grads, kept, *args: [x.contiguous() for x in gradients(grads, kept, args)],
                mutates_args=(),
                schema=f"(Tensor[] grads, Tensor[] kept, {arguments} -> Tensor[]",
            )
            backward.register_fake(
                lambda grads, kept, *args: [
                    x.new_empty(x.shape) for x in tree_leaves(args) if _has_gradient(x)
                ]
            )
            _differentiate(made, backward, outputs, kept)
        return made

    return wrap


def opaque(name: str, fake: Callable[..., R]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """As `operator`; the backward pass runs the function again, on the arguments it kept."""

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        def again(grads: list[Tensor], _: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
            return _run_again(function, grads, args)

        return operator(name, fake, again)(function)

    return wrap


def _differentiate(made: Any, backward: Any, outputs: int | None, kept: slice) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = [output] if isinstance(output, Tensor) else list(output)
        # Zeros for what is only kept would cost as much as a pass over it.
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple) and outputs is not None:
            ctx.mark_non_differentiable(*results[outputs:])
        ctx.results = [(x.shape, x.dtype, x.device) for x in results[:outputs]]
        leaves, ctx.structure = tree_flatten(inputs)
        ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
        tensors = (x if isinstance(x, Tensor) else None for x in leaves)
        ctx.save_for_backward(*tensors, *results[kept])

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        given = grads[0] if isinstance(grads[0], list | tuple) else grads
        whole = [
            torch.zeros(shape, dtype=dtype, device=device) if x is None else x.contiguous()
            for x, (shape, dtype, device) in zip(given, ctx.results, strict=False)
        ]
        count, saved = len(ctx.others), ctx.saved_tensors
        pairs = zip(saved[:count], ctx.others, strict=True)
        leaves = [other if tensor is None else tensor for tensor, other in pairs]
        args = tree_unflatten(leaves, ctx.structure)
        new = iter(backward(whole, list(saved[count:]), *args))
        ordered = [next(new) if _has_gradient(x) else None for x in leaves]
        return tuple(tree_unflatten(ordered, ctx.structure))

    made.register_autograd(differentiate, setup_context=save)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _contiguous(results: Any) -> Any:
    if results is None:
        return None
    if isinstance(results, Tensor):
        return results.contiguous()
    return type(results)(x.contiguous() for x in results)


def _run_again(function: Callable[..., Any], grads: list[Tensor], args: Any) -> list[Tensor]:
    # An operator's own code runs below autograd, which is wanted here.
    autograd = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with torch.enable_grad(), autograd:
        leaves, structure = tree_flatten(args)
        leaves = [x.detach().requires_grad_() if _has_gradient(x) else x for x in leaves]
        inputs = [x for x in leaves if _has_gradient(x)]
        results = function(*tree_unflatten(leaves, structure))
        results = [results] if isinstance(results, Tensor) else results
        return list(torch.autograd.grad(results, inputs, grads, materialize_grads=True))


def adjacent(x: Tensor) -> Tensor:
    """With the channels of a row one after the other; rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()
