"""How often coarse-to-fine selection reads the chunks that flat selection reads, by length.

On random keys, which no order can group, and on a model's own keys and queries while it reads the
passkey prompt. Axes: B batch, T queries, H heads, G key heads, D head size, C chunks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import rwkvx
from rwkvx.data.passkey import Filler, PasskeyBuilder
from rwkvx.errors import InputError
from rwkvx.kinds.sparse import SparseAttention, SparseState
from rwkvx.progress import progress
from rwkvx_evals.bench.machine import describe
from rwkvx_evals.files import write_json, write_text
from rwkvx_evals.lengths import length_label
from rwkvx_evals.models.own import OwnModel
from rwkvx_evals.models.reader import read_prompt
from rwkvx_kernels.chunk_attention import KeyValueCache, selected_chunks

Results = dict[str, Any]
# The last so many tokens of a text ask, the question of a passkey prompt among them.
WINDOW = 1024
KEY, DEPTH = 34_567, 0.35
# A float32 product of D terms may err by so many roundings of |q| |k|, per term.
ROUNDINGS = 2.0


def agreement(q_BTHD: Tensor, cache: KeyValueCache, length: int, topk: int) -> dict[str, float]:
    """Shares of the past chunks chosen coarse-to-fine, the own chunk not counted.

    same: flat selection chose them too. as_good: or they score as well as the worst that flat
    selection chose, up to the rounding of float32 (copies of one text score alike, and either
    selection then takes some of them).
    """
    found = {
        name: selected_chunks(q_BTHD, cache, length, topk, name)
        for name in ("flat", "coarse_to_fine")
    }
    coarse, flat = found["coarse_to_fine"], found["flat"]
    group = q_BTHD.shape[2] // cache.means_BGCD.shape[1]
    means_BHCD = cache.means_BGCD.repeat_interleave(group, dim=1)
    chosen = coarse >= 0

    def scores(chunks_BTHS: Tensor) -> Tensor:
        index = chunks_BTHS.clamp_min(0).transpose(1, 2).flatten(2).unsqueeze(-1)
        rows = means_BHCD.gather(2, index.expand(-1, -1, -1, q_BTHD.shape[-1]))
        rows = rows.unflatten(2, (q_BTHD.shape[1], -1)).transpose(1, 2).double()
        return torch.einsum("bthd,bthsd->bths", q_BTHD.double(), rows)

    worst = scores(flat).amin(dim=-1, keepdim=True)
    size = (
        q_BTHD.norm(dim=-1, keepdim=True)
        * means_BHCD[:, :, : length // cache.chunk_size].norm(dim=-1).amax(dim=2)[:, None, :, None]
    )
    rounding = ROUNDINGS * q_BTHD.shape[-1] * torch.finfo(torch.float32).eps / 2 * size
    same = (coarse.unsqueeze(-1) == flat.unsqueeze(-2)).any(dim=-1)
    as_good = same | (scores(coarse) >= worst - rounding)
    count = max(1, int(chosen.sum()))
    return {
        "same": float((same & chosen).sum()) / count,
        "as_good": float((as_good & chosen).sum()) / count,
    }


def on_random_keys(chunks: int, dim: int, topk: int) -> dict[str, float]:
    """Standard normal chunk means and queries, the queries after all of the chunks."""
    draw = torch.Generator().manual_seed(chunks)
    means, q = (torch.randn(1, n, 1, dim, generator=draw) for n in (chunks + 1, WINDOW))
    cache = KeyValueCache(1, 1, dim, 1, means, chunks + 1).append(0, means, means)
    shares = [agreement(x, cache, chunks + 1, topk) for x in q.split(1, dim=1)[::8]]
    return {name: sum(s[name] for s in shares) / len(shares) for name in shares[0]}


@torch.inference_mode()
def on_own_keys(
    model: rwkvx.Model, filler: Filler, length: int, bar: tqdm[Any]
) -> list[dict[str, float]]:
    """Of every sparse block, over the last `WINDOW` tokens of a passkey prompt."""
    queries: list[Tensor] = []
    sparse = [m for m in model.modules() if isinstance(m, SparseAttention)]
    hooks = [
        m.receptance.register_forward_hook(lambda _m, _i, out: queries.append(out)) for m in sparse
    ]
    try:
        prompt = PasskeyBuilder(model.tokenizer).build(filler, length, DEPTH, KEY)
        ids = torch.from_numpy(prompt.ids)[None]
        own = OwnModel(model)
        _, state = read_prompt(own, ids[:, :-WINDOW], None, "none", bar.update)
        queries.clear()
        _, state = read_prompt(own, ids[:, -WINDOW:], state, "none", bar.update)
    finally:
        for hook in hooks:
            hook.remove()
    caches = [x.cached[0].cache for x in state.blocks if isinstance(x, SparseState)]
    size, topk = model.config.head_size, model.config.topk
    return [
        agreement(q.unflatten(-1, (-1, size)), cache, length, topk)
        for q, cache in zip(queries, caches, strict=True)
    ]


def run(name: str, lengths: tuple[int, ...], filler: Filler | None, out: Path) -> Results:
    """Measures, and writes results.json and report.md into `out`.

    filler: None for the standard sentences. Raises InputError for a model without sparse blocks.
    """
    from rwkvx_evals.passkey.evaluate import load_filler

    model = rwkvx.load(name, selection="coarse_to_fine")
    config = model.config
    if not any(isinstance(block.att, SparseAttention) for block in model.blocks):
        raise InputError(f"{name} has no sparse blocks: nothing is selected")
    if min(lengths) < 2 * WINDOW:
        raise InputError(f"lengths must be at least {2 * WINDOW} tokens, got {min(lengths)}")
    filler = filler or load_filler(model.tokenizer, None)
    results: Results = {"benchmark": "selection", "machine": describe(), "model": Path(name).name}
    results |= {"chunk_size": config.chunk_size, "topk": config.topk, "filler": filler.name}
    results["lengths"] = []
    with progress(sum(lengths)) as bar:
        for length in lengths:
            bar.set_description(length_label(length))
            chunks = length // config.chunk_size
            entry = {
                "length": length,
                "chunks": chunks,
                "random": on_random_keys(chunks, config.head_size, config.topk),
                "blocks": on_own_keys(model, filler, length, bar),
            }
            results["lengths"].append(entry)
            write_json(out / "results.json", results)
    write_text(out / "report.md", render(results))
    return results


def mean_of(blocks: list[dict[str, float]], name: str) -> float:
    """Over the sparse blocks."""
    return sum(x[name] for x in blocks) / len(blocks)


def render(results: Results) -> str:
    """The report, from the results alone."""
    machine = results["machine"]
    lines = [
        f"# Coarse-to-fine against flat selection: {results['model']}",
        "",
        f"Chunks of {results['chunk_size']} tokens, top {results['topk']}, filler "
        f"{results['filler']}; the last {WINDOW} tokens of a passkey prompt ask. Shares of the "
        "past chunks attended coarse-to-fine (the own chunk not counted) that flat selection "
        "attends too: as good as those up to float32 rounding, and the very same (copies of one "
        "sentence score alike, so that either selection takes some of them).",
        f"Commit {machine['commit'] or 'unknown'}, {machine['date']}, torch {machine['torch']}.",
        "",
        "| tokens | chunks | own keys, as good | by block | the same | random keys |",
        "|---|---|---|---|---|---|",
    ]
    for entry in results["lengths"]:
        blocks = entry["blocks"]
        each = ", ".join(f"{x['as_good']:.2%}" for x in blocks)
        lines.append(
            f"| {length_label(entry['length'])} | {entry['chunks']:,} "
            f"| {mean_of(blocks, 'as_good'):.2%} "
            f"| {each} | {mean_of(blocks, 'same'):.2%} | {entry['random']['as_good']:.2%} |"
        )
    return "\n".join(lines) + "\n"
