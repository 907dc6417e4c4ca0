"""Top-k chunk attention, whole and in its parts, beside dense attention.

Axes: B batch, T time, H heads, D head size, C chunks, K chunks read besides the own one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from rwkvx_evals.bench.kernels.case import OURS, Call, Case, Plan, planned
from rwkvx_evals.bench.kernels.dense import implementations as dense_implementations
from rwkvx_evals.bench.kernels.error import backward_of, relative_error
from rwkvx_kernels.chunk_attention import attend_chunks, chunk_attention
from rwkvx_kernels.chunk_select import chunk_means, select_chunks

HEADS, SIZE, CHUNK, TOPK = 16, 64, 128, 8
FORWARD, BOTH = "chunk attention forward", "chunk attention forward + backward"
COARSE = "chunk attention forward, coarse to fine"
PART = "chunk attention, choice given"
FLAT, FINE = "chunk selection", "chunk selection, coarse to fine"
PLANS: dict[str, Plan] = {
    FORWARD: {131072: 1, 8192: 1, 524288: 1, 32768: 1, 65536: 3, 2**20: 3},
    BOTH: {131072: 1, 8192: 1, 524288: 1, 32768: 1, 65536: 3},
    PART: {131072: 1, 8192: 4, 65536: 4, 2**20: 4},
    COARSE: {65536: 1, 2**20: 1, 131072: 4},
    FLAT: {131072: 2, 65536: 4, 2**20: 4},
    FINE: {131072: 2, 65536: 4, 2**20: 3},
}
PEERS_UNTIL = 131072  # tokens: dense attention takes seconds beyond
CHECKED_TOKENS = 4096  # float64 with full score matrices
# Chunks that coarse-to-fine selection scores for a query, in the children of 24 nodes.
FINE_SCORED = 24 * 32
# Rounding of bfloat16 once in the weights and once in the result.
TOLERANCE = 1e-2


def cases(device: str, lengths: tuple[int, ...]) -> list[Case]:
    """Batch 1, 16 heads of 64 channels, chunks of 128, 8 of them read, bfloat16."""
    found = []
    for family, plan in PLANS.items():
        for tokens, importance in planned(plan, lengths).items():
            if family in (PART, FLAT, FINE):
                found.append(_part_case(family, device, tokens, importance))
            else:
                found.append(_whole_case(family, device, tokens, importance))
    return found


def _whole_case(family: str, device: str, tokens: int, importance: int) -> Case:
    backward, selection = family == BOTH, "coarse_to_fine" if family == COARSE else "flat"
    one = tokens * HEADS * SIZE * _dtype(device).itemsize
    peers = family != COARSE and tokens <= PEERS_UNTIL
    names = [OURS, *(dense_implementations() if peers else ())]
    quadratic = 6e-10 * tokens**2 if peers else 0.0
    return Case(
        family=family,
        tokens=tokens,
        # q, k, v in, o out; then q, k, v, o and its gradient in, three gradients out.
        bytes=one * (12 if backward else 4),
        flops=4 * HEADS * SIZE * keys_attended(tokens) * (3.5 if backward else 1),
        subjects=partial(_subjects, device, tokens, backward, selection, peers),
        errors={name: partial(_error, device, backward, selection, name) for name in names},
        tolerance=TOLERANCE,
        importance=importance,
        cost=(8 if backward else 5) + tokens / 2**17 + quadratic * (3 if backward else 1),
        inputs_bytes=one * (4 if backward else 3),
        outputs_bytes=one * (4 if backward else 1),
    )


def _part_case(family: str, device: str, tokens: int, importance: int) -> Case:
    one, rows = tokens * HEADS * SIZE * _dtype(device).itemsize, tokens * HEADS
    choice = 4 * rows * (TOPK - 1)
    attention = family == PART
    return Case(
        family=family,
        tokens=tokens,
        bytes=4 * one + choice if attention else one + choice + 4 * one // CHUNK,
        flops=_part_flops(family, tokens),
        subjects=partial(_part_subjects, family, device, tokens),
        errors={OURS: partial(_part_error, family, device)},
        tolerance=TOLERANCE,
        importance=importance,
        cost=4 + tokens / 2**17,
    )


def _part_flops(family: str, tokens: int) -> float:
    """Of selection: a product for each chunk that is scored."""
    if family == PART:
        return 4 * HEADS * SIZE * keys_attended(tokens)
    scored = keys_before(tokens) / CHUNK
    return 2 * HEADS * SIZE * (scored if family == FLAT else min(scored, tokens * FINE_SCORED))


def keys_attended(tokens: int) -> int:
    """Pairs of query and key of one head."""
    whole, rest = divmod(tokens, CHUNK)
    past = sum(min(TOPK - 1, i) for i in range(whole)) * CHUNK**2
    past += min(TOPK - 1, whole) * CHUNK * rest
    return past + whole * CHUNK * (CHUNK + 1) // 2 + rest * (rest + 1) // 2


def keys_before(tokens: int) -> int:
    """Pairs of query and key of completed chunks before its own, of one head."""
    whole, rest = divmod(tokens, CHUNK)
    return CHUNK**2 * whole * (whole - 1) // 2 + whole * CHUNK * rest


def _dtype(device: str) -> torch.dtype:
    # Triton's interpreter, which runs the parts where there is no GPU, has no bfloat16.
    return torch.bfloat16 if device == "cuda" else torch.float32


def _inputs(device: str, tokens: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, HEADS, SIZE)
    found = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    return [x.to(_dtype(device)) for x in found]


def _ours(device: str, selection: str) -> Callable[..., Tensor]:
    impl = "triton" if device == "cuda" else "auto"
    return partial(chunk_attention, chunk_size=CHUNK, topk=TOPK, impl=impl, selection=selection)


def _subjects(
    device: str, tokens: int, backward: bool, selection: str, peers: bool
) -> dict[str, Call]:
    inputs = [x.requires_grad_(backward) for x in _inputs(device, tokens)]
    weights = torch.randn_like(inputs[0])

    def call(implementation: Callable[..., Tensor], arguments: list[Tensor], do: Tensor) -> object:
        o = implementation(*arguments)
        return torch.autograd.grad(o, arguments, do) if backward else o

    found: dict[str, Call] = {OURS: partial(call, _ours(device, selection), inputs, weights)}
    for name, peer in dense_implementations().items() if peers else ():
        arguments = [peer.lay_out(x).requires_grad_(backward) for x in inputs]
        found[name] = partial(call, peer.attend, arguments, peer.lay_out(weights))
    return found


@cache
def _error(device: str, backward: bool, selection: str, name: str) -> float:
    """Of the output, or of the worst gradient. Dense attention is held against itself."""
    inputs = [x.requires_grad_(backward) for x in _inputs(device, CHECKED_TOKENS)]
    if name == OURS:
        got = _results(_ours(device, selection), inputs, backward)
        return relative_error(got, _exact(device, backward, selection, TOPK))
    peer = dense_implementations()[name]
    got = _results(lambda *args: peer.lay_out(peer.attend(*map(peer.lay_out, args))),
                   inputs, backward)  # fmt: skip
    # With as many chunks as there are, the reference is dense causal attention.
    return relative_error(got, _exact(device, backward, "flat", -(-CHECKED_TOKENS // CHUNK)))


@cache
def _exact(device: str, backward: bool, selection: str, topk: int) -> tuple[Tensor, ...]:
    wide = [x.double().requires_grad_(backward) for x in _inputs(device, CHECKED_TOKENS)]
    exactly = partial(
        chunk_attention, chunk_size=CHUNK, topk=topk, impl="reference", selection=selection
    )
    return _results(exactly, wide, backward)


def _results(
    implementation: Callable[..., Tensor], inputs: list[Tensor], backward: bool
) -> tuple[Tensor, ...]:
    o = implementation(*inputs)
    return backward_of(o, inputs) if backward else (o,)


def _choose(family: str, q: Tensor, means: Tensor) -> Tensor:
    """[B, T, H, K]; coarse to fine with the making of its tree, from which all queries profit."""
    selection = "coarse_to_fine" if family == FINE else "flat"
    return select_chunks(q, means, CHUNK, TOPK, selection=selection, impl="triton")


def _attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    return attend_chunks(q, k, v, chosen, CHUNK, impl="triton")


def _part_subjects(family: str, device: str, tokens: int) -> dict[str, Call]:
    q, k, v = _inputs(device, tokens)
    means = chunk_means(k.transpose(1, 2), CHUNK)
    if family != PART:
        return {OURS: partial(_choose, family, q, means)}
    return {OURS: partial(_attend, q, k, v, _choose(family, q, means))}


@cache
def _part_error(family: str, device: str) -> float:
    """Of the attention to what was chosen; of selection, the share of chunks chosen otherwise."""
    q, k, v = _inputs(device, CHECKED_TOKENS)
    chosen = _choose(family, q, chunk_means(k.transpose(1, 2), CHUNK)).long()
    if family == PART:
        exact = _exact(device, False, "flat", TOPK)
        return relative_error([_attend(q, k, v, chosen)], exact)
    means = chunk_means(k.double().transpose(1, 2), CHUNK)
    expected = select_chunks(q.double(), means, CHUNK, TOPK, impl="reference")
    same = (chosen.unsqueeze(-1) == expected.unsqueeze(-2)).any(dim=-1) & (chosen >= 0)
    return float(1 - same.sum() / (expected >= 0).sum().clamp_min(1))
