"""What chunk attention and a decoded token on a GPU should take, before it is measured there.

    python -m rwkvx_evals.bench.kernels.forecast > docs/results/kernels_forecast.md

Bytes and products of each launch follow from its shapes (kernels/chunk_attention/README.md); what a
GPU makes of them is taken from what one was measured to do with kernels of the same kind.
"""

from __future__ import annotations

from typing import NamedTuple

from rwkvx_evals.bench.kernels.chunk_attention import (
    CHUNK,
    HEADS,
    SIZE,
    TOPK,
    keys_attended,
    keys_before,
)

# An H100 (docs/kernels.md): a copy; the part of it that gathered rows and that streamed ones reach;
# products of attention to pairs, of the gradients of keys; scores past lists in registers (a
# prototype that found columns exactly); the least that a launch takes.
COPY, GATHERED, STREAMED = 2.983e12, 0.44, 0.64
PRODUCTS, KEY_PRODUCTS, SCORES, LAUNCH = 166e12, 84e12, 0.307e12, 4e-6
LENGTHS = (8192, 131072, 524288)
# Milliseconds that this took: on that card with other kernels (commit 262a1fa), and on an H200,
# whose memory is 1.4 times as fast, with those of commit 159494d (docs/results/h200).
MEASURED = {
    ("selection", 131072): (26.6, 3.64),
    ("forward given the choice", 131072): (9.9, 7.28),
    ("forward", 8192): (1.54, 1.04),
    ("forward", 131072): (37.8, 11.2),
    ("forward", 524288): (426.0, 69.8),
    ("forward + backward", 8192): (5.5, 2.94),
    ("forward + backward", 131072): (71.4, 25.4),
    ("forward + backward", 524288): (564.0, 130.0),
}


class Stage(NamedTuple):
    """A kind of launch: how often, the bytes it moves, and seconds that it should take."""

    name: str
    launches: int
    bytes: float
    seconds: float


def stages(tokens: int) -> dict[str, list[Stage]]:
    """Of selection, the rest of the forward pass, and the backward pass; bfloat16."""
    row, rows = 2.0 * SIZE, tokens * HEADS
    past = (keys_attended(tokens) - _own(tokens)) // CHUNK * HEADS  # pairs of query and chunk
    chunks = tokens // CHUNK * HEADS
    choice = 4.0 * rows * (TOPK - 1)
    scores = keys_before(tokens) / CHUNK * HEADS
    own, all_pairs = 4.0 * SIZE * _own(tokens) * HEADS, 4.0 * SIZE * CHUNK * past

    def stage(
        name: str, moved: float, part: float, work: float = 0.0, rate: float = PRODUCTS, n: int = 1
    ) -> Stage:
        return Stage(name, n, moved, n * LAUNCH + max(moved / (part * COPY), work / rate))

    lists = stage("inverted lists", 24.0 * past, GATHERED, n=3)
    keys = 2 * chunks * CHUNK * row
    return {
        "selection": [
            stage("means", rows * row, STREAMED),
            stage("the best chunks", rows * row + choice, STREAMED, scores, SCORES),
        ],
        "attention": [
            lists,
            stage("pairs", past * (2 * row + 8) + keys, GATHERED, all_pairs),
            stage("own chunk, joined", past * (row + 4) + 4 * rows * row + choice, STREAMED, own),
        ],
        "backward": [
            stage("δ", 2 * rows * row, STREAMED),
            lists,
            stage("pairs, dQ", past * (3 * row + 12) + keys, GATHERED, 1.5 * all_pairs),
            stage("own chunk, dQ", past * row + 5 * rows * row + choice, STREAMED, 1.5 * own),
            stage(
                "dK and dV",
                past * (2 * row + 12) + 6 * rows * row,
                GATHERED,
                2 * (own + all_pairs),
                KEY_PRODUCTS,
                n=2,
            ),
        ],
    }


# The 0.22B shape (configs/rwkvx_0b2.yaml): width, ranks of the factors, vocabulary, blocks
# of both kinds, tokens of a chunk, chunks read.
WIDTH, RANKS, VOCABULARY, BLOCKS, LONG_CHUNK, LONG_TOPK = 768, 288, 65536, (12, 4), 2048, 3


