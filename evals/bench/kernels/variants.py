"""Launch options beside each other: a stage's own, from its family's table, and others.

What is timed is the call that the stage is part of; all else in it stays as it is. So a faster
variant becomes a change of the table (`options.py` of the family), and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from rwkvx.errors import InputError
from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_evals.bench.kernels.chunk_attention import CHUNK, HEADS, SIZE, TOPK
from rwkvx_evals.bench.kernels.error import relative_error
from rwkvx_evals.bench.kernels.stopwatch import by_turns
from rwkvx_evals.bench.machine import describe
from rwkvx_evals.bench.timing import ratio
from rwkvx_evals.files import write_json
from rwkvx_kernels.tools.triton_options import Options, Row, options_for, vary

SECONDS = 2.0  # spent on a stage
TOKENS = 131072
STEP_TOKENS = 8
VOCABULARY = 65536
EPS = 64e-5  # of norms
# Another order of the same sums in bfloat16.
TOLERANCE = 1e-2
Run = Callable[[], Sequence[torch.Tensor]]


class Family(NamedTuple):
    """Stages of a family of kernels.

    Attributes:
        table: its launch options. calls: for a stage, on a device, at so many tokens in a dtype,
            the call that it is part of. size: of what the table's sizes are of (None: of a head).
    """

    table: Sequence[Row]
    calls: Mapping[str, Callable[[str, int, torch.dtype], Run]]
    size: int | None = None


def _tensor(device: str, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn((1, tokens, HEADS, SIZE), device=device).to(dtype)


def _selection(coarse: bool, device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.chunk_select.triton_ops import select_sequences  # Triton may be missing

    q, k = (_tensor(device, tokens, dtype) for _ in range(2))
    return lambda: [select_sequences(q, k, coarse, CHUNK, TOPK)]


def _attention(backward: bool, device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.chunk_attention.triton_ops import attend_sequences, gradients_of_sequences
    from rwkvx_kernels.chunk_select.triton_ops import select_sequences

    q, k, v, do = (_tensor(device, tokens, dtype) for _ in range(4))
    chosen = select_sequences(q, k, False, CHUNK, TOPK)
    if not backward:
        return lambda: [attend_sequences(q, k, v, chosen, CHUNK)[0]]
    o, lse = attend_sequences(q, k, v, chosen, CHUNK)
    return lambda: gradients_of_sequences(do, o, lse, q, k, v, chosen, CHUNK)


def _wide(device: str, tokens: int, dtype: torch.dtype, width: int) -> torch.Tensor:
    return torch.randn((1, tokens, width), device=device).to(dtype)


def _shift(stage: str, device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.token_shift import Norm, triton_norm
    from rwkvx_kernels.token_shift import triton_mixes as shift

    width = HEADS * SIZE
    x, *douts = (_wide(device, tokens, dtype, width) for _ in range(1 + shift.MOST_MIXES))
    previous = torch.randn((1, width), device=device).to(dtype)
    weight, bias, *mixes = (torch.rand(width, device=device).to(dtype) for _ in range(8))
    given = (x, previous, Norm(weight, bias, EPS), mixes, None)
    if stage == "norm_forward":
        return lambda: triton_norm.forward(*given, dtype)
    if stage == "norm_backward":
        return lambda: triton_norm.backward(*given, douts)
    if stage == "backward":
        return lambda: shift.backward(x, previous, mixes, None, douts)
    return lambda: shift.forward(x, previous, mixes, None, dtype)


def _relu(backward: bool, device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.channel_mix import triton_relu as relu

    x, dy = (_wide(device, tokens, dtype, 4 * HEADS * SIZE) for _ in range(2))
    return lambda: [relu.backward(x, dy) if backward else relu.forward(x)]


def _entropy(device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.linear.cross_entropy import MOST_LOGITS
    from rwkvx_kernels.linear.triton_entropy import losses_and_gradients

    rows = min(tokens, MOST_LOGITS // VOCABULARY)  # a tile of logits
    logits = torch.randn((rows, VOCABULARY), device=device).to(dtype)
    targets = torch.randint(VOCABULARY, (rows,), device=device)
    weights = torch.full((rows,), 1 / rows, device=device)
    return lambda: [losses_and_gradients(logits.clone(), targets, weights)]


def _time_mix(stage: str, device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.time_mix import triton_finish, triton_keys
    from rwkvx_kernels.time_mix.triton_step import step

    count = STEP_TOKENS if stage == "step" else tokens
    x = [_wide(device, count, dtype, HEADS * SIZE) for _ in range(8)]
    own = [torch.randn(HEADS * SIZE, device=device).to(dtype) for _ in range(5)]
    r_k = torch.randn((HEADS, SIZE), device=device).to(dtype)
    bonus = torch.randn((1, count, HEADS), device=device)
    decay = x[3].float()
    if stage == "keys":
        return lambda: triton_keys.prepare(x[:4], x[4:6], own, HEADS)
    if stage == "keys_gradients":
        later = [bonus, *x[:2], decay, *x[4:]]
        gradients = triton_keys.gradients
        return lambda: _flat(gradients(x[:5], x[5:7], own, r_k, later))
    if stage == "finish":
        return lambda: [triton_finish.finish(x[:5], [r_k, *own[:2]], EPS)]
    if stage == "finish_gradients":
        return lambda: _flat(triton_finish.gradients(x[5], x[:5], [r_k, *own[:2]], EPS))
    state = torch.randn((1, HEADS, SIZE, SIZE), device=device)
    return lambda: step(x[:6], x[6:], [*own[:4], r_k, *own[:2], own[4]], EPS, state, None)


def _wkv7(backward: bool, device: str, tokens: int, dtype: torch.dtype) -> Run:
    from rwkvx_kernels.wkv7 import triton_ops as wkv7

    r, k, v, kk, dy = (_tensor(device, tokens, dtype) for _ in range(5))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    decay, state = -0.6065 * k.float().sigmoid(), torch.randn((1, HEADS, SIZE, SIZE), device=device)
    given = [r, decay, k, v, -kk, kk * r.sigmoid()]
    if not backward:
        return lambda: wkv7.forward(given, state, None, False)[:2]

    def both() -> list[torch.Tensor]:  # what is kept between them depends on the options
        _, final, states, u, p = wkv7.forward(given, state, None, True)
        assert states is not None
        assert u is not None
        return wkv7.backward(given, [states, u, p], None, dy, final)

    return both


def _flat(made: tuple[list[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    return [*made[0], made[1]]


def families() -> dict[str, Family]:
    """By the names of the kernels' folders."""
    from rwkvx_kernels.channel_mix import options as channel_mix
    from rwkvx_kernels.chunk_attention import options as attention
    from rwkvx_kernels.chunk_select import options as selection
    from rwkvx_kernels.linear import options as linear
    from rwkvx_kernels.time_mix import options as time_mix
    from rwkvx_kernels.token_shift import options as shift
    from rwkvx_kernels.wkv7 import options as wkv7

    flat, coarse = partial(_selection, False), partial(_selection, True)
    forward, backward = partial(_attention, False), partial(_attention, True)
    return {
        "chunk_select": Family(
            selection.TABLE,
            dict.fromkeys(("means", "flat"), flat)
            | dict.fromkeys(("level", "children", "keep"), coarse),
        ),
        "chunk_attention": Family(
            attention.TABLE,
            {"pairs": forward, "own": forward}
            | {"pairs_dq": backward, "own_dq": backward, "keys": backward},
        ),
        "time_mix": Family(time_mix.TABLE, {x: partial(_time_mix, x) for x in time_mix.STAGES}),
        "token_shift": Family(
            shift.TABLE,
            {x: partial(_shift, x) for x in (*shift.STAGES, *shift.NORM_STAGES)},
            HEADS * SIZE,
        ),
        "channel_mix": Family(
            channel_mix.TABLE, {x: partial(_relu, x == "backward") for x in channel_mix.STAGES}
        ),
        "linear": Family(linear.TABLE, {"entropy": _entropy}),
        "wkv7": Family(
            wkv7.TABLE,
            {x: partial(_wkv7, False) for x in ("segment", "summary", "follow")}
            | {x: partial(_wkv7, True) for x in ("carry", "gradients")},
        ),
    }


