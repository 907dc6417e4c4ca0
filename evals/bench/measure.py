"""Prefill, decoding and long prefill of our model, beside the floor and the peer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import rwkvx
from rwkvx.costs import mixing_flops
from rwkvx.decoding import start
from rwkvx.errors import InputError
from rwkvx_evals.bench.floor import Products, bytes_per_token, plain_buffer
from rwkvx_evals.bench.peers import Peer
from rwkvx_evals.bench.timing import Run, by_turns, ratio, spread

# Rough costs for the progress bar, in prefilled tokens of ours.
PEER_TOKEN, DECODED_TOKEN, PEER_DECODED_TOKEN = 5.0, 30.0, 50.0
PIECE = 1024  # least tokens of one timing of a long prefill

Entry = dict[str, Any]


@dataclass
class Subjects:
    """What takes turns, with the tokens that all of them read."""

    model: rwkvx.Model
    peer: Peer | None
    products: Products
    ids: Tensor
    last_logits: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


def random_ids(model: rwkvx.Model, tokens: int) -> Tensor:
    """[1, tokens] int64, without id 0 (end of document)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(1, model.config.vocab_size, (1, tokens), generator=draw)


def prefill_cost(length: int, repeats: int, peer: bool) -> float:
    """For the progress bar."""
    return length * (repeats + 1) * (1.75 + (PEER_TOKEN if peer else 0))


def decode_cost(tokens: int, repeats: int, peer: bool) -> float:
    """For the progress bar."""
    return tokens * (repeats + 1) * (2 * DECODED_TOKEN + (PEER_DECODED_TOKEN if peer else 0))


@torch.inference_mode()
def measure_prefill(subjects: Subjects, length: int, repeats: int, bar: tqdm[Any]) -> Entry:
    """Seconds of one prefill of `length` tokens, logits of the last token.

    Leaves the states for `measure_decode`.

    Raises InputError when ours and the peer's float32 logits differ: a wrong result needs no time.
    """
    model, products = subjects.model, subjects.products
    ids = subjects.ids[:, :length]

    def ours() -> None:
        logits, subjects.states["ours"] = model(ids, logits="last")
        subjects.last_logits["ours"] = logits[0, 0]

    runs = [
        Run("ours", ours, cost=length),
        Run("floor", lambda: products.run_linear(length), cost=0.7 * length),
        Run("low_rank", lambda: products.run_low_rank(length), cost=0.05 * length),
    ]
    if subjects.peer is not None:
        runs.append(_peer_prefill(subjects, subjects.peer, ids[0].tolist()))
    # The warm-up is what is checked, before anything is timed.
    by_turns(runs, 0, bar)
    difference = check(subjects, length)
    seconds = by_turns(runs, repeats, bar, warm_up=False)
    both = [a + b for a, b in zip(seconds["floor"], seconds["low_rank"], strict=True)]
    ratios = {
        "ours / floor": ratio(seconds["ours"], seconds["floor"]),
        "ours / floor with low rank": ratio(seconds["ours"], both),
    }
    if "peer" in seconds:
        ratios["peer / ours"] = ratio(seconds["peer"], seconds["ours"])
    return {
        "tokens": length,
        "linear_flops": products.linear_flops(length),
        "low_rank_flops": products.low_rank_flops(length),
        "peer_difference": difference,
        "seconds": seconds,
        "tokens_per_second": {
            name: spread([length / x for x in taken])
            for name, taken in seconds.items()
            if name != "low_rank"
        },
        "ratios": ratios,
    }


def _peer_prefill(subjects: Subjects, peer: Peer, ids: list[int]) -> Run:
    def prefill() -> None:
        subjects.last_logits["peer"], subjects.states["peer"] = peer.prefill(ids)

    return Run("peer", prefill, cost=PEER_TOKEN * len(ids))


def check(subjects: Subjects, length: int) -> float | None:
    """Largest difference of the last token's logits to the peer's, over the largest logit.

    None without a peer, and beyond topk · chunk_size tokens, where the two mean different things.

    Raises InputError when float32 logits differ by more than rounding, or are no numbers.
    """
    config = subjects.model.config
    ours = subjects.last_logits["ours"].double()
    if not ours.isfinite().all():
        raise InputError(f"after {length} tokens the logits are not numbers: nothing was timed")
    if subjects.peer is None or length > config.topk * config.chunk_size:
        return None
    theirs = subjects.last_logits["peer"].double()
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    exact = subjects.model.dtype == torch.float32 and subjects.peer.dtype == "float32"
    allowed = subjects.peer.tolerance
    if exact and difference > allowed:
        raise InputError(
            f"after {length} tokens the logits differ from the peer's by {difference:.1e} of the "
            f"largest (allowed {allowed:.0e}): nothing was timed"
        )
    return difference


