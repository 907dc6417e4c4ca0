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
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, DIM, CHUNK, TOPK = 18, 16, 16, 2
COMPILED = "torch" if DEVICE == "cuda" else "compiled"
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


def kept() -> list[Tensor]:
    """What `wkv7` keeps for its gradients."""
    return list(torch.ops.rwkvx.wkv7(*wkv7(), None, True)[2:])


def cache() -> list[Tensor]:
    """Keys, values and means, with room for two chunks."""
    return [normal(1, 1, 2 * CHUNK, DIM), normal(1, 1, 2 * CHUNK, DIM), normal(1, 1, 2, DIM)]


def choice(grad: bool = False, cu_seqlens: Tensor | None = None) -> tuple[Any, ...]:
    """q, k, v, the chunks chosen, offsets and the size of a chunk."""
    args = rows(3, grad=grad)
    chosen = torch.full((1, TOKENS, 1, TOPK - 1), -1, device=DEVICE)
    if cu_seqlens is None:
        chosen[:, CHUNK:] = 0
    return (*args, chosen, cu_seqlens, CHUNK)


def attended(cu_seqlens: Tensor | None = None) -> tuple[Any, ...]:
    """The output's gradient, what is kept, and the arguments."""
    args = choice(cu_seqlens=cu_seqlens)
    return (rows(1), list(torch.ops.rwkvx.attend_chunks(*args)), *args)


def mixed(grad: bool = False) -> tuple[Any, ...]:
    """Tokens, weights, eps, state and offsets of a time mix with one head."""
    tokens = [x.flatten(2).requires_grad_(grad) for x in rows(6)]
    weights = [normal(DIM, grad=grad) for _ in range(4)]
    weights += [normal(1, DIM, grad=grad), *(normal(DIM, grad=grad) for _ in range(2))]
    return tokens, weights, 1e-3, normal(1, 1, DIM, DIM, grad=grad), None


def mixed_backward() -> tuple[Any, ...]:
    kept = torch.ops.rwkvx.time_mix(*mixed(), True)[2:]
    return [normal(1, TOKENS, DIM), normal(1, 1, DIM, DIM)], kept, *mixed(), True


def shifted(grad: bool = False) -> tuple[Any, ...]:
    """x, the token before it, mixes, offsets."""
    mixes = [normal(DIM, grad=grad) for _ in range(2)]
    return normal(1, TOKENS, DIM, grad=grad), normal(1, DIM, grad=grad), mixes, None


def norm_shifted(grad: bool = False) -> tuple[Any, ...]:
    """As `shifted`, with weight, bias and eps of a norm, and the dtype of what comes out."""
    x, previous, mixes, offsets = shifted(grad)
    weight, bias = normal(DIM, grad=grad), normal(DIM, grad=grad)
    return x, previous, weight, bias, mixes, offsets, 1e-5, torch.float32


