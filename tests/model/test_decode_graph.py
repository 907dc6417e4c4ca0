"""Decoding with static shapes: equal to ordinary decoding; on a GPU, replayed as a CUDA graph.

Without a GPU the same steps run one by one, Triton's kernels in its interpreter.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import HYBRID, error, random_ids, random_model, triton_everywhere
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx import InputError, Model, ModelConfig, ModelState, decoding
from rwkvx.decoding import graph as graphs
from rwkvx.decoding.graph import GraphDecoder, can_capture
from rwkvx.sampling import generate
from rwkvx_kernels.tools.triton_options import Options, vary

pytestmark = pytest.mark.slow

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# float32, sums in another order; and what the kernels' products lose on a GPU.
ALLOWED = 1e-4 if GPU else 1e-5
CHUNK = 16
CONFIG = {
    **HYBRID.to_dict(),
    "pattern": ("rwkv7", "sparse"),
    "head_size": 16,
    "chunk_size": CHUNK,
}
VARIANTS = {"plain": {}, "key_conv": {"key_conv": 3, "sparse_kv_heads": 1}}


def model_of(name: str) -> Model:
    config = ModelConfig.from_dict({**CONFIG, **VARIANTS[name]})
    return random_model(config, dtype=torch.float32).to(DEVICE)


@torch.no_grad()
def prompt(model: Model, *lengths: int) -> ModelState:
    """The state of a row for each length; rows of different lengths have caches of their own."""
    ids = random_ids(sum(lengths), batch=1).to(DEVICE)
    if len(set(lengths)) == 1:
        return model(ids.view(len(lengths), -1), logits="none")[1]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return model(ids, logits="none", cu_seqlens=offsets)[1]


@torch.no_grad()
def ordinary(model: Model, ids: Tensor, state: ModelState) -> Tensor:
    outputs = []
    for token in ids.split(1, dim=1):
        logits, state = model(token, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Large tiles: the interpreter takes as long for each program as for a hundred numbers."""
    with vary("token", Options(64, 64)), vary("tokens", Options(64, 64)):
        yield


def decoder(model: Model, state: ModelState, tokens: int) -> GraphDecoder:
    with triton_everywhere():
        return GraphDecoder(model, state, tokens)


def stepwise(graph: GraphDecoder, ids: Tensor) -> Tensor:
    with triton_everywhere():
        return torch.cat([graph.step(token) for token in ids.split(1, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("plain", (30,)), ("key_conv", (63, 63)), ("key_conv", (14, 47)), ("plain", ())],
    ids=str,
)
def test_steps_equal_ordinary_decoding(name: str, lengths: tuple[int, ...]) -> None:
    """Past an end of a chunk (on a GPU, three), from states with and without tokens, rows of
    unequal length."""
    model = model_of(name)
    state = prompt(model, *lengths) if lengths else model.fresh_state(2)
    tokens = 2 * CHUNK + 3 if GPU else 4 if lengths else CHUNK + 2
    ids = random_ids(tokens, batch=len(lengths) or 2, seed=1).to(DEVICE)
    graph = decoder(model, state, tokens)
    got = stepwise(graph, ids)
    assert error(got, ordinary(model, ids, state)) < ALLOWED
    with pytest.raises(InputError, match=f"room for {tokens} tokens is used up"):
        graph.step(ids[:, :1])


def test_states_before_and_after_stay_valid() -> None:
    """The prompt's state goes on elsewhere; one taken on the way is a fork."""
    model = model_of("plain")
    for lengths in ((20, 20), (9, 25)):
        state = prompt(model, *lengths)
        first, left, right = (random_ids(3, seed=n).to(DEVICE) for n in (1, 2, 3))
        expected = ordinary(model, torch.cat([first, left], 1), state)
        graph = decoder(model, state, 6)
        stepwise(graph, first)
        fork = graph.state
        assert fork.length == state.length + 3
        fork_right = ordinary(model, right, fork)
        assert error(stepwise(graph, left), expected[:, 3:]) < ALLOWED
        assert error(ordinary(model, left, fork), expected[:, 3:]) < ALLOWED
        again = ordinary(model, torch.cat([first, right], 1), state)
        assert error(fork_right, again[:, 3:]) < ALLOWED


def test_memory_is_static() -> None:
    """Every step writes to the same places."""
    model = model_of("key_conv")
    graph = decoder(model, prompt(model, 30), 3)

    def places() -> list[int]:
        caches = [b.cached[0].cache for b in graph._state.blocks if hasattr(b, "cached")]
        tensors = [x for c in caches for x in (c.k_BGSD, c.v_BGSD, c.means_BGCD)]
        return [x.data_ptr() for x in (*tensors, *graphs._tensors(graph._state))]

    before = places()
    stepwise(graph, random_ids(3, batch=1).to(DEVICE))
    assert places() == before


def test_ids_of_another_batch_are_refused() -> None:
    model = model_of("plain")
    graph = decoder(model, prompt(model, 5), 3)
    with pytest.raises(InputError, match=r"ids must be \[1, 1\], got \[2, 1\]"):
        graph.step(random_ids(1).to(DEVICE))


def test_generation_takes_the_graph_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("plain")
    options = {"max_tokens": 6, "temperature": 0, "stop_ids": (), "device": DEVICE}
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "can_capture", lambda model: "not here")
        expected = list(generate(model, [1, 2, 3], **options))
    made = []

    class Watched(GraphDecoder):
        def __init__(self, *args: Any) -> None:
            with triton_everywhere():
                super().__init__(*args)

        def step(self, ids: Tensor) -> Tensor:
            made.append(ids)
            with triton_everywhere():
                return super().step(ids)

    def choose(model: Model, rows: int, tokens: int) -> decoding.Choice:
        return decoding.Choice("graph" if tokens >= decoding.WORTHWHILE else "eager", "a test")

    monkeypatch.setattr(decoding, "WORTHWHILE", 4)
    monkeypatch.setattr(decoding, "GraphDecoder", Watched)
    monkeypatch.setattr(decoding, "choose", choose)
    assert list(generate(model, [1, 2, 3], **options)) == expected
    assert len(made) == 5
    assert len(list(generate(model, [1, 2, 3], **{**options, "max_tokens": 3}))) == 3
    assert len(made) == 5  # too few to be worth it


def test_what_can_be_captured() -> None:
    model = model_of("plain")
    assert (can_capture(model) is None) == GPU
    assert "no CUDA graphs on meta" in str(can_capture(model.to("meta")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(300,), (100, 1000, 37)], ids=str)
def test_replay_equals_single_launches(
    lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernels on the same numbers: to the bit. And no memory is taken by a step."""
    model = model_of("plain").to(dtype)
    state, ids = prompt(model, *lengths), random_ids(100, batch=len(lengths), seed=1).to(DEVICE)
    graph = decoder(model, state, 100)
    assert graph._graph is not None
    monkeypatch.setattr(GraphDecoder, "_capture", lambda self: None)
    single = decoder(model, state, 100)
    assert single._graph is None
    graph.step(ids[:, :1])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for token in ids[:, 1:50].split(1, dim=1):
        graph.step(token)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    stepwise(single, ids[:, :50])
    assert torch.equal(stepwise(graph, ids[:, 50:]), stepwise(single, ids[:, 50:]))


@pytest.mark.gpu
def test_a_step_waits_for_nothing() -> None:
    model = model_of("plain")
    decoder = decoding.start(model, prompt(model, 40), decoding.WORTHWHILE)
    assert isinstance(decoder, GraphDecoder)
    ids = random_ids(1, batch=1).to(DEVICE)
    decoder.step(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
