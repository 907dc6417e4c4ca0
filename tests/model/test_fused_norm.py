"""Blocks whose layer norms are part of the token shift, as on a GPU; without one, interpreted."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import HYBRID, error, random_ids, random_model, triton_everywhere
from torch import Tensor, nn

from rwkvx import Model, ModelConfig

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from rwkvx.layers import shifted
from rwkvx_kernels.token_shift import Norm, triton_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums in another order; gradients through all blocks share an error made early, of any size.
FACTOR = 8.0
ALLOWED = 2e-5


@pytest.fixture
def model() -> Model:
    config = {**HYBRID.to_dict(), "head_size": 16, "pattern": ("rwkv7", "sparse", "rwkv7")}
    made = random_model(ModelConfig.from_dict(config), dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        for block in made.blocks:  # another eps for each shows a mistaken one
            block.ln1.eps, block.ln2.eps = 0.02, 0.1
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of mixes of each launch that norms, in order."""
    found: list[int] = []
    forward = triton_norm.forward

    def counted(*args: Any) -> list[Tensor]:
        found.append(len(args[3]))
        return forward(*args)

    monkeypatch.setattr(triton_norm, "forward", counted)
    with triton_everywhere():
        yield found


def everything(model: Model, ids: Tensor, **options: Any) -> list[Tensor]:
    """Logits, states, and the gradient of every parameter of a weighted sum of both."""
    model.zero_grad()
    logits, state = model(ids, **options)
    results = [logits, *(x for s in state.blocks for x in s if isinstance(x, Tensor))]
    torch.manual_seed(1)
    total = sum((x * torch.randn(x.shape).to(x)).sum() for x in results)
    total.backward()  # type: ignore[union-attr]
    return [*results, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("offsets", [None, [0, 0, 7, 16, 16, 18]])
def test_training(model: Model, launches: list[int], offsets: list[int] | None) -> None:
    ids = random_ids(18 if offsets else 9, batch=1 if offsets else 2).to(DEVICE)
    options: dict[str, Any] = {"keep_cache": False}
    if offsets:
        options["cu_seqlens"] = torch.tensor(offsets)
    got = everything(model, ids, **options)
    assert launches == [6, 1, 1, 6, 1]
    model.impl = "reference"
    reference = everything(model, ids, **options)
    exact = everything(model.double(), ids, **options)
    assert len(launches) == 5
    worst = max(map(error, reference, exact))
    for a, b in zip(got, exact, strict=True):
        assert error(a, b) < FACTOR * worst


@torch.no_grad()
def test_prefill_in_parts_and_token_by_token(model: Model, launches: list[int]) -> None:
    ids = random_ids(6, batch=2).to(DEVICE)
    whole, end = model(ids)
    for lengths in ([2, 4], [1] * 6):
        state, parts = None, []
        for part in ids.split(lengths, dim=1):
            logits, state = model(part, state)
            parts.append(logits)
        assert error(torch.cat(parts, dim=1), whole) < ALLOWED
        for a, b in zip(state.blocks, end.blocks, strict=True):
            assert error(a.ffn_shift, b.ffn_shift) < ALLOWED
    assert len(launches) == 5 * (1 + 2 + 6)


@torch.no_grad()
def test_who_watches_a_norm_sees_it(model: Model, launches: list[int]) -> None:
    """Whatever stands in the norm's place or looks at what goes through it is called."""
    ids = random_ids(9).to(DEVICE)
    expected, _ = model(ids)
    assert launches == [6, 1, 1, 6, 1]
    block, seen = model.blocks[0], []
    watched: list[tuple[nn.Module, list[int]]] = [(block.ln1, [1]), (block.ffn, [])]
    for module, left in watched:
        launches.clear()
        hook = module.register_forward_hook(lambda *given: seen.append(given))
        got, _ = model(ids)
        hook.remove()
        assert launches == [*(left or [6]), 1, 6, 1]
        assert error(got, expected) < ALLOWED
    assert len(seen) == 2
    assert error(seen[1][1][0].mean(-1), block.ln2(seen[1][1][0]).mean(-1)) > 0  # normed once
    other = nn.Sequential(block.ln1)
    block.ln1 = other  # type: ignore[assignment]
    launches.clear()
    assert error(model(ids)[0], expected) < ALLOWED
    assert launches == [1, 1, 6, 1]


def test_a_norm_without_bias_is_called(model: Model, launches: list[int]) -> None:
    block = model.blocks[0]
    ids = random_ids(9).to(DEVICE)
    nn.init.zeros_(block.ln1.bias)
    with torch.no_grad():
        expected, _ = model(ids)
        block.ln1.register_parameter("bias", None)
        launches.clear()
        got, _ = model(ids)
    assert launches == [1, 1, 6, 1]
    assert error(got, expected) < ALLOWED


def test_parts_of_a_sequence_get_the_normed_token_before(model: Model) -> None:
    """What is sent to the next process is what its state would hold."""

    class Parts:
        def before(self, last: Tensor, first: Tensor) -> Tensor:
            self.sent = last
            return first + 1

    ffn, x = model.blocks[0].ffn, torch.randn(2, 5, 32, device=DEVICE)
    norm = Norm(torch.rand(32, device=DEVICE), torch.rand(32, device=DEVICE), 0.1)
    previous, parts = torch.randn(2, 32, device=DEVICE), Parts()
    expected, _ = shifted(ffn, norm(x), previous + 1, [ffn.x_k], None, None)
    ffn.sequence = parts  # type: ignore[assignment]
    with triton_everywhere():
        (got,), last = shifted(ffn, x, previous, [ffn.x_k], None, norm)
    assert error(got, expected[0]) < ALLOWED
    assert torch.equal(parts.sent, norm(x[:, -1]))
    assert torch.equal(last, parts.sent)
