"""Whole models: prefill and decoding of a hybrid, beside a dense Transformer of the same size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

import rwkvx
from rwkvx.costs import decode_bytes, mixing_flops
from rwkvx.decoding import start
from rwkvx.kinds.attention import CachedRows
from rwkvx.shipped import find_config
from rwkvx.state import ModelState
from rwkvx_evals.bench.floor import bytes_per_token
from rwkvx_evals.bench.kernels.case import OURS, Call, Case, Plan, planned
from rwkvx_evals.bench.kernels.error import relative_error
from rwkvx_evals.bench.kernels.transformer import Cache, Transformer
from rwkvx_evals.bench.subjects import open_model, read_shape

PREFILL, DECODE = "prefill, 0.22B shape", "decoding, 0.22B shape"
DENSE = "dense Transformer"
SHAPE = "rwkvx_0b2"
PLANS: dict[str, Plan] = {
    DECODE: {4096: 1, 2**20: 1},
    PREFILL: {16384: 2, 131072: 2, 2**20: 5},
}
PREFILL_PEERS_UNTIL = 131072  # tokens: 35 times as long at a million
STEPS = 32  # tokens of one timing of decoding
ROOM = 32768  # tokens that are decoded at most, all timings and the energy together
CHECKED_TOKENS = 512
# Sixteen blocks of random weights in bfloat16: plain torch errs by 0.009 to 0.017.
TOLERANCE = 0.05
PIECE = 65536  # tokens of random keys made at once

Step = Callable[[Tensor], Tensor]  # ids [1, 1] -> logits [1, 1, V]


def cases(device: str, lengths: tuple[int, ...]) -> list[Case]:
    """Batch 1, bfloat16, random weights."""
    found = []
    for family, plan in PLANS.items():
        for tokens, importance in planned(plan, lengths).items():
            peers = family == DECODE or tokens <= PREFILL_PEERS_UNTIL
            make = _decode_case if family == DECODE else _prefill_case
            found.append(make(device, tokens, importance, [OURS, *([DENSE] if peers else [])]))
    return found


def _prefill_case(device: str, tokens: int, importance: int, names: list[str]) -> Case:
    hybrid = hybrid_shape()
    weights, matrices = _sizes(device)
    return Case(
        family=PREFILL,
        tokens=tokens,
        bytes=weights,
        flops=2 * matrices * tokens + mixing_flops(hybrid, 0, tokens)["attention"],
        subjects=partial(_prefill_subjects, device, tokens, names),
        errors={name: partial(_prefill_error, device, name) for name in names},
        tolerance=TOLERANCE,
        importance=importance,
        cost=8 + tokens / 2**15 * len(names),
        energy=True,
    )


def _decode_case(device: str, tokens: int, importance: int, names: list[str]) -> Case:
    hybrid = hybrid_shape()
    weights, matrices = _sizes(device)
    return Case(
        family=DECODE,
        tokens=tokens,
        bytes=STEPS * (weights + decode_bytes(hybrid, tokens, _dtype(device).itemsize)),
        flops=STEPS * 2 * matrices,
        subjects=partial(_decode_subjects, device, tokens, names),
        errors={name: partial(_decode_error, device, name) for name in names},
        tolerance=TOLERANCE,
        importance=importance,
        cost=14 + tokens / 2**17,
        units=STEPS,
        energy=True,
    )


@torch.inference_mode()
def filled_state(model: rwkvx.Model, tokens: int) -> ModelState:
    """A state with random numbers in the place of `tokens` tokens, and room for `ROOM` more."""
    generator = torch.Generator(model.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.empty(shape, device=model.device, dtype=model.dtype)
        return made.normal_(generator=generator)

    state = model.fresh_state(1, tokens + ROOM)
    blocks = []
    for block in state.blocks:
        if "cached" in block._fields:
            store = block.cached[0].cache
            heads, size = store.k_BGSD.shape[1], store.k_BGSD.shape[3]
            for start in range(0, tokens, PIECE):
                part = (1, min(PIECE, tokens - start), heads, size)
                store.append(start, normal(*part), normal(*part))
            block = block._replace(cached=(CachedRows(store, tokens),))
        else:
            block.wkv.normal_(generator=generator)
        blocks.append(block)
    return ModelState(tuple(blocks), tokens)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@cache
def hybrid_shape() -> rwkvx.ModelConfig:
    """Of the model that is measured."""
    path = find_config(SHAPE)
    assert path is not None
    return read_shape(path)


@cache
def _hybrid(device: str) -> rwkvx.Model:
    return open_model(SHAPE, "float32")[0].to(device, _dtype(device))


@cache
def _dense(device: str) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(hybrid_shape()).to(device, _dtype(device)).eval()


@cache
def _sizes(device: str) -> tuple[int, int]:
    """Bytes of weights that a token reads, and numbers in the blocks' matrices."""
    with torch.device("meta"):
        model = rwkvx.Model(hybrid_shape()).to(_dtype(device))
    return bytes_per_token(model), sum(x.numel() for x in model.blocks.parameters() if x.dim() == 2)