def parse(text: str) -> list[Options]:
    """ "128x64x8x2,64x64x4x2": rows, columns, warps, stages of each.

    Raises InputError for anything else.
    """
    found = []
    for one in text.split(","):
        numbers = one.split("x")
        if len(numbers) != 4 or not all(x.isdecimal() and int(x) for x in numbers):
            raise InputError(f"a variant is ROWSxCOLUMNSxWARPSxSTAGES, as 128x64x8x2, not {one!r}")
        found.append(Options(*map(int, numbers)))
    return found


def neighbours(own: Options) -> list[Options]:
    """One step away in every direction."""
    found = [own._replace(warps=8 if own.warps == 4 else 4), own._replace(stages=own.stages + 1)]
    if own.stages > 1:
        found.append(own._replace(stages=own.stages - 1))
    for name in ("rows", "columns"):
        size = getattr(own, name)
        found.append(own._replace(**{name: 2 * size}))
        if size >= 32:
            found.append(own._replace(**{name: size // 2}))
    return found


def run(
    stage: str,
    variants: list[Options] | None,
    out: Path,
    tokens: int = TOKENS,
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time a stage "FAMILY.STAGE", or all of a "FAMILY", with its own options and with variants.

    variants: None for the neighbours of its own. Writes variants.json into `out` after each stage.

    Raises InputError for a stage that is not there, and where there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("rwkvx bench kernels measures kernels on a GPU, and torch sees none here")
    known = families()
    name, _, one = stage.partition(".")
    if name not in known or (one and one not in known[name].calls):
        names = ", ".join(f"{x}.{s}" for x, found in known.items() for s in found.calls)
        raise InputError(f"no stage {stage!r}: choose a family or one of {names}"[:300])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no bfloat16
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    results: dict[str, Any] = {"machine": describe() | {"gpu": gpu}, "tokens": tokens, "stages": []}
    write_json(out / "variants.json", results)
    family = known[name]
    for part in [one] if one else family.calls:
        size = family.size or SIZE
        own = options_for(family.table, part, dtype, size, torch.device(device))
        others = neighbours(own) if variants is None else variants
        call = family.calls[part](device, tokens, dtype)
        results["stages"].append(_beside(f"{name}.{part}", part, own, others, call, device, say))
        write_json(out / "variants.json", results)
    return results


def _beside(
    name: str,
    stage: str,
    own: Options,
    others: list[Options],
    call: Run,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The row of a stage; variants that do not run, or err, are left out with the reason."""
    expected = [x.double() for x in call()]

    def varied(options: Options, check: bool = False) -> None:
        with vary(stage, options):
            got = call()
        if check and not relative_error([x.double() for x in got], expected) <= TOLERANCE:
            raise ValueError("computes something else")

    calls: dict[str, Callable[[], object]] = {OURS: call}
    left_out: dict[str, str] = {}
    for options in others:
        label = "x".join(map(str, options))
        try:
            varied(options, check=True)
            calls[label] = partial(varied, options)
        except Exception as error:  # whatever a compiler raises
            left_out[label] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    seconds, failed = by_turns(calls, device, SECONDS)
    label = "x".join(map(str, own))
    say(f"{name}: {label} of the table takes {1e3 * median(seconds[OURS]):.3f} ms")
    times = {}
    for other in [x for x in seconds if x != OURS]:
        times[other] = ratio(seconds[other], seconds[OURS])
        say(f"  {other:<14} x {times[other]['median']:.3f}")
    for other, why in (left_out | failed).items():
        say(f"  {other:<14} left out: {why}")
    return {
        "stage": name,
        "own": label,
        "seconds": seconds,
        "times_own": times,
        "left_out": left_out | failed,
    }