# Arguments for each operator, and for some more than once.
CALLS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "wkv7_step": lambda: [(*wkv7(2), None), (*wkv7(2, 2), whole(0, 1, 2))],
    "wkv7": lambda: [
        (*wkv7(grad=True), None, True),
        (*wkv7(sequences=2), whole(0, 3, TOKENS), False),
    ],
    "wkv7_backward": lambda: [
        ([*rows(1), normal(1, 1, DIM, DIM)], kept(), *wkv7(), None, True),
    ],
    "wkv7_plain": lambda: [
        (*wkv7(grad=True), None, "torch"),
        (*wkv7(sequences=2, grad=True), whole(0, 3, TOKENS), "torch"),
        (*wkv7(), None, COMPILED),
    ],
    "wkv7_plain_backward": lambda: [
        ([*rows(1), normal(1, 1, DIM, DIM)], [], *wkv7(), None, "torch"),
    ],
    "select_chunks": lambda: [(*rows(1, 2), cache()[2], [], 18, CHUNK, TOPK)],
    "select_chunks_whole": lambda: [
        (*rows(2), offsets, coarse, CHUNK, TOPK)
        for offsets in (None, whole(0, 0, 1, TOKENS))
        for coarse in (False, True)
    ],
    "select_chunks_plain": lambda: [
        (*rows(1, 2), cache()[2], CHUNK, TOPK, 18, "flat", impl) for impl in ("torch", COMPILED)
    ],
    "attend_chunks": lambda: [choice(True), choice(True, whole(0, 0, 1, TOKENS))],
    "attend_chunks_backward": lambda: [attended(), attended(whole(0, 1, TOKENS))],
    "attend_chunks_plain": lambda: [(*choice(True)[:4], CHUNK, "torch")],
    "attend_chunks_plain_backward": lambda: [(rows(1), [], *choice()[:4], CHUNK, "torch")],
    "chunk_attention_decode": lambda: [(*rows(1, 2), *cache(), [], whole(20), CHUNK, TOPK)],
    "chunk_attention_append": lambda: [(*cache(), *rows(2, 3), 14, CHUNK)],
    "chunk_attention_append_each": lambda: [(*cache(), *rows(2, 1), whole(15), CHUNK)],
    "chunk_attention_plain": lambda: [
        (*rows(3, grad=True), CHUNK, TOPK, None, "torch", "flat"),
        (*rows(3, grad=True), CHUNK, TOPK, whole(0, 1, TOKENS), "torch", "flat"),
    ],
    "chunk_attention_plain_backward": lambda: [
        (rows(1), [], *rows(3), CHUNK, TOPK, None, "torch", "flat"),
    ],
    "chunk_attention_cached_plain": lambda: [
        (*rows(1, 2), *cache(), 20, CHUNK, TOPK, impl, "flat") for impl in ("torch", COMPILED)
    ],
    "losses_and_gradients": lambda: [(normal(4, 6), whole(0, 5, 2, 2), normal(4))],
    "token_shift": lambda: [(*shifted(grad=True), torch.float32)],
    "token_shift_backward": lambda: [
        ([normal(1, TOKENS, DIM), normal(1, TOKENS, DIM)], [], *shifted(), torch.float32),
    ],
    "norm_token_shift": lambda: [norm_shifted(grad=True)],
    "norm_token_shift_backward": lambda: [
        ([normal(1, TOKENS, DIM), normal(1, TOKENS, DIM)], [], *norm_shifted()),
    ],
    "squared_relu": lambda: [(normal(4, 6, grad=True),)],
    "squared_relu_backward": lambda: [([normal(4, 6)], [], normal(4, 6))],
    "time_mix": lambda: [(*mixed(grad=True), True), (*mixed(), False)],
    "time_mix_step": lambda: [mixed()],
    "time_mix_compiled": lambda: [] if DEVICE == "cuda" else [mixed()],
    "time_mix_backward": lambda: [mixed_backward()],
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


def differentiable() -> dict[str, Callable[..., Any]]:
    """What is called in the place of some operators."""
    from rwkvx_kernels.channel_mix.triton_relu import squared_relu
    from rwkvx_kernels.chunk_attention.triton_ops import attend_triton
    from rwkvx_kernels.time_mix.triton_ops import time_mix_forward
    from rwkvx_kernels.token_shift.triton_norm import norm_token_shift
    from rwkvx_kernels.wkv7.triton_ops import wkv7_forward

    return {
        "wkv7": wkv7_forward,
        "attend_chunks": attend_triton,
        "time_mix": time_mix_forward,
        "norm_token_shift": norm_token_shift,
        "squared_relu": squared_relu,
    }


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    found = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
    return [x for x in found if isinstance(x, Tensor) and x.requires_grad]


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize("name", differentiable())
def test_past_the_dispatcher_the_same_comes_out(name: str) -> None:
    """The results, of the same type, and gradients of some or all of them."""
    torch.manual_seed(0)
    function, args = differentiable()[name], CALLS[name]()[0]
    through, past = getattr(torch.ops.rwkvx, name)(*args), function(*args)
    assert "PastDispatcher" in str(tensors(past)[0].grad_fn)
    for x, y in zip(tensors(past), tensors(through), strict=True):
        assert torch.equal(x, y)
        assert x.requires_grad == y.requires_grad
    inputs = leaves(args)
    for chosen in (slice(0, 1), slice(None)):
        found = []
        for results in (through, past):
            asked = [x for x in tensors(results) if x.requires_grad][chosen]
            weights = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x) for x in asked]
            found.append(torch.autograd.grad(asked, inputs, weights, retain_graph=True))
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    with torch.no_grad():
        alone = function(*args)
    assert not any(x.requires_grad for x in tensors(alone))
    assert all(torch.equal(x, y) for x, y in zip(tensors(alone), tensors(through), strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_whoever_follows_sees_operators() -> None:
    """Without data, under modes and transforms, and where there is no second derivative."""
    function, (args, *_) = differentiable()["attend_chunks"], CALLS["attend_chunks"]()
    nowhere = [x.detach().to("meta") if isinstance(x, Tensor) else x for x in args]
    assert function(*nowhere)[0].device.type == "meta"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        assert function(*fake)[0].shape == args[0].shape
    relu, x = differentiable()["squared_relu"], normal(3, 4, grad=True)
    rows = torch.func.vmap(relu)(x.detach())
    assert torch.equal(rows, relu(x.detach()))
    (first,) = torch.autograd.grad(relu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(first.sum(), x)
