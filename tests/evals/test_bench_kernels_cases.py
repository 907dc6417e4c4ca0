"""The cases of the kernel benchmark at tiny sizes on the CPU: they compute what they say."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from rwkvx.decoding import start
from rwkvx.training.forward import Objective
from rwkvx_evals.bench.kernels import chunk_attention, energy, models, training, wkv7
from rwkvx_evals.bench.kernels.case import OURS, Case
from rwkvx_evals.bench.kernels.energy import open_meter
from rwkvx_evals.bench.kernels.run import check
from rwkvx_kernels.chunk_select import chunk_means, select_chunks

SHAPE = {
    "vocab_size": 70,
    "width": 64,
    "pattern": ["rwkv7", "sparse"],
    "chunk_size": 16,
    "topk": 3,
    "tokenizer": "bytes",
}
DESCENT = "rwkvx_kernels.chunk_select.triton_descent"
CACHED = [
    *(wkv7._error, wkv7._exact, chunk_attention._error, chunk_attention._exact),
    *(chunk_attention._part_error, models._prefill_error, models._decode_error, models._exact),
    *(training._error, models.hybrid_shape, models._hybrid, models._dense, models._sizes),
]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    shape = tmp_path / "tiny.yaml"
    shape.write_text(yaml.safe_dump({"model": SHAPE}))
    monkeypatch.setattr(models, "SHAPE", str(shape))
    monkeypatch.setattr(models, "STEPS", 3)
    monkeypatch.setattr(models, "ROOM", 64)
    monkeypatch.setattr(chunk_attention, "CHUNK", 16)
    monkeypatch.setattr(chunk_attention, "TOPK", 3)
    for module in (wkv7, chunk_attention, models, training):
        monkeypatch.setattr(module, "CHECKED_TOKENS", 72)
        if module in (wkv7, chunk_attention):
            monkeypatch.setattr(module, "HEADS", 2)
            monkeypatch.setattr(module, "SIZE", 16)
    yield
    for function in CACHED:
        function.cache_clear()


def cases_of(module: Any, *lengths: int) -> dict[tuple[str, int], Case]:
    return {(case.family, case.tokens): case for case in module.cases("cpu", lengths)}


def test_wkv7() -> None:
    cases = cases_of(wkv7, 20)
    forward, both = cases[wkv7.FORWARD, 20], cases[wkv7.BOTH, 20]
    assert forward.subjects()[OURS]().shape == (1, 20, 2, 16)  # type: ignore[attr-defined]
    assert len(both.subjects()[OURS]()) == 6  # type: ignore[arg-type]
    assert both.bytes == 3 * forward.bytes == 3 * 20 * 2 * 16 * 16
    rows = cases[wkv7.ROWS, 20]
    assert rows.units == 8 * 20
    assert rows.bytes == 8 * both.bytes
    assert rows.subjects()[OURS]()[0].shape == (8, 20, 2, 16)  # type: ignore[index]
    for case in (forward, both):
        assert 0 < check(case)[0][OURS] < case.tolerance


def test_chunk_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    tokens = 40
    cases = cases_of(chunk_attention, tokens)
    for family in chunk_attention.PLANS:
        case = cases[family, tokens]
        if family == chunk_attention.FINE and find_spec(DESCENT) is None:
            with pytest.raises(NotImplementedError, match="flat only"):
                check(case)
            continue
        errors, left_out = check(case)
        # In float32; selection counts what was chosen otherwise.
        assert errors[OURS] < 1e-6
        assert errors.get("dense SDPA flash", 0) < 1e-6
        assert all(name == "dense SDPA cuDNN" for name in left_out)
    both = cases[chunk_attention.BOTH, tokens]
    subjects = both.subjects()
    assert [x.shape for x in subjects[OURS]()] == [(1, tokens, 2, 16)] * 3  # type: ignore[attr-defined]
    assert [x.shape for x in subjects["dense SDPA flash"]()] == [(1, 2, tokens, 16)] * 3  # type: ignore[attr-defined]
    assert both.inputs_bytes == both.outputs_bytes == 4 * 4 * tokens * 2 * 16
    chosen = cases[chunk_attention.FLAT, tokens].subjects()[OURS]()
    assert chosen.shape == (1, tokens, 2, 2)  # type: ignore[attr-defined]
    given = cases[chunk_attention.PART, tokens].subjects()[OURS]()
    whole = cases[chunk_attention.FORWARD, tokens].subjects()[OURS]()
    torch.testing.assert_close(given, whole)


def test_a_wrong_choice_and_wrong_attention_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    choose = chunk_attention._choose
    monkeypatch.setattr(
        chunk_attention, "_choose", lambda family, q, means: choose(family, -q, means)
    )
    cases = cases_of(chunk_attention, 40)
    for family in (chunk_attention.FLAT, chunk_attention.PART):
        assert cases[family, 40].errors[OURS]() > 0.05


@pytest.mark.parametrize("tokens", [1, 15, 16, 70, 130])
def test_pairs_are_counted(tokens: int) -> None:
    x = torch.randn(1, tokens, 1, 2, dtype=torch.float64)
    chosen = select_chunks(x, chunk_means(x.transpose(1, 2), 16), 16, 3, impl="reference") >= 0
    every = torch.arange(tokens)
    own = int((every % 16 + 1).sum())
    assert chunk_attention.keys_attended(tokens) == own + 16 * int(chosen.sum())
    assert chunk_attention.keys_before(tokens) == 16 * int((every // 16).sum())


def test_whole_models() -> None:
    cases = cases_of(models, 40)
    for family in models.PLANS:
        case = cases[family, 40]
        errors, left_out = check(case)
        assert not left_out
        assert all(0 < x < 1e-5 for x in errors.values())
        assert set(errors) == {OURS, models.DENSE}
        for call in case.subjects().values():
            first, again = call(), call()
            assert first.shape == (1, 1, 70)  # type: ignore[attr-defined]
            assert torch.equal(first, again) == (family == models.PREFILL)  # type: ignore[arg-type]
    assert cases[models.DECODE, 40].units == 3


def test_a_training_step() -> None:
    """It learns what it reads, and a gradient that is off is seen."""
    case = cases_of(training, 40)[training.STEP, 40]
    assert 0 < check(case)[0][OURS] < case.tolerance
    step = training._step("cpu", 40)
    model, batch = step.model, step.batch
    before = [x.clone() for x in model.parameters()]
    objective = Objective(model)
    loss = objective(batch)[0]
    for _ in range(20):
        step()
    assert objective(batch)[0] < 0.9 * loss
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    training._error.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training,
            "_gradients",
            lambda m: torch.cat(
                [x.grad.flatten()[:5] * (1 + (x.dtype == torch.float32)) for x in m.parameters()]
            ),
        )
        assert case.errors[OURS]() > case.tolerance


def test_a_filled_state_is_one_that_a_model_could_have() -> None:
    """Whole chunks have the means of their keys, and decoding goes on in the same cache."""
    model = models._hybrid("cpu")
    state = models.filled_state(model, 40)
    cache, length = state.blocks[1].cached[0]  # type: ignore[union-attr]
    assert (length, state.length, cache.written) == (40, 40, 40)
    assert cache.capacity >= 40 + models.ROOM
    means = cache.k_BGSD[:, :, :32].unflatten(2, (2, 16)).mean(dim=3)
    torch.testing.assert_close(cache.means_BGCD[:, :, :2], means)
    ids = torch.tensor([[3], [5]])
    with torch.inference_mode():
        decoder = start(model, state, models.ROOM)
        got = [decoder.step(one) for one in ids.split(1)]
        expected = model(ids.view(1, 2), models.filled_state(model, 40))[0]
    torch.testing.assert_close(torch.cat(got, dim=1), expected)
    assert cache.written == 42


def test_the_dense_model_reads_token_by_token_what_it_reads_at_once() -> None:
    model, ids = models._dense("cpu"), models._ids("cpu", 12)
    hybrid = models._hybrid("cpu")
    own = sum(x.numel() for x in model.parameters())
    assert 0.8 < own / sum(x.numel() for x in hybrid.parameters()) < 1.2
    with torch.inference_mode():
        whole = model(ids)
        held = models.Cache(model, 12)
        model(ids[:, :8], held)
        for one in ids[:, 8:].split(1, dim=1):
            logits = model(one, held)
        torch.testing.assert_close(logits, whole)
        with pytest.raises(ValueError, match="token by token"):
            model(ids[:, :2], held)


class FakeNvml:
    """A GPU of 200 W, whose clock is the test's."""

    class NVMLError(Exception):
        pass

    def __init__(self, clock: SimpleNamespace, counter: bool) -> None:
        self._clock, self._counter = clock, counter

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self._counter:
            raise self.NVMLError("Not Supported")
        return int(1000 * 200 * self._clock.now)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 200_000


@pytest.mark.parametrize("counter", [True, False])
def test_energy(counter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(energy, "PERIOD", 1e-4)
    meter, how = open_meter("cpu", FakeNvml(clock, counter))
    assert meter is not None
    assert ("counter" if counter else "power every") in how

    def call() -> None:
        clock.now += 0.5

    # Five calls of half a second at 200 W.
    assert meter.joules_of(call, 2.4, "cpu") == pytest.approx(100.0)
    with meter.reading() as reading:
        call()
    assert reading.joules == pytest.approx(100.0)


def test_no_energy() -> None:
    assert open_meter("cpu") == (None, "no GPU")

    class Broken(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("Driver Not Loaded")

    meter, why = open_meter("cpu", Broken(SimpleNamespace(now=0.0), True))
    assert meter is None
    assert why == "NVMLError: Driver Not Loaded"
