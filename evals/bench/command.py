"""`rwkvx bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkvx.cli.options import Within
from rwkvx.errors import InputError
from rwkvx.ranges import COUNT, NEW_TOKENS, THREADS

if TYPE_CHECKING:
    from rwkvx_evals.bench.run import Results


@click.group("bench")
def bench_command() -> None:
    """Measure speed and memory on this machine.

    \b
    Examples:
      rwkvx bench cpu
      rwkvx bench load
      rwkvx bench training
      rwkvx bench kernels
    """


@bench_command.command("cpu")
@click.option(
    "--model",
    default="rwkvx_0b2",
    show_default=True,
    help="A shape (name of a configuration or a .yaml file: random weights), or a model: a "
    "shipped name, a folder, a .pth file.",
)
@click.option(
    "--lengths",
    default="128,256,512,1k,2k",
    show_default=True,
    help="Tokens of prefill, then decoding goes on from there; 1k = 1024, none: leave out.",
)
@click.option(
    "--decode",
    type=Within(NEW_TOKENS),
    default=16,
    show_default=True,
    help="Steps of a timing; 0: leave out.",
)
@click.option(
    "--long", "long_", default="none", show_default=True, help="Long prefills, such as 16k,64k."
)
@click.option("--window", default="8k", show_default=True, help="Last tokens of --long to time.")
@click.option(
    "--memory", default="none", show_default=True, help="Peak memory of reading so many tokens."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "int8"]), default="float32")
@click.option("--selection", type=click.Choice(["flat", "coarse_to_fine"]), default="flat")
@click.option(
    "--threads", type=Within(THREADS), help="Default: all cores that this process may use."
)
@click.option("--repeats", type=Within(COUNT), default=5, show_default=True)
@click.option(
    "--peer",
    type=click.Choice(["auto", "none", "rwkv-x", "rwkv", "llama.cpp"]),
    is_flag=False,
    flag_value="auto",
    default="auto",
    show_default=True,
    help="Measured too, where it is installed; auto: rwkv-x, of RWKV-7 alone rwkv.",
)
@click.option("--no-peer", "peer", flag_value="none", help="As --peer none.")
@click.option(
    "--peer-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Default: as --dtype, bfloat16 for int8.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/bench-MODEL.")
def cpu_command(
    model: str,
    lengths: str,
    decode: int,
    long_: str,
    window: str,
    memory: str,
    dtype: str,
    selection: str,
    threads: int | None,
    repeats: int,
    peer: str,
    peer_dtype: str | None,
    out: Path | None,
) -> None:
    """Prefill, decoding, long prefill and memory, beside what no implementation can avoid.

    Ours, the model's matrix products alone (the floor; for decoding: reading its weights once)
    and a published package on the same weights take turns in one process; logits are compared
    before anything is timed. Leave the machine alone meanwhile.

    \b
    Examples:
      rwkvx bench cpu
      rwkvx bench cpu --model rwkv7_0b2 --dtype int8 --peer-dtype float32
      rwkvx bench cpu --model rwkv7_0b2 --dtype bfloat16 --peer llama.cpp
      rwkvx bench cpu --lengths none --long 16k,64k
      rwkvx bench cpu --model passkey-tiny --lengths none --long 16k,256k --memory 1m
      rwkvx bench cpu --model passkey-tiny --selection coarse_to_fine --lengths none --long 64k,1m
    """
    from rwkvx_evals.bench.machine import available_cores
    from rwkvx_evals.bench.run import Settings, run
    from rwkvx_evals.lengths import parse_length, parse_lengths

    def several(text: str) -> tuple[int, ...]:
        return () if text.strip().lower() in ("none", "") else parse_lengths(text)

    settings = Settings(
        model=model,
        lengths=several(lengths),
        decode=decode,
        long=several(long_),
        window=parse_length(window),
        memory=max(several(memory), default=0),
        dtype=dtype,
        selection=selection,
        threads=available_cores() if threads is None else threads,
        repeats=repeats,
        peer=peer,
        peer_dtype=peer_dtype or ("float32" if dtype == "float32" else "bfloat16"),
    )
    out = out or Path("runs") / f"bench-{Path(model).stem}"
    results = run(settings, out)
    click.echo(summary(results))
    picture = f"   picture: {out / 'speed.png'}" if "prefill" in results else ""
    click.echo(f"report: {out / 'report.md'}{picture}")
    for warning in results["warnings"]:
        click.echo(f"warning: {warning}", err=True)


@bench_command.command("selection")
@click.option("--model", default="passkey-tiny", show_default=True)
@click.option("--lengths", default="16k,64k,256k", show_default=True, help="1k = 1024 tokens.")
@click.option("--haystack", help="A .txt or .xz file of prose in place of the standard filler.")
@click.option("--data", help="Data folder, to find --haystack in; default: RWKVX_DATA.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/selection-MODEL.")
def selection_command(
    model: str, lengths: str, haystack: str | None, data: str | None, out: Path | None
) -> None:
    """How often coarse-to-fine selection attends to what flat selection attends to.

    \b
    Example:
      rwkvx bench selection --model passkey-tiny --lengths 16k,64k,256k
    """
    import rwkvx
    from rwkvx.data.folder import data_folder
    from rwkvx_evals.bench.selection import render, run
    from rwkvx_evals.lengths import parse_lengths
    from rwkvx_evals.long.sources import find_haystack
    from rwkvx_evals.passkey.evaluate import load_filler

    filler = None
    if haystack is not None:
        file = find_haystack(haystack, data_folder(data))
        filler = load_filler(rwkvx.load(model).tokenizer, file)
    out = out or Path("runs") / f"selection-{Path(model).stem}"
    click.echo(render(run(model, parse_lengths(lengths), filler, out)), nl=False)


@bench_command.command("load")
@click.option(
    "--model", default="rwkvx_0b2", show_default=True, help="A shape: random weights are written."
)
@click.option("--formats", default="folder,pth", show_default=True, help="See rwkvx convert --to.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/bench-load-MODEL.")
def load_command(model: str, formats: str, out: Path | None) -> None:
    """Peak memory of loading a checkpoint, over its size.

    \b
    Example:
      rwkvx bench load
    """
    from rwkvx_evals.bench.load import run

    out = out or Path("runs") / f"bench-load-{Path(model).stem}"
    for row in run(model, tuple(formats.split(",")), out)["rows"]:
        what = f"{row['format']}, {row['stored']} as {row['asked']}"
        click.echo(
            f"{what:<28} {row['size'] / 1e6:8,.1f} MB, peak {row['peak'] / 1e6:8,.1f} MB: "
            f"{row['ratio']:.3f}"
        )
    click.echo(f"report: {out / 'report.md'}")


@bench_command.command("training")
@click.option("--model", default="rwkvx_nano", show_default=True, help="A shape: random weights.")
@click.option("--length", default="2k", show_default=True, help="Tokens of a timed step.")
@click.option(
    "--memory",
    default="512,2k,8k",
    show_default=True,
    help="Peak memory of steps of sequences so long, all of as many tokens as the longest; none: "
    "leave out.",
)
@click.option(
    "--processes",
    type=Within(COUNT),
    default=2,
    show_default=True,
    help="That train together, one core each; 1: leave out.",
)
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32")
@click.option(
    "--threads", type=Within(THREADS), help="Default: all cores that this process may use."
)
@click.option("--repeats", type=Within(COUNT), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/bench-training-MODEL.")
def training_command(
    model: str,
    length: str,
    memory: str,
    processes: int,
    precision: str,
    threads: int | None,
    repeats: int,
    out: Path | None,
) -> None:
    """Training steps on a CPU: time over the products alone, memory by length, processes.

    \b
    Examples:
      rwkvx bench training
      rwkvx bench training --precision bf16 --memory none --processes 1
    """
    from rwkvx_evals.bench.machine import available_cores
    from rwkvx_evals.bench.training import Settings, run
    from rwkvx_evals.lengths import parse_length, parse_lengths

    lengths = () if memory.strip().lower() in ("none", "") else parse_lengths(memory)
    count = available_cores() if threads is None else threads
    settings = Settings(model, parse_length(length), lengths, processes, precision, count, repeats)
    out = out or Path("runs") / f"bench-training-{Path(model).stem}"
    results = run(settings, out)
    step = results["step"]
    click.echo(
        f"{step['tokens_per_second']:,.0f} tokens/s, {step['ratio']['median']:.2f} times the "
        f"products alone\nreport: {out / 'report.md'}"
    )


@bench_command.command("kernels")
@click.option("--family", "families", multiple=True, help="Only these: see the examples.")
@click.option("--lengths", help="Tokens, such as 16k,128k; default: a plan of each family.")
@click.option(
    "--budget",
    type=Within(COUNT),
    default=420,
    show_default=True,
    help="Seconds. Cases come in order of importance; those that no longer fit are left out.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/bench-kernels"), show_default=True
)
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time others too.")
@click.option("--stage", help="Only time launch options: of this FAMILY, or FAMILY.STAGE.")
@click.option(
    "--variants",
    is_flag=False,
    flag_value="neighbours",
    help="Options to time beside the table's, ROWSxCOLUMNSxWARPSxSTAGES,...; default: neighbours.",
)
def kernels_command(
    families: tuple[str, ...],
    lengths: str | None,
    budget: int,
    out: Path,
    peers: bool,
    stage: str | None,
    variants: str | None,
) -> None:
    """Kernels and whole models on a GPU: ceilings, correctness, then times beside floors and peers.

    The machine's own copy and matrix product come first; everything is compared with float64
    before it is timed. Peers: torch's dense attention, a dense Transformer of the same size, and
    where they are installed fla-core and flash-attn; energy where nvidia-ml-py is. A case that
    fails or does not fit into memory is recorded, and the others go on. Writes results.json after
    each case, then report.md with the summary, and pictures. The exit status is not 0 if something
    was computed wrong.

    With --stage, a stage of a kernel family is timed with the launch options of its table and with
    others beside them (--lengths: one, default 128k); writes variants.json.

    \b
    Examples:
      rwkvx bench kernels
      rwkvx bench kernels --stage chunk_select --variants
      rwkvx bench kernels --stage chunk_attention.pairs --variants 128x128x8x2,64x128x4x3
      rwkvx bench kernels --out docs/results/kernels
      rwkvx bench kernels --family wkv7 --lengths 16k
      rwkvx bench kernels --family chunk_attention --family models --budget 200
    """
    from rwkvx_evals.bench.kernels.run import FAMILIES, run
    from rwkvx_evals.lengths import parse_lengths

    for family in families:
        if family not in FAMILIES:
            raise InputError(f"no kernels {family!r}: choose of {', '.join(FAMILIES)}")
    chosen = () if lengths is None else parse_lengths(lengths)
    if variants is not None and stage is None:
        raise InputError("--variants are of one --stage, such as chunk_select.flat")
    if stage is not None:
        _bench_variants(stage, variants, chosen, out)
        return
    names = families or tuple(FAMILIES)
    results = run(names, chosen, out, seconds=budget, say=click.echo, peers=peers)
    click.echo(f"report: {out / 'report.md'}   pictures: {out / '*.png'}")
    wrong = [row for row in results["cases"] if row["status"] == "wrong"]
    if wrong:
        raise InputError("computed wrong: " + ", ".join(sorted({r["family"] for r in wrong})))


def _bench_variants(stage: str, variants: str | None, lengths: tuple[int, ...], out: Path) -> None:
    from rwkvx_evals.bench.kernels.variants import TOKENS, parse, run

    others = None if variants in (None, "neighbours") else parse(variants)
    run(stage, others, out, lengths[0] if lengths else TOKENS, say=click.echo)
    click.echo(f"results: {out / 'variants.json'}")


def summary(results: Results) -> str:
    """A line per measurement for the terminal."""
    lines = []
    for entry in results.get("prefill", []):
        speed = entry["tokens_per_second"]["ours"]["median"]
        lines.append(f"prefill {entry['tokens']:>6}: {speed:>10,.1f} tokens/s{_ratios(entry)}")
    for entry in results.get("decode", []):
        speed = entry["tokens_per_second"]["ours"]["median"]
        lines.append(
            f"decode @{entry['after_tokens']:>6}: {speed:>10,.1f} tokens/s{_ratios(entry)}"
        )
    for row in results.get("long", {}).get("lengths", []):
        lines.append(
            f"long {row['tokens']:>9}: {1e3 * row['mean_seconds_per_token']:>10.3f} ms per token, "
            f"{row['ratio_to_shortest']['of_means']:.3f} of the shortest's"
        )
    if memory := results.get("memory"):
        lines.append(
            f"memory of reading {memory['tokens']:,} tokens: {memory['peak_bytes'] / 2**30:.2f} GiB"
        )
    return "\n".join(lines)


def _ratios(entry: dict[str, dict[str, dict[str, float]]]) -> str:
    return "".join(f", {name} {x['median']:.2f}" for name, x in entry["ratios"].items())
