"""Every operator that the project registers keeps torch's rules: schema, fake results, gradients.

A new operator of the namespace `rwkvx` needs a line in `CALLS`.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, DIM, CHUNK, TOPK = 18, 16, 16, 2
KERNELS = Path(__file__).parents[2] / "kernels"
for path in sorted(KERNELS.rglob("*.py")):
    parts = path.relative_to(KERNELS).with_suffix("").parts
    import_module(".".join(("rwkvx_kernels", *(x for x in parts if x != "__init__"))))


def normal(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_(grad)


def rows(count: int, tokens: int = TOKENS, grad: bool = False) -> list[Tensor]:
    return [normal(1, tokens, 1, DIM, grad=grad) for _ in range(count)]


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def wkv7(tokens: int = TOKENS, sequences: int = 1, grad: bool = False) -> list[Tensor]:
    """r, log_decay, k, v, alpha, beta and the initial state."""
    r, decay, k, v, alpha, beta = (x * 0.3 for x in rows(6, tokens))
    state = normal(sequences, 1, DIM, DIM)
    args = (r, -decay.sigmoid(), k, v, alpha, beta, state)
    return [x.requires_grad_(grad) for x in args]


def states(keep: bool) -> Tensor:
    """Before each chunk, as `wkv7_forward` keeps them."""
    return torch.ops.rwkvx.wkv7_forward(*wkv7(), None, keep)[2]


def cache() -> list[Tensor]:
    """Keys, values and means, with room for two chunks."""
    return [normal(1, 1, 2 * CHUNK, DIM), normal(1, 1, 2 * CHUNK, DIM), normal(1, 1, 2, DIM)]


def attended(cu_seqlens: Tensor | None = None) -> tuple[Any, ...]:
    """do, q, k, v, o, log-sum-exp, chosen chunks."""
    args = rows(3)
    if cu_seqlens is None:
        return (*rows(1), *args, *torch.ops.rwkvx.chunk_attention(*args, CHUNK, TOPK, False))
    made = torch.ops.rwkvx.chunk_attention_packed(*args, cu_seqlens, CHUNK, TOPK, False)
    return (*rows(1), *args, *made, cu_seqlens)


def mixed(grad: bool = False) -> tuple[Any, ...]:
    """Tokens, weights, eps, state and offsets of a time mix with one head."""
    tokens = [x.flatten(2).requires_grad_(grad) for x in rows(6)]
    weights = [normal(DIM, grad=grad) for _ in range(4)]
    weights += [normal(1, DIM, grad=grad), *(normal(DIM, grad=grad) for _ in range(2))]
    return tokens, weights, 1e-3, normal(1, 1, DIM, DIM, grad=grad), None


def mixed_backward() -> tuple[Any, ...]:
    tokens, weights, eps, state, offsets = mixed()
    kept = torch.ops.rwkvx.time_mix(tokens, weights, eps, state, offsets, True)[2:]
    return tokens, weights, eps, offsets, kept, normal(1, TOKENS, DIM), normal(1, 1, DIM, DIM)


def shifted(grad: bool = False) -> tuple[Any, ...]:
    """x, the token before it, mixes, offsets."""
    mixes = [normal(DIM, grad=grad) for _ in range(2)]
    return normal(1, TOKENS, DIM, grad=grad), normal(1, DIM, grad=grad), mixes, None


# Arguments for each operator, and for some more than once.
CALLS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "wkv7_step": lambda: [(*wkv7(2), None), (*wkv7(2, 2), whole(0, 1, 2))],
    "wkv7_forward": lambda: [
        (*wkv7(grad=True), None, True),
        (*wkv7(sequences=2), whole(0, 3, TOKENS), False),
    ],
    "wkv7_backward": lambda: [
        (*wkv7()[:6], states(True), None, *rows(1), normal(1, 1, DIM, DIM)),
    ],
    "wkv7_plain": lambda: [
        (*wkv7(grad=True), None, "cpu"),
        (*wkv7(sequences=2, grad=True), whole(0, 3, TOKENS), "cpu"),
    ],
    "wkv7_plain_backward": lambda: [
        ([*rows(1), normal(1, 1, DIM, DIM)], *wkv7(), None, "cpu"),
    ],
    "chunk_attention": lambda: [(*rows(3, grad=True), CHUNK, TOPK, x) for x in (False, True)],
    "chunk_attention_backward": lambda: [(*attended(), CHUNK, TOPK)],
    "chunk_attention_packed": lambda: [
        (*rows(3, grad=True), whole(0, 0, 1, TOKENS), CHUNK, TOPK, False)
    ],
    "chunk_attention_packed_backward": lambda: [(*attended(whole(0, 1, TOKENS)), CHUNK, TOPK)],
    "chunk_attention_cached": lambda: [(*rows(1, 2), *cache(), [], 20, CHUNK, TOPK)],
    "chunk_attention_decode": lambda: [(*rows(1, 2), *cache(), [], whole(20), CHUNK, TOPK)],
    "chunk_attention_append": lambda: [(*cache(), *rows(2, 3), 14, CHUNK)],
    "chunk_attention_append_each": lambda: [(*cache(), *rows(2, 1), whole(15), CHUNK)],
    "chunk_attention_plain": lambda: [
        (*rows(3, grad=True), CHUNK, TOPK, None, "cpu", "flat"),
        (*rows(3, grad=True), CHUNK, TOPK, whole(0, 1, TOKENS), "cpu", "flat"),
    ],
    "chunk_attention_plain_backward": lambda: [
        (rows(1), *rows(3), CHUNK, TOPK, None, "cpu", "flat"),
    ],
    "chunk_attention_cached_plain": lambda: [
        (*rows(1, 2), *cache(), 20, CHUNK, TOPK, "cpu", "flat"),
    ],
    "token_shift": lambda: [(*shifted(grad=True), torch.float32)],
    "token_shift_backward": lambda: [
        (*shifted(), [normal(1, TOKENS, DIM), normal(1, TOKENS, DIM)]),
    ],
    "squared_relu": lambda: [(normal(4, 6, grad=True),)],
    "squared_relu_backward": lambda: [(normal(4, 6), normal(4, 6))],
    "time_mix": lambda: [(*mixed(grad=True), True), (*mixed(), False)],
    "time_mix_step": lambda: [mixed()],
    "time_mix_backward": lambda: [mixed_backward()],
    "chunk_attention_cached_plain_backward": lambda: [],  # attention to a cache has no gradient
}


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("rwkvx::").partition(".")[0] for name in names if "rwkvx::" in name}


def test_every_operator_is_in_the_list() -> None:
    missing, gone = registered() - set(CALLS), set(CALLS) - registered()
    assert not missing, f"add to CALLS in {__file__} arguments for: {sorted(missing)}"
    assert not gone, f"CALLS names operators that nothing registers: {sorted(gone)}"


@pytest.mark.parametrize("name", CALLS)
def test_operator(name: str) -> None:
    torch.manual_seed(0)
    for args in CALLS[name]():
        torch.library.opcheck(getattr(torch.ops.rwkvx, name), args)
