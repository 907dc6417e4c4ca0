"""Functions as operators of torch: `torch.compile` takes them whole, autograd differentiates them.

For launches of Triton kernels, and (`opaque`) for what looks at the values of its tensors or calls
compiled loops, which cannot be traced.

An operator's way through torch's dispatcher takes the host 0.03 to 0.13 ms more each way than the
functions themselves (most for lists of tensors), and a training step is bound by the host where
sequences are short. So plain tensors that nothing follows go past it, to the same
functions as an `autograd.Function`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

        def run(*args: Any) -> Any:
            return _contiguous(function(*args))

        made = torch.library.custom_op(
            f"rwkvx::{name}", run, mutates_args=tuple(mutates), schema=schema
        )
        made.register_fake(fake)
        parts = Parts(run, None, outputs, kept, schema.endswith("-> Tensor[]"))
        if gradients is not None:
            parts = parts._replace(backward=_ordered(gradients))
            backward = _backward_operator(name, schema, parts.backward)
            _differentiate(made, parts._replace(backward=backward))

        @wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or mutates or _followed(args):
                return made(*args)
            if torch.is_grad_enabled() and any(_asks_gradient(x) for x in _leaves(args)):
                return made(*args) if parts.backward is None else _past_dispatcher(parts, args)
            with torch.no_grad():
                return run(*args)

        return call

    return wrap


class Parts(NamedTuple):
    """What an operator is made of: see `operator`."""

    forward: Callable[..., Any]
    backward: Callable[..., list[Tensor]] | None
    outputs: int | None
    kept: slice
    many: bool  # results are a list


def opaque(name: str, fake: Callable[..., R]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """As `operator`; the backward pass runs the function again, on the arguments it kept."""

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        def again(grads: list[Tensor], _: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
            return _run_again(function, grads, args)

        return operator(name, fake, again)(function)

    return wrap


def _ordered(gradients: Gradients) -> Callable[..., list[Tensor]]:
    """With the arguments one by one."""
    return lambda grads, results, *args: [x.contiguous() for x in gradients(grads, results, args)]


def _backward_operator(name: str, schema: str, back: Any) -> Any:
    """`rwkvx::name_backward`."""
    arguments = schema.rpartition(" -> ")[0].removeprefix("(")
    made = torch.library.custom_op(
        f"rwkvx::{name}_backward",
        back,
        mutates_args=(),
        schema=f"(Tensor[] grads, Tensor[] results, {arguments} -> Tensor[]",
    )
    made.register_fake(
        lambda grads, results, *args: [
            x.new_empty(x.shape) for x in _leaves(args) if _has_gradient(x)
        ]
    )
    return made


def _differentiate(made: Any, parts: Parts) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, parts, inputs, output)

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        given = grads[0] if isinstance(grads[0], list | tuple) else grads
        return tuple(_rebuilt(ctx.structure, iter(_gradients_of(ctx, parts, given))))

    made.register_autograd(differentiate, setup_context=save)


class _PastDispatcher(torch.autograd.Function):
    """Takes the tensors one by one beside the arguments that they are in."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, args: tuple[Any, ...], *_: Any) -> Any:
        results = parts.forward(*args)
        _save(ctx, parts, args, results)
        ctx.parts = parts
        return tuple(results) if isinstance(results, list) else results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, None, *_gradients_of(ctx, ctx.parts, grads)


def _past_dispatcher(parts: Parts, args: tuple[Any, ...]) -> Any:
    results = _PastDispatcher.apply(parts, args, *_leaves(args))
    return list(results) if parts.many else results


def _save(ctx: Any, parts: Parts, args: tuple[Any, ...], output: Any) -> None:
    """What `_gradients_of` needs."""
    results = [output] if isinstance(output, Tensor) else list(output)
    # Zeros for what is only kept would cost as much as a pass over it.
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple) and parts.outputs is not None:
        ctx.mark_non_differentiable(*results[parts.outputs :])
    ctx.results = [(x.shape, x.dtype, x.device) for x in results[: parts.outputs]]
    leaves = _leaves(args)
    ctx.structure = [len(x) if isinstance(x, list) else None for x in args]
    ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
    tensors = (x if isinstance(x, Tensor) else None for x in leaves)
    ctx.save_for_backward(*tensors, *results[parts.kept])


def _gradients_of(ctx: Any, parts: Parts, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of every leaf of the arguments, from those of the results."""
    whole = [
        torch.zeros(shape, dtype=dtype, device=device) if x is None else x.contiguous()
        for x, (shape, dtype, device) in zip(grads, ctx.results, strict=False)
    ]
    count, saved = len(ctx.others), ctx.saved_tensors
    pairs = zip(saved[:count], ctx.others, strict=True)
    leaves = [other if tensor is None else tensor for tensor, other in pairs]
    assert parts.backward is not None
    args = _rebuilt(ctx.structure, iter(leaves))
    new = iter(parts.backward(whole, list(saved[count:]), *args))
    return [next(new) if _has_gradient(x) else None for x in leaves]


def _leaves(args: Sequence[Any]) -> list[Any]:
    """The arguments, those in lists one by one."""
    return [x for arg in args for x in (arg if isinstance(arg, list) else (arg,))]


def _rebuilt(structure: Sequence[int | None], leaves: Iterator[Any]) -> list[Any]:
    """The inverse: lists of so many, and what stands alone (None)."""
    return [next(leaves) if n is None else [next(leaves) for _ in range(n)] for n in structure]


def _followed(args: Sequence[Any]) -> bool:
    """Whether somebody wants to see the operator, or there is nothing that could be computed."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    tensors = (x for x in _leaves(args) if isinstance(x, Tensor))
    return any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)


def _asks_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


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
        structure = [len(x) if isinstance(x, list) else None for x in args]
        leaves = [x.detach().requires_grad_() if _has_gradient(x) else x for x in _leaves(args)]
        inputs = [x for x in leaves if _has_gradient(x)]
        results = function(*_rebuilt(structure, iter(leaves)))
        results = [results] if isinstance(results, Tensor) else results
        return list(torch.autograd.grad(results, inputs, grads, materialize_grads=True))


def adjacent(x: Tensor) -> Tensor:
    """With the channels of a row one after the other; rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()
