"""WKV7 in Triton with sequences cut into segments: the same results, whatever the cuts."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from measure import relative_error
from test_wkv7_triton import DEVICE, NAMES, check, inputs, run, state

from rwkvx_kernels.wkv7 import triton_chunk, wkv7


@pytest.fixture(params=[1, 2], ids=["chunk", "two chunks"], autouse=True)
def _short_segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many chunks each, as if the device had room for any number of programs."""
    monkeypatch.setattr(triton_chunk, "LEAST_CHUNKS", request.param)
    monkeypatch.setattr(triton_chunk, "PROGRAMS", 1000)


def test_one_sequence() -> None:
    check(inputs(1, 61), state(1))


def test_a_batch_of_several_heads() -> None:
    check(inputs(2, 34, heads=2), state(2, heads=2))


def test_narrow() -> None:
    check(inputs(1, 70), state(1), torch.float16)


@pytest.mark.parametrize("offsets", [[0, 0, 17, 18, 70], [0, 0]])
def test_packed(offsets: list[int]) -> None:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    check(inputs(1, offsets[-1]), state(len(offsets) - 1), cu_seqlens=cu_seqlens)


def test_packed_sequences_equal_those_alone() -> None:
    args, offsets = inputs(1, 50), [0, 20, 50]
    together = run(args, None, torch.float32, "triton", torch.tensor(offsets, device=DEVICE))
    for i, (a, b) in enumerate(pairwise(offsets)):
        alone = run([x[:, a:b] for x in args], None, torch.float64, "reference")
        assert relative_error(together[0][:, a:b], alone[0]) < 1e-5, NAMES[0]  # type: ignore[index]
        assert relative_error(together[1][i : i + 1], alone[1]) < 1e-5  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("r", torch.nan), ("log_decay", torch.nan), ("log_decay", -torch.inf)),
        *(("k", torch.inf), ("v", torch.nan), ("v", -torch.inf), ("alpha", torch.inf)),
        ("beta", torch.nan),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_reaches_later_tokens_alone(name: str, bad: float) -> None:
    """Of its own chunk and segment too, and of v its own channel alone."""
    index = ("r", "log_decay", "k", "v", "alpha", "beta").index(name)
    forgets = name == "log_decay" and bad == -torch.inf  # finite
    args = inputs(1, 44, heads=2)
    args[index][0, 21, 0, 3] = bad
    exact, end = wkv7(*args, state(1, heads=2), impl="reference")
    y, final = wkv7(*(x.float() for x in args), state(1, heads=2).float(), impl="triton")
    for got, expected in ((y, exact), (final, end)):
        sound = expected.isfinite()
        assert torch.equal(got.isfinite(), sound)
        assert relative_error(got[sound], expected[sound]) < 1e-5
    assert y[:, :21].isfinite().all()
    assert bool(y[0, 21].isfinite().all()) == forgets
