"""Loss by position and LongPPL against direct computation, on models of two kinds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import save_model
from needles import SmallWriter, ask
from tiny import tiny_model

from rwkvx.errors import InputError
from rwkvx_evals.long import loss
from rwkvx_evals.models.hugging_face import load_hugging_face
from rwkvx_evals.models.own import OwnModel

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 30


@pytest.fixture(scope="module", params=["ours", "llama", "mamba"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "ours":
        return OwnModel(tiny_model())
    folder = save_model(request.param, tmp_path_factory.mktemp(request.param))
    return load_hugging_face(folder, device="cpu", dtype="float32")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(loss, "SHORT", 48)
    monkeypatch.setattr(loss, "STRIDE", 16)
    monkeypatch.setattr(loss, "BETA", -6.3)
    return 48, 16


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import lzma

    (tmp_path / "long_docs").mkdir()
    for name, start in (("b", 0), ("a", 7)):
        content = lzma.compress(TEXT[start:].encode())
        (tmp_path / "long_docs" / f"{name}.txt.xz").write_bytes(content)
    return tmp_path


@torch.inference_mode()
def direct(model: Any, ids: np.ndarray) -> np.ndarray:
    """Loss of every token but the first, all logits in one call."""
    before = list(model.frame.before)
    all_ids = torch.tensor([[*before, *ids.tolist()]])
    logits, _ = model.read(all_ids, model.start(1, len(all_ids)), "all")
    found = torch.nn.functional.cross_entropy(
        logits[0, :-1].double(), all_ids[0, 1:], reduction="none"
    )
    return found[len(before) :].numpy()


def test_losses_and_key_tokens(
    model: Any, short: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    window, stride = short
    ids = np.random.default_rng(1).integers(5, 200, 211)
    ids[150:] = ids[20:81]  # what the far context knows
    long = direct(model, ids)
    gains = []
    for token in range(window, 211):
        start = (token - window) // stride * stride + stride
        gains.append(direct(model, ids[start : token + 1])[-1] - long[token - 1])
    # A threshold as far as can be from any gain, so that rounding decides nothing.
    middle = np.sort(gains)[40:120]
    widest = int(np.diff(middle).argmax())
    monkeypatch.setattr(loss, "ALPHA", float(middle[widest : widest + 2].mean()))
    told: list[int] = []
    found = loss.measure(model, ids, told.append)
    assert sum(told) == loss.tokens_to_read(211)
    total = sum(bucket[3] for bucket in found["buckets"])
    # Sums are rounded to 6 digits; a logit of some 10 in float32 to about 1e-5.
    assert total == pytest.approx(float(long.sum()), abs=211 * 1e-4)
    late = long[window - 1 :]
    key = late[(np.array(gains) > loss.ALPHA) & (-late > loss.BETA)]
    assert found["compared"] == len(gains) == 211 - window
    assert found["key_tokens"] == len(key) > 20
    assert found["key_loss"] == pytest.approx(float(key.sum()), abs=len(key) * 1e-4)


def test_logits_never_exceed_their_budget(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * model.vocab_size * 40)
    seen = []
    real = loss._cross_entropy
    monkeypatch.setattr(
        loss, "_cross_entropy", lambda x, y: (seen.append(x.shape[0] * x.shape[1]), real(x, y))[1]
    )
    ids = np.random.default_rng(1).integers(5, 200, (3, 100))
    found = loss.losses(model, ids, 30, lambda tokens: None)
    assert max(seen) <= 40
    for row, wanted in zip(found, ids, strict=True):
        assert np.allclose(row, direct(model, wanted)[29:], atol=1e-4)


def test_buckets_double() -> None:
    found = loss.buckets(np.ones(70))
    assert [b[:3] for b in found] == [[1, 16, 15], [16, 32, 16], [32, 64, 32], [64, 71, 7]]
    assert [b[3] for b in found] == [15, 16, 32, 7]


def test_windows_go_round_the_books(data: Path) -> None:
    books = loss.Books(SmallWriter().tokenizer, data, None)
    found = [books.window(1000, index) for index in range(4)]
    assert [(w.book[0], w.start) for w in found] == [("a", 0), ("b", 0), ("a", 1000), ("b", 1000)]
    assert bytes(found[3].ids.tolist()).decode() == TEXT[1000:2000]
    with pytest.raises(InputError, match="the books have 4 windows of 1,000 tokens"):
        books.window(1000, 4)
    with pytest.raises(InputError, match="there is neither"):
        loss.Books(SmallWriter().tokenizer, None, None).window(10, 0)


def test_a_run(model: Any, short: tuple[int, int], data: Path, tmp_path: Path) -> None:
    writer = SmallWriter(model.tokenizer, data=data)
    more = {"tasks": {}, "loss": True, "lengths": (100, 200), "samples": 3, "writer": writer}
    found = ask(model, tmp_path / "out", **more)
    assert found["tasks"] == {}
    entry = found["loss_by_position"]["lengths"]["200"]
    assert (entry["asked"], entry["scored"], entry["windows"]) == (3, 3, 3)
    books = loss.Books(model.tokenizer, data, None)
    each = [direct(model, books.window(200, i).ids) for i in range(3)]
    means = [float(x[63:127].mean()) for x in each]
    bucket = next(b for b in entry["buckets"] if b["from"] == 64)
    assert bucket["loss"] == pytest.approx(np.mean(means), abs=1e-4)
    assert bucket["stderr"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3), abs=1e-4)
    assert entry["loss"] == pytest.approx(np.mean([x.mean() for x in each]), abs=1e-4)
    before = (tmp_path / "out" / "results.json").read_bytes()
    ask(model, tmp_path / "out", **more)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_windows_that_are_not_there(data: Path, tmp_path: Path) -> None:
    model = OwnModel(tiny_model())
    writer = SmallWriter(model.tokenizer, data=data)
    more: dict[str, Any] = {"tasks": {}, "loss": True, "samples": 3, "writer": writer}
    found = ask(model, tmp_path / "out", lengths=(100, 2000), **more)
    entry = found["loss_by_position"]["lengths"]["2000"]
    assert (entry["asked"], entry["skipped"], entry["loss"]) == (2, 1, entry["loss"])
    with pytest.raises(InputError, match="cannot be measured at any of these lengths"):
        ask(model, tmp_path / "none", lengths=(5000,), **more)


def test_a_jackknife() -> None:
    pairs = [(3.0, 2), (1.0, 4), (2.0, 3)]
    value, error = loss._ratio(pairs)
    assert value == pytest.approx(math.exp(6 / 9), abs=1e-6)
    left = [math.exp(3 / 7), math.exp(5 / 5), math.exp(4 / 6)]
    assert error == pytest.approx(
        math.sqrt(2 / 3 * sum((x - np.mean(left)) ** 2 for x in left)), abs=1e-6
    )
    assert loss._ratio([(1.0, 2)]) == (pytest.approx(math.exp(0.5), abs=1e-6), None)
    assert loss._ratio([]) == (None, None)