@torch.inference_mode()
def check_reduced(subjects: Subjects, length: int) -> Entry:
    """In bfloat16: errors of ours and of the peer against our own float32 on the same weights.

    Raises InputError when ours is the larger by more than half, and the peer rounds as ours does.
    """
    ids = subjects.ids[:, :length]
    exact = copy.deepcopy(subjects.model).float()(ids, logits="last")[0][0, 0].double()
    found = {"ours": subjects.model(ids, logits="last")[0][0, 0].double()}
    if subjects.peer is not None and subjects.peer.dtype == "bfloat16":
        found["peer"] = subjects.peer.prefill(ids[0].tolist())[0].double()
    errors = {n: float((x - exact).norm() / exact.norm()) for n, x in found.items()}
    fair = subjects.peer is not None and subjects.peer.rounds
    if fair and "peer" in errors and not errors["ours"] <= 1.5 * errors["peer"]:
        raise InputError(
            f"the error of ours against float32 is {errors['ours']:.1e}, the peer's "
            f"{errors['peer']:.1e}: nothing was timed"
        )
    return {"tokens": length, "relative_error": errors}


@torch.inference_mode()
def measure_decode(
    subjects: Subjects, length: int, tokens: int, repeats: int, bar: tqdm[Any]
) -> Entry:
    """Seconds per token of `tokens` single steps, going on after the prefill of `length` tokens.

    The floor is one plain sum over as many bytes as the weights that a step reads.
    """
    model, states = subjects.model, subjects.states
    steps = subjects.ids[:, :tokens].split(1, dim=1)
    size = bytes_per_token(model)
    decoder = start(model, states["ours"], tokens * (repeats + 1))
    buffer = plain_buffer(size)

    def ours() -> None:
        for step in steps:
            decoder.step(step)

    def floor() -> None:
        for _ in steps:
            buffer.sum()

    runs = [
        Run("ours", ours, tokens, DECODED_TOKEN * tokens),
        Run("floor", floor, tokens, DECODED_TOKEN * tokens),
    ]
    peer = subjects.peer
    if peer is not None:
        numbers = subjects.ids[0, :tokens].tolist()

        def decode() -> None:
            for number in numbers:
                _, states["peer"] = peer.decode(number, states["peer"])

        runs.append(Run("peer", decode, tokens, PEER_DECODED_TOKEN * tokens))
    seconds = by_turns(runs, repeats, bar)
    ratios = {"ours / floor": ratio(seconds["ours"], seconds["floor"])}
    if "peer" in seconds:
        ratios["peer / ours"] = ratio(seconds["peer"], seconds["ours"])
    return {
        "after_tokens": length,
        "steps": tokens,
        "bytes_per_token": size,
        "seconds_per_token": seconds,
        "tokens_per_second": {n: spread([1 / x for x in taken]) for n, taken in seconds.items()},
        "ratios": ratios,
    }


@torch.inference_mode()
def measure_long(
    subjects: Subjects, lengths: tuple[int, ...], window: int, bar: tqdm[Any]
) -> Entry:
    """Seconds per token over the last `window` tokens of each length, in pieces, by turns.

    What comes before the window is read untimed; logits "none".
    """
    states, places = {}, {}
    pieces = pieces_of(window, subjects.model.segment_lengths(1, 1 << 20)[0])
    for length in lengths:
        state = None
        for part in subjects.ids[:, : length - window].split(pieces[0], dim=1):
            _, state = subjects.model(part, state, logits="none")
            bar.update(part.shape[1])
        states[length], places[length] = state, length - window

    def read(length: int, tokens: int) -> None:
        start = places[length]
        part = subjects.ids[:, start : start + tokens]
        _, states[length] = subjects.model(part, states[length], logits="none")
        places[length] = start + tokens

    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for size in pieces:
        runs = [
            Run(str(n), lambda n=n, size=size: read(n, size), size, size)  # type: ignore[misc]
            for n in lengths
        ]
        taken = by_turns(runs, 1, bar, warm_up=False)
        for length in lengths:
            seconds[length] += taken[str(length)]
    return _long_entry(subjects, seconds, pieces, window)


def pieces_of(window: int, segment: int) -> list[int]:
    """Whole segments, of `PIECE` tokens or more, the rest in the last: as if read in one call."""
    piece = segment * -(-PIECE // segment)
    count = max(1, window // piece)
    return [piece] * (count - 1) + [window - piece * (count - 1)]


def _long_entry(
    subjects: Subjects, seconds: dict[int, list[float]], pieces: list[int], window: int
) -> Entry:
    config, products = subjects.model.config, subjects.products
    shortest = min(seconds)
    matrix = products.linear_flops(1, head_tokens=0) + products.low_rank_flops(1)

    def mean(length: int) -> float:
        return sum(x * n for x, n in zip(seconds[length], pieces, strict=True)) / window

    rows = []
    for length, taken in seconds.items():
        flops = mixing_flops(config, length - window, length)
        rows.append(
            {
                "tokens": length,
                "seconds_per_token": taken,
                "mean_seconds_per_token": mean(length),
                "flops_per_token": {
                    "products with weights": matrix,
                    "chunk attention": flops["attention"] / window,
                    "flat selection": flops["selection"] / window,
                },
                "ratio_to_shortest": {
                    **ratio(taken, seconds[shortest]),
                    "of_means": mean(length) / mean(shortest),
                },
            }
        )
    return {"window": window, "pieces": pieces, "lengths": rows}