def _ids(device: str, tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(1, hybrid_shape().vocab_size, (1, tokens), generator=draw).to(device)


def _reader(device: str, name: str) -> Callable[[Tensor], Tensor]:
    """Logits of the last token of a text."""
    if name == DENSE:
        return _dense(device)
    model = _hybrid(device)
    return lambda ids: _some(model(ids, logits="last")[0])


def _some(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _prefill_subjects(device: str, tokens: int, names: list[str]) -> dict[str, Call]:
    ids = _ids(device, tokens)

    @torch.inference_mode()
    def read(reader: Callable[[Tensor], Tensor]) -> Tensor:
        return reader(ids)

    return {name: partial(read, _reader(device, name)) for name in names}


def _decode_subjects(device: str, tokens: int, names: list[str]) -> dict[str, Call]:
    ids = _ids(device, 1)
    steps: dict[str, Step] = {}

    @torch.inference_mode()
    def decode(name: str) -> Tensor:
        # Made at the first call: where there is no memory for one, the others are still measured.
        if name not in steps:
            steps[name] = _step_after(device, name, tokens)
        for _ in range(STEPS):
            logits = steps[name](ids)
        return logits

    return {name: partial(decode, name) for name in names}


def _step_after(device: str, name: str, tokens: int) -> Step:
    """Decoding after so many tokens of random keys and values."""
    if name == OURS:
        return start(_hybrid(device), filled_state(_hybrid(device), tokens), ROOM).step
    held = Cache(_dense(device), tokens + ROOM)
    held.fill(tokens)
    return partial(_dense(device), cache=held)


@cache
@torch.inference_mode()
def _prefill_error(device: str, name: str) -> float:
    ids = _ids(device, CHECKED_TOKENS)
    return relative_error([_reader(device, name)(ids)], [_exact(device, name)])


@cache
@torch.inference_mode()
def _decode_error(device: str, name: str) -> float:
    """Of the last of some tokens that were decoded after a prefill."""
    before, after = _ids(device, CHECKED_TOKENS).split((CHECKED_TOKENS - 4, 4), dim=1)
    if name == OURS:
        model = _hybrid(device)
        state = model(before, model.fresh_state(1, CHECKED_TOKENS), logits="none")[1]
        step = start(model, state, ROOM).step
    else:
        held = Cache(_dense(device), CHECKED_TOKENS)
        _dense(device)(before, held)
        step = partial(_dense(device), cache=held)
    for one in after.split(1, dim=1):
        logits = step(one)
    return relative_error([logits], [_exact(device, name)])


@cache
@torch.inference_mode()
def _exact(device: str, name: str) -> Tensor:
    """Logits of the same weights in float64."""
    ids = _ids(device, CHECKED_TOKENS)
    if name == DENSE:
        logits: Tensor = copy.deepcopy(_dense(device)).double()(ids)
        return logits
    return _some(copy.deepcopy(_hybrid(device)).double()(ids, logits="last")[0])