def decoded() -> list[Stage]:
    """Launches of one token of one row (kernels/one_token/README.md), weights read once each."""
    time_mixes, attentions = BLOCKS
    matrix, factors = 2.0 * WIDTH * WIDTH, 2.0 * WIDTH * RANKS
    attended = 2 * 2.0 * LONG_TOPK * LONG_CHUNK * WIDTH

    def stage(name: str, count: int, launches: int, moved: float) -> Stage:
        seconds = count * (launches * LAUNCH + moved / (STREAMED * COPY))
        return Stage(name, count * launches, count * moved, seconds)

    return [
        stage("embedding, norm, lengths", 1, 2, 2.0 * WIDTH),
        stage("r, k, v and first factors", time_mixes, 1, 3 * matrix + factors),
        stage("heads", time_mixes, 1, factors + 2 * 4.0 * WIDTH * SIZE),
        stage("queries, keys and values", attentions, 1, 3 * matrix),
        stage("placing and selection", attentions, 1, 0.0),
        stage("attention", attentions, 2, attended),
        stage("output projections", sum(BLOCKS), 1, matrix),
        stage("channel mixes", sum(BLOCKS), 2, 8 * matrix),
        stage("norm, head", 1, 1, 2.0 * WIDTH * VOCABULARY),
    ]


def render_decoded() -> list[str]:
    """A table of it."""
    found = decoded()
    floor = sum(x.bytes for x in found) / COPY
    lines = [
        "",
        "## One decoded token of the 0.22B shape",
        "",
        "Batch 1, bfloat16, chunks of 2,048, top 3. Launches follow one another in a graph; each",
        "is taken to cost what that card's least launch did, and its bytes at the rate of streams.",
        "Before: 1.57 ms on an H100 (some 400 launches). Measured: 351 µs on an H200, where",
        "launches begin before the one before them has ended.",
        "",
        "| what | launches | MB | forecast, µs |",
        "|---|---|---|---|",
    ]
    launches, seconds = sum(x.launches for x in found), sum(x.seconds for x in found)
    total = Stage("a token", launches, sum(x.bytes for x in found), seconds)
    for x in [*found, total]:
        lines.append(f"| {x.name} | {x.launches} | {x.bytes / 1e6:.3g} | {1e6 * x.seconds:.3g} |")
    over = total.seconds / floor
    return [*lines, "", f"{over:.1f} times reading all bytes once ({1e6 * floor:.0f} µs)."]


def _own(tokens: int) -> int:
    """Pairs of query and key in own chunks, of one head."""
    whole, rest = divmod(tokens, CHUNK)
    return whole * CHUNK * (CHUNK + 1) // 2 + rest * (rest + 1) // 2


def render() -> str:
    """The table, in Markdown."""
    lines = [
        "# Kernels on an H100: forecast",
        "",
        "Made by `python -m rwkvx_evals.bench.kernels.forecast`; nothing in the column *forecast*",
        "was measured. Chunk attention: batch 1, 16 heads of 64, chunks of 128, top 8, bfloat16.",
        "Bytes over the floor: of inputs and outputs, read and written once. Where memory asks for",
        "parts, launches repeat. *Before*: an H100 with the kernels of commit 262a1fa. *Measured*:",
        "an H200 with these kernels (docs/results/h200).",
        "",
        "| tokens | what | launches | GB | over floor | before, ms | forecast, ms | measured, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tokens in LENGTHS:
        found = stages(tokens)
        one = 2.0 * SIZE * tokens * HEADS
        forward = found["selection"] + found["attention"]
        sums = [
            *((x.name, [x], 0.0) for part in found.values() for x in part),
            ("selection", found["selection"], 0.0),
            ("forward given the choice", found["attention"], 4 * one),
            ("forward", forward, 4 * one),
            ("forward + backward", forward + found["backward"], 12 * one),
        ]
        for name, parts, floor in sums:
            moved = sum(x.bytes for x in parts)
            over = f"{moved / floor:.1f}" if floor else ""
            before, measured = MEASURED.get((name, tokens), ("", ""))
            lines.append(
                f"| {tokens:,} | {name} | {sum(x.launches for x in parts)} | {moved / 1e9:.3g} | "
                f"{over} | {before} | {1e3 * sum(x.seconds for x in parts):.3g} | {measured} |"
            )
    return "\n".join([*lines, *render_decoded()]) + "\n"


if __name__ == "__main__":
    print(render(), end="")
