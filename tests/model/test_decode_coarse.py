"""Coarse-to-fine selection decoded in place: forests grow between steps, which wait for nothing.

Runs are of two chunks of two tokens, so that every fourth token completes some. Without a GPU
steps run one by one in Triton's interpreter.
"""

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from small import HYBRID, error, random_ids, random_model, triton_everywhere
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # for `counting`

from counting import counted

from rwkvx import Model, ModelConfig, ModelState
from rwkvx.decoding.eager import EagerDecoder
from rwkvx.decoding.graph import GraphDecoder
from rwkvx.kinds.attention import CachedRows
from rwkvx_kernels.chunk_attention import KeyValueCache, api
from rwkvx_kernels.chunk_select import common, select_chunks, triton_decode
from rwkvx_kernels.one_token import triton_blocks
from rwkvx_kernels.tools.triton_options import Options, vary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32, sums in another order; and what the kernels' products lose on a GPU.
ALLOWED = 1e-4 if DEVICE == "cuda" else 1e-5
CHUNK, TOPK = 2, 3
SMALL = {"pattern": ("sparse",), "width": 16, "head_size": 16, "chunk_size": CHUNK, "topk": TOPK}
COARSE = {"selection": "coarse_to_fine"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A query keeps one node, of two levels and more; launches of few programs, of many splits."""
    for name, value in (("RUN", 2), ("FANOUT", 2), ("GROWTH", 2), ("DENSE_NODES", 3)):
        monkeypatch.setattr(common, name, value)
    monkeypatch.setattr(common, "beam_widths", lambda topk: (1, 1))
    monkeypatch.setattr(triton_decode, "MOST_SPLIT", 8)
    monkeypatch.setattr(triton_decode, "LEAST_BLOCK", 4)
    monkeypatch.setattr(api, "CHUNK_MULTIPLE", CHUNK)
    with vary("token", Options(64, 64)), vary("tokens", Options(64, 64)):
        yield


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    config = ModelConfig.from_dict({**HYBRID.to_dict(), **SMALL, **COARSE, **changes})
    return random_model(config, dtype=dtype).to(DEVICE)


def by_reference(model: Model, reading: Any) -> Any:
    """What `reading()` makes where selection is the specification."""
    for block in model.blocks:
        block.att.impl = "reference"
    with torch.no_grad():
        made = reading()
    for block in model.blocks:
        block.att.impl = "auto"
    return made


def prompt(model: Model, *lengths: int) -> ModelState:
    """The state of a row for each length; rows of different lengths have caches of their own."""
    ids = random_ids(sum(lengths), batch=1).to(DEVICE)
    if len(set(lengths)) == 1:
        ids = ids.view(len(lengths), -1)
        return by_reference(model, lambda: model(ids, logits="none"))[1]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return by_reference(model, lambda: model(ids, logits="none", cu_seqlens=offsets))[1]


def steps(decoder: Any, ids: Tensor) -> Tensor:
    return torch.cat([decoder.step(token) for token in ids.split(1, dim=1)], dim=1)


def sets_of(chosen: Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in chosen.tolist()]


class Choices:
    """Checks what every attention of a fused block is given against the specification."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checked = self.pruned = 0
        self.means: Tensor | None = None  # of the decoder at work
        self._decode = triton_blocks.decode
        monkeypatch.setattr(triton_blocks, "decode", self._look)

    def _look(self, q: Tensor, *given: Any, **named: Any) -> Tensor:
        _, _, packed, lengths, chunk, topk = given
        best = packed.sort(dim=1, descending=True).values[:, : topk - 1]
        found = (0x7FFFFFFF - (best & 0x7FFFFFFF)).where(best != triton_decode.LOWEST, -1)
        for b, length in enumerate(lengths.tolist() if self.means is not None else ()):
            rows = (q[b : b + 1], self.means[b : b + 1, :, : length // chunk], chunk, topk, length)
            coarse, flat = (
                sets_of(select_chunks(*rows, selection, "reference")[0, 0])
                for selection in ("coarse_to_fine", "flat")
            )
            assert sets_of(found.view(len(q), q.shape[2], -1)[b]) == coarse, (b, length)
            self.checked += 1
            self.pruned += coarse != flat
        return self._decode(q, *given, **named)


def cache_of(decoder: GraphDecoder) -> KeyValueCache:
    return decoder._state.blocks[-1].cached[0].cache


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("lengths", "tokens", "dtype"),
    [
        ((14,), 7, torch.float32),
        ((5, 22, 15), 5, torch.float32),
        ((11, 18, 3), 5, torch.bfloat16),
        ((), 10, torch.float32),
        ((15,), 3, torch.bfloat16),
    ],
    ids=str,
)
def test_steps_equal_eager_decoding(
    lengths: tuple[int, ...], tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past several ends of runs, of all rows at other steps; from nothing; and what goes on. What
    warms up for a graph leaves no trace."""
    monkeypatch.setattr(GraphDecoder, "_capture", GraphDecoder._warm_up)  # choices are looked at
    model = model_of(dtype, key_conv=2)
    state = prompt(model, *lengths) if lengths else model.fresh_state(1)
    ids = random_ids(tokens + 1, batch=state.rows, seed=1).to(DEVICE)
    choices = Choices(monkeypatch)
    with triton_everywhere():
        decoder = GraphDecoder(model, state, tokens)
        decoder._warm_up()
        choices.means = cache_of(decoder).means_BGCD
        got = steps(decoder, ids[:, :tokens])
    assert choices.checked >= tokens * state.rows
    assert choices.pruned > 0
    if dtype == torch.float32:  # in narrower numbers, other choices may follow
        eager, rest = EagerDecoder(model, state), EagerDecoder(model, decoder.state)
        expected = by_reference(model, lambda: steps(eager, ids))
        assert error(got, expected[:, :tokens]) < ALLOWED
        with triton_everywhere():
            assert error(steps(rest, ids[:, tokens:]), expected[:, tokens:]) < ALLOWED


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("lengths", [(14, 14), (6, 19)], ids=str)
def test_states_before_and_after_stay_valid(lengths: tuple[int, ...]) -> None:
    """The prompt's state and one taken on the way go on elsewhere, while the decoder does: each
    with the forest of what it has read."""
    model = model_of()
    state = prompt(model, *lengths)
    first, left, right = (random_ids(2, seed=n).to(DEVICE) for n in (1, 2, 3))
    with triton_everywhere():
        decoder = GraphDecoder(model, state, 4)
        places = [x.data_ptr() for x in cache_of(decoder).forest(TOPK)]
        steps(decoder, first)
        fork = decoder.state
        grown = [n for rows in fork.blocks[-1].cached for n in rows.cache.trees._grown]
        assert grown == [(n + 2) // CHUNK for n in lengths]
        elsewhere = steps(EagerDecoder(model, state), right)
        forked = steps(GraphDecoder(model, fork, 2), right)
        got = steps(decoder, left)
        assert [x.data_ptr() for x in cache_of(decoder).forest(TOPK)] == places

    def expected(*parts: Tensor) -> Tensor:
        ids = torch.cat(parts, dim=1)
        return by_reference(model, lambda: steps(EagerDecoder(model, state), ids))[:, -2:]

    assert error(elsewhere, expected(right)) < ALLOWED
    assert error(forked, expected(first, right)) < ALLOWED
    assert error(got, expected(first, left)) < ALLOWED


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_called_as_a_module_it_is_the_eager_one(dtype: torch.dtype) -> None:
    """The same kernels on the same numbers: to the bit."""
    model = model_of(dtype)
    model.blocks[0].att.output.register_forward_hook(lambda *_: None)
    state, ids = prompt(model, 14), random_ids(4, batch=1, seed=1).to(DEVICE)
    with triton_everywhere():
        decoder = GraphDecoder(model, state, 4)
        assert decoder._form.weights == [None]
        assert torch.equal(steps(decoder, ids), steps(EagerDecoder(model, state), ids))


@pytest.mark.parametrize("lengths", [(32768, 32768), (28672, 9, 40961)], ids=str)
def test_a_step_waits_for_nothing(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the "meta" device, whose values nobody can read, in the place of a GPU: every launch, when
    runs complete and when they do not."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    model = model_of(pattern=("rwkv7", "sparse"), chunk_size=16, key_conv=3).to("meta")
    block, state = model.blocks[1], model.fresh_state(len(lengths))
    before = [n - 2 for n in lengths]
    cached = [(1, n) for n in before] if len(set(before)) > 1 else [(len(before), before[0])]
    caches = [CachedRows(block.att.empty_cache(model.emb.weight, rows, n), n) for rows, n in cached]
    for cache, n in caches:
        cache.written = n
    own = state.blocks[1]._replace(cached=tuple(caches))
    ids = torch.zeros((len(lengths), 1), dtype=torch.int64, device="meta")
    with triton_everywhere():
        decoder = GraphDecoder(model, ModelState((state.blocks[0], own), 0), 5)
        launches = []
        for _ in range(5):
            with counted() as counts:
                decoder.step(ids)
            launches.append(counts.kernels)
    assert "aten.lift_fresh.default" not in chain(*launches)  # nor is a list of numbers sent
    usual = launches[-1]
    assert usual.count("_score_kernel") == 1
    for step, found in enumerate(launches, 1):
        completes = any((n + step) % (16 * common.RUN) == 0 for n in before)
        assert found[: len(usual)] == usual
        assert (len(found) > len(usual)) == completes  # what grows, behind them
    assert sum(map(str.isidentifier, usual)) == 1 + 5 + 8 + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_equals_single_launches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At real sizes: to the bit, past ends of runs, waiting for nothing."""
    model = model_of(dtype, pattern=("rwkv7", "sparse"), chunk_size=16)
    ids = random_ids(100, batch=2, seed=1).to(DEVICE)
    with torch.no_grad():
        packed = random_ids(32740 + 20000, batch=1).to(DEVICE)
        offsets = torch.tensor([0, 32740, 52740], device=DEVICE)
        state = model(packed, logits="none", cu_seqlens=offsets)[1]
    graph = GraphDecoder(model, state, 100)
    assert graph._graph is not None
    monkeypatch.setattr(GraphDecoder, "_capture", lambda self: None)
    single = GraphDecoder(model, state, 100)
    graph.step(ids[:, :1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = steps(graph, ids[:, 1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, steps(single, ids)[:, 1:])
