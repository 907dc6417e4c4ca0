"""Choosing an implementation, and packed-sequence offsets."""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from rwkvx_kernels import chunk_attention, dispatch, wkv7
from rwkvx_kernels.channel_mix import api as channel_mix
from rwkvx_kernels.chunk_attention import api as chunk_attention_api
from rwkvx_kernels.chunk_select import api as chunk_select
from rwkvx_kernels.dispatch import (
    Facts,
    UnsupportedError,
    check_cu_seqlens,
    compiled_lacks,
    decide,
    runs_of,
    triton_lacks,
)
from rwkvx_kernels.linear import api as linear
from rwkvx_kernels.linear import cross_entropy
from rwkvx_kernels.time_mix import api as time_mix
from rwkvx_kernels.token_shift import api as token_shift
from rwkvx_kernels.wkv7 import api as wkv7_api

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TRAINED, READ, GPU = Facts(CPU, gradients=True), Facts(CPU), Facts(CUDA)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (extra gpu)")


def resolve(facts: Facts, impl: str = "auto", *without: str) -> str:
    """What a family with all implementations `without` some takes."""
    lacks = {"triton": triton_lacks(facts), "compiled": compiled_lacks(facts), "torch": ""}
    return decide(impl, facts, {x: y for x, y in lacks.items() if x not in without}).impl


@needs_triton
def test_auto_takes_what_there_is() -> None:
    assert resolve(READ) == "compiled"
    assert resolve(TRAINED) == "torch"
    assert resolve(READ, "auto", "compiled") == "torch"
    assert resolve(GPU) == "triton"
    assert resolve(GPU, "auto", "triton") == "torch"
    assert resolve(Facts(torch.device("meta"))) == "torch"


ROUTES = [
    (linear.choose, (READ, 1), "compiled", "on a CPU, no gradient wanted"),
    (linear.choose, (READ, 5), "torch", "compiled reads the weights for every row"),
    (linear.choose, (TRAINED, 1), "torch", "compiled has no gradients"),
    (linear.choose, (READ._replace(dtype=torch.float16), 1), "torch", "has no torch.float16"),
    (linear.choose, (GPU, 1), "torch", "on a GPU"),
    (channel_mix.choose, (READ,), "compiled", "on a CPU, no gradient wanted"),
    (channel_mix.choose, (TRAINED,), "compiled", "on a CPU, gradients wanted"),
    (channel_mix.choose, (READ._replace(traced=True),), "torch", "torch.compile joins it"),
    (token_shift.choose, (TRAINED,), "compiled", "on a CPU, gradients wanted"),
    (token_shift.choose, (READ._replace(traced=True),), "torch", "torch.compile joins it"),
    (wkv7_api.choose, (READ, (64, 32)), "compiled", "on a CPU, no gradient wanted"),
    (wkv7_api.choose, (TRAINED, (64, 32)), "compiled", "on a CPU, gradients wanted"),
    (wkv7_api.choose, (TRAINED, (48, 32)), "torch", "compiled has gradients of heads whose"),
    (time_mix.choose, (READ, 64), "compiled", "on a CPU"),
    (time_mix.choose, (TRAINED, 64), "compiled", "on a CPU, gradients wanted"),
    (chunk_select.choose, (READ, "flat"), "torch", "compiled scores every chunk slower"),
    (chunk_select.choose, (TRAINED, "coarse_to_fine"), "compiled", "on a CPU"),
    (chunk_attention_api.choose, (READ, 2048, 3, 1), "compiled", "on a CPU"),
    (chunk_attention_api.choose, (READ, 2048, 3, 5), "torch", "query by query"),
    (chunk_attention_api.choose, (READ, 16, 6, 5000), "compiled", "on a CPU"),
    (chunk_attention_api.choose, (TRAINED, 16, 6, 5000), "torch", "has no gradients"),
]
ON_GPU = [
    (channel_mix.choose, (GPU,), "triton", "on a GPU, no gradient wanted"),
    (wkv7_api.choose, (GPU, (64, 200)), "torch", "triton has heads of 16 to 128 channels"),
    (wkv7_api.choose, (GPU._replace(dtype=torch.float64),), "torch", "triton has no float64"),
    (chunk_attention_api.choose, (GPU, 24, 3, 9), "torch", "chunks of a multiple of 16 tokens"),
    (chunk_attention_api.choose, (GPU, 32, 3, 9, 256), "torch", "heads of at most 128 channels"),
    (chunk_attention_api.choose, (GPU, 32, 3, 9), "triton", "on a GPU"),
    (chunk_select.choose, (GPU, "flat"), "triton", "on a GPU"),
]


@pytest.mark.parametrize(
    ("choose", "facts", "impl", "why"),
    [*ROUTES, *(pytest.param(*route, marks=needs_triton) for route in ON_GPU)],
)
def test_every_family_says_what_it_chooses_and_why(choose, facts, impl: str, why: str) -> None:  # type: ignore[no-untyped-def]
    choice = choose(*facts)
    assert choice.impl == impl
    assert why in choice.why
    assert choose(*facts, impl="reference") == ("reference", "asked for")
    with pytest.raises(ValueError, match="unknown impl 'cpu': choose one of auto, reference"):
        choose(*facts, impl="cpu")


