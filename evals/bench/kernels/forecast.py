"""What chunk attention on a GPU should take, stage by stage, before it is measured there.

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
# whose memory is 1.4 times as fast, with these (docs/results/h200).
MEASURED = {
    ("selection", 131072): (26.6, 6.6),
    ("forward given the choice", 131072): (9.9, 7.18),
    ("forward", 8192): (1.54, 1.12),
    ("forward", 131072): (37.8, 13.8),
    ("forward", 524288): (426.0, 90.2),
    ("forward + backward", 8192): (5.5, 3.21),
    ("forward + backward", 131072): (71.4, 28.0),
    ("forward + backward", 524288): (564.0, 151.0),
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


def _own(tokens: int) -> int:
    """Pairs of query and key in own chunks, of one head."""
    whole, rest = divmod(tokens, CHUNK)
    return whole * CHUNK * (CHUNK + 1) // 2 + rest * (rest + 1) // 2


def render() -> str:
    """The table, in Markdown."""
    lines = [
        "# Chunk attention on an H100: forecast",
        "",
        "Made by `python -m rwkvx_evals.bench.kernels.forecast`; nothing in the column *forecast*",
        "was measured. Batch 1, 16 heads of 64, chunks of 128, top 8, bfloat16, flat selection.",
        "Bytes over the floor: of inputs and outputs, read and written once. Where memory asks for",
        "parts, launches repeat. *Before*: an H100 with the kernels of commit 262a1fa. *Measured*:",
        "an H200 with these kernels (selection: the difference of two rows).",
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
