"""The Markdown report of a CPU benchmark."""

from __future__ import annotations

from typing import Any

from rwkvx_evals.bench.peers import HYBRID
from rwkvx_evals.lengths import length_label

Results = dict[str, Any]
Spread = dict[str, float]


def render(results: Results) -> str:
    """All tables, from the results alone."""
    parts = [_head(results)]
    if "prefill" in results:
        parts += ["![tokens per second by length](speed.png)", _prefill(results)]
    if "decode" in results:
        parts.append(_decode(results))
    if "long" in results:
        parts.append(_long(results["long"]))
    if "memory" in results:
        parts.append(_memory(results["memory"]))
    return "\n\n".join(parts) + "\n"


def threads(count: int) -> str:
    """1 → "1 thread"."""
    return f"{count} thread{'s' * (count > 1)}"


def _head(results: Results) -> str:
    machine, settings, model = results["machine"], results["settings"], results["model"]
    memory = machine["memory_bytes"]
    lines = [
        f"# Speed on a CPU: {model['name']}",
        "",
        f"- Model: {model['parameters']:,} parameters ({model['weights']}), {settings['dtype']}",
        f"- Machine: {machine['cpu']}, {machine['cores']} logical cores used with "
        f"{threads(machine['threads'])}, {'?' if memory is None else f'{memory / 2**30:.1f}'} GiB",
        f"- torch {machine['torch']}, Python {machine['python']}, rwkvx {machine['rwkvx']}, "
        f"commit {machine['commit'] or 'unknown'}, {machine['date']}",
        f"- Peer: {results['peer']['words']}",
        f"- {settings['repeats']} repeats by turns (ours, floor, peer, ours, …) in one process, "
        "after one warm-up each. Cells are median (smallest … largest); a ratio is taken within "
        "each turn.",
    ]
    lines += [f"- **Note: {text}**" for text in results["warnings"]]
    return "\n".join(lines)


def _prefill(results: Results) -> str:
    rows = [
        [
            f"{entry['tokens']:,}",
            *(_speed(entry["tokens_per_second"].get(n)) for n in ("ours", "floor", "peer")),
            *(_ratio(entry["ratios"].get(n)) for n in _PREFILL_RATIOS),
            "–" if entry["peer_difference"] is None else f"{entry['peer_difference']:.1e}",
        ]
        for entry in results["prefill"]
    ]
    names = [
        "tokens", "ours, tokens/s", "floor, tokens/s", "peer, tokens/s", *_PREFILL_RATIOS,
        "logits differ by",
    ]  # fmt: skip
    gflops = [e["linear_flops"] / min(e["seconds"]["floor"]) / 1e9 for e in results["prefill"]]
    text = (
        "The floor is the products with the model's own projections alone, in the model's "
        f"segments, head for the last token (up to {max(gflops):,.0f} GFLOP/s here); "
        "“with low rank” adds those with the low-rank matrices of the time mix. Logits: largest "
        "difference to the peer over the largest logit."
    )
    if check := results.get("check"):
        errors = ", ".join(f"{n} {x:.1e}" for n, x in check["relative_error"].items())
        text += f" Error against float32 after {check['tokens']} tokens: {errors}."
    return f"## Prefill\n\n{_table(names, rows)}\n\n{text}"


_PREFILL_RATIOS = ("ours / floor", "ours / floor with low rank", "peer / ours")


def _decode(results: Results) -> str:
    rows = [
        [
            f"{entry['after_tokens']:,}",
            *(_milliseconds(entry["seconds_per_token"].get(n)) for n in ("ours", "floor", "peer")),
            *(_ratio(entry["ratios"].get(n)) for n in ("ours / floor", "peer / ours")),
        ]
        for entry in results["decode"]
    ]
    names = ["after tokens", "ours, ms", "floor, ms", "peer, ms", "ours / floor", "peer / ours"]
    first = results["decode"][0]
    size, fastest = first["bytes_per_token"], min(first["seconds_per_token"]["floor"])
    text = (
        f"Time per token over {first['steps']} single steps. The floor is one plain sum over as "
        f"many bytes as the weights that a step reads: {size / 1e6:,.1f} MB "
        f"({size / fastest / 1e9:.1f} GB/s here)."
    )
    if results["peer"]["measured"] and results["peer"]["words"].startswith(HYBRID):
        text += " The peer's decoding attends to 128 tokens of the prompt and to no later ones."
    return f"## Decoding\n\n{_table(names, rows)}\n\n{text}"


def _long(entry: dict[str, Any]) -> str:
    rows = []
    for row in entry["lengths"]:
        flops, change = row["flops_per_token"], row["ratio_to_shortest"]
        rows.append(
            [
                length_label(row["tokens"]),
                _milliseconds(row["seconds_per_token"], 3),
                f"{1e3 * row['mean_seconds_per_token']:.3f}",
                f"**{change['of_means']:.3f}**",
                _ratio(change),
                *(f"{flops[n] / 1e6:,.2f}" for n in _FLOPS),
            ]
        )
    names = ["tokens", "ms per token", "mean", "mean / mean of shortest", "ratio piece by piece"]
    names += [f"MFLOP: {name}" for name in _FLOPS]
    text = (
        f"Over the last {entry['window']:,} tokens of each length, in {len(entry['pieces'])} "
        "pieces that take turns; what comes before is read untimed. FLOPs are per token, counted."
    )
    return f"## Long prefill\n\n{_table(names, rows)}\n\n{text}"


_FLOPS = ("products with weights", "chunk attention", "flat selection")


def _memory(row: dict[str, Any]) -> str:
    return (
        "## Memory\n\n"
        f"A fresh process that reads {row['tokens']:,} tokens peaks at "
        f"**{row['peak_bytes'] / 2**30:.2f} GiB** ({row['loaded_bytes'] / 2**30:.2f} GiB after "
        f"loading the model), in {row['seconds']:,.0f} s."
    )


def _speed(values: Spread | None) -> str:
    if values is None:
        return "–"
    return f"**{values['median']:,.1f}** ({values['min']:,.1f} … {values['max']:,.1f})"


def _milliseconds(taken: list[float] | None, digits: int = 2) -> str:
    if taken is None:
        return "–"
    ordered = sorted(1e3 * x for x in taken)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"**{middle:,.{digits}f}** ({ordered[0]:,.{digits}f} … {ordered[-1]:,.{digits}f})"


def _ratio(values: Spread | None) -> str:
    if values is None:
        return "–"
    return (
        f"**{values['median']:.2f}** ({values['min']:.2f} … {values['max']:.2f}; "
        f"of smallest {values['of_smallest']:.2f})"
    )


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---:"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