def test_what_is_chosen_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function asks `choose`: there is no second rule."""
    x = torch.randn(1, 4, 2, 8)
    args = (x, -x.sigmoid(), x, x, x, x)
    with pytest.raises(UnsupportedError, match='impl="compiled" has gradients of heads whose'):
        wkv7.wkv7(*(t.clone().requires_grad_() for t in args), impl="compiled")
    monkeypatch.setattr(wkv7_api, "choose", lambda *_: dispatch.Choice("torch", ""))
    monkeypatch.setattr(wkv7_api, "wkv7_torch", None)
    with pytest.raises(TypeError):
        wkv7.wkv7(*args)


@pytest.mark.parametrize("error", [NotImplementedError, ValueError])
def test_an_explicit_request_is_never_replaced(error: type[Exception]) -> None:
    assert resolve(GPU, "torch") == "torch"
    with pytest.raises(error, match='impl="triton" is not there for this operation: choose one of'):
        resolve(GPU, "triton", "triton")
    with pytest.raises(error, match='impl="compiled" needs tensors on a CPU: choose one of "auto"'):
        resolve(GPU, "compiled")
    with pytest.raises(error, match=r'choose one of "auto", "torch"$'):
        resolve(TRAINED, "compiled", "triton")


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert resolve(READ, "triton") == "triton"
    assert resolve(READ) == "compiled"
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert resolve(GPU, "triton") == "triton"
    with pytest.raises(
        UnsupportedError, match=r'impl="triton" needs tensors on a GPU .* not on cpu'
    ):
        resolve(READ, "triton")


def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert resolve(GPU) == "torch"
    with pytest.raises(UnsupportedError, match=r"pip install .rwkvx\[gpu\]"):
        resolve(GPU, "triton")


def test_the_old_name_of_a_choice() -> None:
    assert wkv7.chosen_impl("cpu") == "compiled"
    assert wkv7.chosen_impl("cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        wkv7.chosen_impl("cpu", "fast")


@pytest.mark.parametrize("offsets", [[0, 5], [0, 0, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5]])
def test_good_offsets(offsets: list[int]) -> None:
    for dtype in (torch.int32, torch.int64):
        assert check_cu_seqlens(torch.tensor(offsets, dtype=dtype), 1, 5) == offsets


@pytest.mark.parametrize(
    ("offsets", "batch", "message"),
    [
        ([1, 5], 1, "must rise from 0 to T = 5"),
        ([0, 4], 1, "must rise"),
        ([0, 3, 2, 5], 1, "must rise"),
        ([[0, 5]], 1, "1-D integer"),
        ([0.0, 5.0], 1, "1-D integer"),
        ([0, 5], 2, "batch size 1, got 2"),
    ],
)
def test_bad_offsets(offsets: list[int], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(torch.tensor(offsets), batch, 5)


def test_autocast_changes_nothing() -> None:
    """The operations choose their own dtypes: a bfloat16 state would forget within 256 tokens."""
    torch.manual_seed(0)
    r, k, v, x = (torch.randn(1, 40, 2, 8) for _ in range(4))
    decay = -torch.rand(1, 40, 2, 8)
    expected = wkv7.wkv7(r, decay, k, v, -x * 0.1, x * 0.1)
    attended = chunk_attention.chunk_attention(r, k, v, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = wkv7.wkv7(r, log_decay=decay, k=k, v=v, alpha=-x * 0.1, beta=x * 0.1)
        o = chunk_attention.chunk_attention(q=r, k=k, v=v, chunk_size=4, topk=2)
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])
    assert torch.equal(o, attended)


@pytest.mark.parametrize(
    ("offsets", "runs"),
    [
        ([0, 4, 8, 8, 12, 13, 14, 20], [(0, 12, 3), (12, 14, 2), (14, 20, 1)]),
        ([0, 0, 5], [(0, 5, 1)]),
        ([0, 3, 6, 12], [(0, 6, 2), (6, 12, 1)]),
        ([0], []),
    ],
)
def test_sequences_of_one_length_are_a_batch(offsets: list[int], runs: list[tuple[int]]) -> None:
    x = torch.arange(offsets[-1]).unsqueeze(0)
    found = runs_of(torch.tensor(offsets), 1, offsets[-1])
    assert found == runs
    alone = [x[0, a:b].tolist() for a, b in pairwise(offsets) if a < b]
    assert [row for run in found for row in run.rows(x).tolist()] == alone


def test_numbers_are_read_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    x, reads, read = torch.tensor([0, 4, 9]), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or read(x))
    assert dispatch.read_once(x) == dispatch.read_once(x) == [0, 4, 9]
    assert len(reads) == 1
    x[1] = 5
    assert dispatch.read_once(x) == [0, 5, 9]
    assert dispatch.read_once(torch.tensor([0, 4, 9])) == [0, 4, 9]
    assert len(reads) == 3
    held = len(dispatch._READ)
    del x
    assert len(dispatch._READ) == held - 1


def test_numbers_that_were_sent_are_known() -> None:
    """The "meta" device has no values that could be read."""
    sent = dispatch.send_numbers(torch.tensor([0, 4, 9]), "meta")
    assert sent.device.type == "meta"
    assert check_cu_seqlens(sent, 1, 9) == [0, 4, 9]
    sent[1] = 5
    with pytest.raises(NotImplementedError, match="no data"):
        dispatch.read_once(sent)


@needs_triton
@pytest.mark.parametrize("family", [token_shift, channel_mix, cross_entropy, time_mix])
def test_old_gpus_run_the_torch_form(family) -> None:  # type: ignore[no-untyped-def]
    from rwkvx_kernels.tools.triton_device import SM_90, pretend

    old = Facts(torch.device("cuda", 75))  # a choice of its own: they are remembered
    more = {"head_size": 64} if family is time_mix else {}
    refused = pytest.raises(ValueError, match=r"needs compute capability 8\.0 or more, not sm_75")
    with pretend(SM_90._replace(arch=75)):
        choice = family.choose(old, **more)
        assert choice.impl == "torch"
        assert "not sm_75" in choice.why
        with refused:
            family.choose(old, impl="triton", **more)
