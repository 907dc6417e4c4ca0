"""Compiled decoding: the same numbers as the modules give, of the weights as they are now.

Axes: B batch, T tokens.
"""

import copy

import pytest
import torch
from small import VARIANTS, error, random_ids, random_model, variant
from torch import Tensor, nn

from rwkvx import Model, ModelState
from rwkvx.quantize import quantize

TOKENS = 60


def decode(model: Model, ids: Tensor, state: ModelState | None = None) -> Tensor:
    """Logits of one sequence, read token by token without gradients."""
    outputs = []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            logits, state = model(token, state)
            outputs.append(logits)
    return torch.cat(outputs, dim=1)


def whole(model: Model, ids: Tensor) -> Tensor:
    logits, _ = model(ids)
    return logits.detach()


def compiles(model: Model) -> bool:
    """Whether the next token would be read by compiled code."""
    with torch.no_grad():
        _, state = model(random_ids(3, 1), None)
        x = torch.zeros(1, 1, model.config.width, dtype=model.dtype)
        return model._one_token.can_read(model, x, state)


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_errs_as_the_modules(name: str) -> None:
    model, ids = random_model(variant(name)).float(), random_ids(TOKENS, 1)
    exact = whole(copy.deepcopy(model).double(), ids)
    assert compiles(model)
    assert error(decode(model, ids), exact) < 3 * error(whole(model, ids), exact) + 1e-6


@pytest.mark.parametrize("name", ["plain", "conv_gqa"])
def test_bfloat16_errs_as_the_modules(name: str) -> None:
    model, ids = random_model(variant(name)).bfloat16(), random_ids(TOKENS, 1)
    exact = whole(copy.deepcopy(model).double(), ids)
    assert compiles(model)
    assert error(decode(model, ids), exact) < 1.5 * error(whole(model, ids), exact)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 1)
        assert error(decode(model, ids), whole(model, ids)) < 1e-5
    finally:
        torch.set_num_threads(before)


def test_a_state_can_be_continued_twice() -> None:
    model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 1)
    with torch.no_grad():
        _, state = model(ids[:, :20])
        _, state = model(ids[:, 20:21], state)  # a state that compiled code has made
    first, second = (decode(model, ids[:, 21:], state) for _ in range(2))
    assert torch.equal(first, second)
    assert error(first, whole(model, ids)[:, 21:]) < 1e-5


def test_rows_of_a_batch_and_gradients_use_the_modules() -> None:
    model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 2)
    assert error(decode(model, ids), whole(model, ids)) < 1e-5
    logits, _ = model(ids[:1, :1])
    assert logits.requires_grad
    assert not compiles(model.double())
    assert not compiles(model.half())


def change_in_place(model: Model) -> None:
    model.blocks[0].ffn.key.weight.data.mul_(1.5)


def change_data(model: Model) -> None:
    weight = model.blocks[2].att.w1
    weight.data = weight.data * 1.5


def change_parameter(model: Model) -> None:
    norm = model.blocks[1].ln1
    norm.weight = nn.Parameter(norm.weight.detach() * 1.5)


def change_module(model: Model) -> None:
    linear = nn.Linear(model.config.width, model.config.width, bias=False)
    model.blocks[2].att.key = linear


def change_dtype(model: Model) -> None:
    model.bfloat16()


def change_all(model: Model) -> None:
    other = random_model(model.config, seed=1).float()
    model.load_state_dict(other.state_dict(), assign=True)


CHANGES = [change_in_place, change_data, change_parameter, change_module, change_dtype, change_all]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change) -> None:  # type: ignore[no-untyped-def]
    model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 1)
    before = decode(model, ids)
    change(model)
    bound = 0.05 if model.dtype == torch.bfloat16 else 1e-5
    assert error(decode(model, ids), whole(model, ids)) < bound
    if model.dtype == torch.float32:
        assert error(before, whole(model, ids)) > 1e-3


def test_hooks_are_called() -> None:
    model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 1)
    decode(model, ids[:, :2])
    calls = []
    handle = model.blocks[1].att.output.register_forward_hook(lambda *_: calls.append(1))
    decode(model, ids[:, :5])
    assert len(calls) == 5
    handle.remove()
    assert compiles(model)


def test_a_copy_reads_its_own_weights() -> None:
    model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 1)
    decode(model, ids)
    twin = copy.deepcopy(model)
    change_in_place(twin)
    assert error(decode(twin, ids), whole(twin, ids)) < 1e-5
    assert error(decode(model, ids), whole(model, ids)) < 1e-5


def test_int8_reads_as_its_modules() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model, ids = random_model(variant("gqa")).to(dtype), random_ids(TOKENS, 1)
        quantize(model)
        assert compiles(model)
        assert error(decode(model, ids), whole(model, ids)) < bound
