"""`torch.compile` takes the whole model in one graph, and the same graph for every decoded token.

Without a GPU the Triton operators are traced as there, and interpreted. Compilations are counted.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small import HYBRID, VARIANTS, error, random_ids, random_model, triton_everywhere
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rwkvx import Model, ModelConfig, repeat_state

pytestmark = pytest.mark.slow

KINDS = {"cpu": torch.float64, "triton": torch.float32}
# The kernels are the same; what is between them may be summed in another order.
ALLOWED = {"cpu": 1e-12, "triton": 2e-5}
# Static numbers, then any number; the same again once a cache has grown.
MOST = 4


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    if request.param == "triton":
        pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    with triton_everywhere() if request.param == "triton" else nullcontext():
        yield request.param


def model_of(name: str, kind: str) -> Model:
    config = {**HYBRID.to_dict(), **VARIANTS[name]}
    config["pattern"] = ("rwkv7", "sparse")
    if kind == "triton":
        config |= {"head_size": 16, "chunk_size": 16}
    return random_model(ModelConfig.from_dict(config), dtype=KINDS[kind])


def compiled(model: Model, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def gradients(call: Any, model: Model, ids: Tensor, **options: Any) -> list[Tensor]:
    """Logits and the gradient of every parameter of a weighted sum of them."""
    model.zero_grad()
    logits, _ = call(ids, **options)
    torch.manual_seed(1)
    (logits * torch.randn_like(logits)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    return [logits, *(x.clone() for x in grads if x is not None)]


@pytest.mark.parametrize("packed", [False, True])
def test_training(packed: bool, kind: str) -> None:
    """The second length is any length: a third compiles nothing."""
    model = model_of("conv_gqa", kind)
    call, counter = compiled(model)
    for tokens in (36, 41, 44):
        ids, options = random_ids(tokens, batch=1 if packed else 2), {}
        if packed:
            options = {"cu_seqlens": torch.tensor([0, 0, 7, 30, tokens]), "keep_cache": False}
        expected = gradients(model, model, ids, **options)
        got = gradients(call, model, ids, **options)
        assert len(got) == len(expected) == 1 + len(list(model.parameters()))
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) < ALLOWED[kind]
        if kind == "triton":  # one length: interpreting takes its time
            break
    assert counter.frame_count <= 2


@torch.no_grad()
def test_decoding_compiles_a_few_times_at_most(kind: str) -> None:
    """Past several ends of a chunk and a cache that grows; states are forked on the way."""
    model = model_of("key_conv" if kind == "cpu" else "plain", kind)
    call, counter = compiled(model)
    start = random_ids(30, batch=1)
    state, own = model(start)[1], model(start)[1]
    for step in range(50 if kind == "cpu" else 8):
        token = random_ids(1, batch=1, seed=step)
        expected, state = model(token, state)
        got, own = call(token, own)
        assert error(got, expected) < ALLOWED[kind]
        if step == 5:
            fork, token = own, random_ids(1, batch=1, seed=99)
            expected, got = model(token, state)[0], call(token, fork)[0]
            assert error(got, expected) < ALLOWED[kind]
    assert counter.frame_count <= MOST + 1  # the fork's copy
    assert own.length == state.length


@torch.no_grad()
def test_decoding_with_room_compiles_twice() -> None:
    torch._dynamo.reset()
    model = model_of("plain", "cpu")
    call, counter = compiled(model)
    state = model(random_ids(30), model.fresh_state(2, 100))[1]
    expected = repeat_state(state, 1)
    for step in range(60):
        token = random_ids(1, seed=step)
        got, state = call(token, state)
        wanted, expected = model(token, expected)
        assert error(got, wanted) < 1e-12
    assert counter.frame_count == 2


def test_packed_sequences_with_a_cache_are_refused_in_words() -> None:
    torch._dynamo.reset()
    call, _ = compiled(model_of("plain", "cpu"))
    with pytest.raises(Exception, match="packed sequences keep no cache: keep_cache=False"):
        call(random_ids(9, batch=1), cu_seqlens=torch.tensor([0, 4, 9]))
