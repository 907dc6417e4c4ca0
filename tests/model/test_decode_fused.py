"""Blocks of one token in a few Triton launches: as exact as the modules, of the model as it is.

Without a GPU in Triton's interpreter: few steps of small models.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import HYBRID, error, random_ids, random_model, triton_everywhere
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

import rwkvx
from rwkvx import Model, ModelConfig, ModelState
from rwkvx.adapters import AdapterConfig, add_adapter
from rwkvx.decoding.fused import form_of
from rwkvx.decoding.graph import GraphDecoder
from rwkvx.quantize import quantize
from rwkvx_kernels.tools.triton_options import Options, vary

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = {"pattern": ("rwkv7", "sparse", "rwkv7"), "key_conv": 3, "sparse_kv_heads": 1}
# The interpreter cuts bfloat16 off where a GPU rounds it: twice the error of what is stored.
TRUNCATED = 1.0 if DEVICE == "cuda" else 2.5
PROMPT, TOKENS = 31, 2  # in chunks of 16, the first of which fills one


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    config = ModelConfig.from_dict({**HYBRID.to_dict(), **BLOCKS, **changes})
    return random_model(config, dtype=dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Large tiles: the interpreter takes as long for each program as for a hundred numbers."""
    with vary("token", Options(64, 64)), vary("tokens", Options(64, 64)):
        yield


@torch.no_grad()
def modules(model: Model, ids: Tensor) -> tuple[Tensor, ModelState]:
    """The last logits of the modules, and the state before those."""
    _, state = model(ids[:, :PROMPT], logits="none")
    return model(ids[:, PROMPT:], state)[0], state


def fused(model: Model, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    with triton_everywhere():
        decoder = GraphDecoder(model, state, TOKENS)
        assert all(form_of(model).weights)
        steps = [decoder.step(token) for token in ids[:, PROMPT:].split(1, dim=1)]
        return torch.cat(steps, dim=1), decoder.state


def check(model: Model, rows: int, factor: float) -> None:
    """At most so many times the error of the modules, against those in float64; states as well."""
    ids = random_ids(PROMPT + TOKENS, rows).to(DEVICE)
    exact, _ = modules(wide(model), ids)
    expected, state = modules(model, ids)
    got, new = fused(model, ids, state)
    assert error(got, exact) < factor * error(expected, exact)
    with torch.no_grad():
        states = [m(ids, logits="none")[1].blocks for m in (wide(model), model)]
    for own, right, other in zip(new.blocks, *states, strict=True):
        for name in ("shift", "wkv", "conv", "ffn_shift"):
            if hasattr(own, name):
                x, true, theirs = (getattr(b, name) for b in (own, right, other))
                allowed = TRUNCATED * factor if x.dtype == torch.bfloat16 else factor
                assert not x.numel() or error(x, true) < allowed * error(theirs, true) + 1e-7, name


def wide(model: Model) -> Model:
    """In float64, and of the weights that int8 stands for."""
    exact = copy.deepcopy(model)
    for module in exact.modules():
        scale = getattr(module, "scale", None)
        if isinstance(scale, nn.Parameter):
            weight = module.weight.double() * scale.double()[:, None]
            module.weight, module.scale = nn.Parameter(weight, requires_grad=False), None
    return exact.double()


@pytest.mark.parametrize(
    ("dtype", "rows", "factor"),
    [
        (torch.float32, 1, 3.0),
        (torch.float32, 3, 3.0),
        (torch.bfloat16, 1, 1.0),
        (torch.bfloat16, 3, 1.0),
        (torch.float16, 1, 1.0),
    ],
    ids=str,
)
def test_errs_as_the_modules(dtype: torch.dtype, rows: int, factor: float) -> None:
    """Narrow weights: less than the modules, which round between operations."""
    check(model_of(dtype), rows, factor)


@pytest.mark.parametrize("rows", [1, 2])
def test_int8(rows: int) -> None:
    check(quantize(model_of(torch.bfloat16)), rows, 1.0)


@pytest.mark.parametrize("rows", [17, 64])
def test_many_rows(rows: int) -> None:
    """More than are read beside one another; an odd width, and heads of no power of two."""
    sizes = {"width": 24, "head_size": 24, "decay_rank": 3, "gate_rank": 20, "key_conv": 1}
    check(model_of(pattern=("rwkv7", "sparse"), **sizes), rows, 3.0)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    model, ids = model_of(), random_ids(PROMPT + TOKENS, 3).to(DEVICE)
    _, state = modules(model, ids)
    clean, _ = fused(model, ids, state)

    def poison(x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor([1], device=x.device), float("nan"))

    bad = ModelState(tuple(b.map(poison) for b in state.blocks), state.length)
    got, _ = fused(model, ids, bad)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_a_change_is_seen_by_a_decoder_at_work() -> None:
    model, ids = model_of(pattern=("rwkv7", "sparse")), random_ids(PROMPT + TOKENS, 1).to(DEVICE)
    _, state = modules(model, ids)
    with triton_everywhere():
        decoder = GraphDecoder(model, state, TOKENS)
        decoder.step(ids[:, PROMPT : PROMPT + 1])
    between = decoder.state
    key = model.blocks[0].att.key
    key.weight = nn.Parameter(key.weight.detach() * 1.5)
    model.blocks[1].ln2.eps = 0.5
    with torch.no_grad():
        expected, _ = model(ids[:, -1:], between)
    with triton_everywhere():
        assert error(decoder.step(ids[:, -1:]), expected) < 1e-5


def test_everything_that_a_module_has_is_watched() -> None:
    """Every parameter that moves, every plain attribute that changes, every child, every hook."""
    model = model_of()
    with triton_everywhere():
        form = form_of(model)
        assert all(form.weights)
        assert form_of(model) is form
    watched = 0
    for path, module in model.named_modules():
        if path in ("", "blocks"):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
                assert not form.watch.holds(), f"{path}.{name}"
                setattr(module, name, parameter)
                watched += 1
        names = (n for n in vars(module) if not n.startswith("_") and n != "training")
        for name in names:
            old = getattr(module, name)
            setattr(module, name, "another")
            assert not form.watch.holds(), f"{path}.{name}"
            setattr(module, name, old)
        handle = module.register_forward_hook(lambda *_: None)
        assert not form.watch.holds(), path
        handle.remove()
        assert form.watch.holds(), path
    assert watched == len(list(model.parameters()))
    for parent, name in ((model, "head"), (model.blocks, "1"), (model, "emb")):
        old = getattr(parent, name)
        setattr(parent, name, copy.deepcopy(old))
        assert not form.watch.holds(), name
        setattr(parent, name, old)


def test_an_adapter_is_called_between_fused_blocks() -> None:
    model = model_of()
    add_adapter(model, AdapterConfig("lora", rank=2, targets=("att.output",)), 0)
    with triton_everywhere():
        assert not any(form_of(model).weights)
    model = model_of()
    model.blocks[0].att.output.register_forward_hook(lambda _, __, y: 2 * y)
    with triton_everywhere():
        assert [w is None for w in form_of(model).weights] == [True, False, False]


def test_what_the_kernels_lack() -> None:
    with triton_everywhere():
        assert not any(form_of(model_of(torch.float64)).weights)
        large = model_of(width=136, head_size=136, pattern=("rwkv7",))
        assert not any(form_of(large).weights)
        window = form_of(model_of(pattern=("rwkv7", "window"))).weights
        assert [w is None for w in window] == [False, True]
    assert rwkvx.explain(model_of())
