"""Decoding: the same numbers as prefill gives, of the model as it is now.

Axes: B batch, T tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import HYBRID, VARIANTS, error, random_ids, random_model, variant
from torch import Tensor, nn

from rwkvx import Model, ModelConfig, ModelState
from rwkvx.decoding import choose, start
from rwkvx.decoding.compiled import form_of
from rwkvx.quantize import quantize
from rwkvx_kernels.chunk_select import common

TOKENS = 60


def decode(model: Model, ids: Tensor, state: ModelState | None = None) -> Tensor:
    """Logits of a batch, read token by token as everything that decodes does."""
    decoder = start(model, state or model.fresh_state(len(ids)), ids.shape[1])
    return torch.cat([decoder.step(token) for token in ids.split(1, dim=1)], dim=1)


def whole(model: Model, ids: Tensor) -> Tensor:
    logits, _ = model(ids)
    return logits.detach()


def compiles(model: Model) -> bool:
    """Whether compiled code reads every block that it can have."""
    if choose(model, 1, 1).impl != "compiled":
        return False
    expected = [kind != "window" for kind in model.config.pattern]
    return [weights is not None for weights in form_of(model).weights] == expected


@pytest.mark.parametrize("name", [x for x in VARIANTS if x != "only_window"])
def test_float32_errs_as_the_modules(name: str) -> None:
    model, ids = random_model(variant(name)).float(), random_ids(TOKENS, 1)
    exact = whole(copy.deepcopy(model).double(), ids)
    assert compiles(model)
    assert error(decode(model, ids), exact) < 3 * error(whole(model, ids), exact) + 1e-6


@pytest.mark.parametrize("name", ["plain", "conv_gqa"])
def test_bfloat16_errs_as_the_modules(name: str) -> None:
    """Every chunk is chosen: two forms may differ by chance where two scores are close."""
    config = replace(variant(name), topk=TOKENS)
    model, ids = random_model(config).bfloat16(), random_ids(TOKENS, 1)
    exact = whole(copy.deepcopy(model).double(), ids)
    assert compiles(model)
    assert error(decode(model, ids), exact) < error(whole(model, ids), exact)


def test_coarse_to_fine_is_compiled_until_chunks_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 32 chunks here; then it is called as a module."""
    monkeypatch.setattr(common, "beam_widths", lambda topk: (1, 1))
    monkeypatch.setattr(common, "RUN", 32)
    config = replace(variant("plain"), chunk_size=1, selection="coarse_to_fine")
    model, ids = random_model(config).float(), random_ids(80, 1)
    assert compiles(model)
    states = [model(ids[:, :n], logits="none")[1].blocks[1] for n in (32, 33)]
    tokens = [model.blocks[1].att.token_state(state) for state in states]
    assert [token is None for token in tokens] == [False, True]
    exact = whole(copy.deepcopy(model).double(), ids)
    assert error(decode(model, ids), exact) < 3 * error(whole(model, ids), exact) + 1e-6
    flat = random_model(replace(config, selection="flat"))
    assert error(whole(flat, ids), exact) > 1e-3


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


def change_data(model: Model) -> None:
    weight = model.blocks[2].att.w1
    weight.data = weight.data * 1.5


def change_parameter(model: Model) -> None:
    norm = model.blocks[1].ln1
    norm.weight = nn.Parameter(norm.weight.detach() * 1.5)


def change_module(model: Model) -> None:
    linear = nn.Linear(model.config.width, model.config.width, bias=False)
    model.blocks[2].att.key = linear


def change_forward(model: Model) -> None:
    ffn = model.blocks[0].ffn
    forward = ffn.forward
    ffn.forward = lambda *args: (2 * (y := forward(*args))[0], y[1])  # type: ignore[method-assign]


def change_dtype(model: Model) -> None:
    model.bfloat16()


def change_all(model: Model) -> None:
    other = random_model(model.config, seed=1).float()
    model.load_state_dict(other.state_dict(), assign=True)


CHANGES = [
    change_data, change_parameter, change_module, change_forward, change_dtype, change_all,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change) -> None:  # type: ignore[no-untyped-def]
    model, ids = random_model(variant("plain")).float(), random_ids(TOKENS, 1)
    before = decode(model, ids)
    change(model)
    bound = 0.05 if model.dtype == torch.bfloat16 else 1e-5
    assert error(decode(model, ids), whole(model, ids)) < bound
    if model.dtype == torch.float32:
        assert error(before, whole(model, ids)) > 1e-3


def attributes(module: nn.Module) -> dict[str, Any]:
    """The plain ones, but for how training cuts sequences: a single token has no pieces."""
    names = (n for n in vars(module) if not n.startswith("_") and n != "recurrent_pieces")
    return {name: getattr(module, name) for name in names}


def another(value: Any) -> Any:
    """A value that changes what a module does, or that it cannot work with."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.5
    if isinstance(value, ModelConfig):
        return replace(value, head_size=4 if value.head_size == 8 else 8, chunk_size=5, topk=4)
    return "reference" if isinstance(value, str) else value


def outcome(read: Callable[[Model, Tensor], Tensor], model: Model, ids: Tensor) -> Tensor | str:
    try:
        return read(model, ids).detach()
    except (ValueError, RuntimeError):
        return "refused"


@pytest.mark.parametrize("name", ["conv_gqa", "window"])
def test_everything_that_a_module_has_is_followed(name: str) -> None:
    """Every parameter, buffer and plain attribute of every module, changed under a decoder."""
    model, ids = random_model(variant(name)).float(), random_ids(40, 1)
    before, changed = whole(model, ids), 0
    for tensor in (*model.parameters(), *model.buffers()):
        old = tensor.detach().clone()
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor))
            got, expected = decode(model, ids), whole(model, ids)
            assert error(got, expected) < 1e-4
            changed += error(before, expected) > 1e-4
            tensor.copy_(old)
    assert changed == len(list(model.parameters()))
    differ = 0
    for path, module in model.named_modules():
        for attribute, value in attributes(module).items():
            decode(model, ids[:, :1])
            setattr(module, attribute, another(value))
            got, expected = (outcome(read, model, ids) for read in (decode, whole))
            setattr(module, attribute, value)
            where = f"{path}.{attribute}"
            assert isinstance(got, str) == isinstance(expected, str), where
            if isinstance(got, Tensor) and isinstance(expected, Tensor):
                assert error(got, expected) < 1e-5, where
                differ += error(before, expected) > 1e-4
    assert differ > 3 * len(model.blocks)  # eps of two norms each, and what their kinds have


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
    change_data(twin)
    assert error(decode(twin, ids), whole(twin, ids)) < 1e-5
    assert error(decode(model, ids), whole(model, ids)) < 1e-5


def test_int8_reads_as_its_modules() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model, ids = random_model(variant("gqa")).to(dtype), random_ids(TOKENS, 1)
        quantize(model)
        assert compiles(model)
        assert error(decode(model, ids), whole(model, ids)) < bound


@pytest.mark.parametrize("name", ["ln1", "ln2"])
def test_a_norm_without_bias_is_a_module(name: str) -> None:
    """Compiled code would read a bias that is not there."""
    model, ids = random_model(HYBRID).float(), random_ids(9, 1)
    getattr(model.blocks[0], name).register_parameter("bias", None)
    assert form_of(model).weights[0] is None
    assert error(decode(model, ids), whole(model, ids)) < 1e-5
