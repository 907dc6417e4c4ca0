"""``rwkvx tokenize``: text into a file of tokens that every run maps into memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import click

from rwkvx.cli.options import Within
from rwkvx.errors import InputError
from rwkvx.ranges import COUNT, Whole

__all__ = ["tokenize_command"]


@click.command("tokenize")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--tokenizer",
    "name",
    required=True,
    metavar="T",
    help='"world", "bytes", or a folder with tokenizer.json.',
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option(
    "--train-bpe",
    type=Within(Whole(257, 1 << 20)),
    metavar="SIZE",
    help="Train a byte-level BPE of SIZE ids on the text first and write it into the folder T.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the text, at its end, that is kept from training and from --train-bpe.",
)
@click.option("--unwrap", is_flag=True, help="Join the lines of paragraphs wrapped by a width.")
@click.option("--data", help="Folder of text data (default: the variable RWKVX_DATA).")
@click.option("--processes", type=Within(COUNT), help="Default: one for each core.")
def tokenize_command(
    sources: tuple[str, ...],
    name: str,
    out: Path,
    train_bpe: int | None,
    held_out: float,
    unwrap: bool,
    data: str | None,
    processes: int | None,
) -> None:
    """Write the tokens of text files: .txt, .jsonl with a "text" field, .tar of .txt; also .xz.

    The file names its tokenizer and is refused with any other.

    \b
    Examples:
      rwkvx tokenize book.txt more.jsonl.xz --tokenizer world --out text.tokens
      rwkvx tokenize books.tar.xz --train-bpe 8192 --tokenizer bpe --held-out 0.02 --out b.tokens
    """
    from rwkvx.data.documents import find_files, held_out_tail, read_documents
    from rwkvx.data.tokens import write_tokens
    from rwkvx.tokenizers import get_tokenizer
    from rwkvx.tokenizers.file import save_tokenizer
    from rwkvx.tokenizers.file import train_bpe as train

    if train_bpe is not None and Path(name).exists():
        raise InputError(f"{name} exists already: a trained tokenizer goes into a new folder")
    paths = find_files(sources, data)
    sizes = [len(text) for text in read_documents(paths, unwrap)]

    def documents(title: str) -> Iterator[tuple[str, bool]]:
        texts = held_out_tail(read_documents(paths, unwrap), sizes, held_out)
        return _progress(texts, sizes, title)

    if train_bpe is None:
        tokenizer = get_tokenizer(name)
    else:
        tokenizer = train((text for text, held in documents("read") if not held), train_bpe)
        save_tokenizer(tokenizer, Path(name))
    cores = len(os.sched_getaffinity(0))
    about = {"sources": ", ".join(p.name for p in paths), "tokenizer_name": name}
    made = write_tokens(out, documents("tokenise"), tokenizer, processes or cores, **about)
    click.echo(
        f"{out}: {len(made.tokens):,} tokens of {len(made.documents) - 1:,} documents, "
        f"{len(made.tokens) - made.training:,} of them held out, {made.tokens.dtype}"
    )


def _progress(
    documents: Iterator[tuple[str, bool]], sizes: list[int], title: str
) -> Iterator[tuple[str, bool]]:
    from rwkvx.progress import progress

    with progress(sum(sizes), title, "char") as bar:
        for text, held in documents:
            yield text, held
            bar.update(len(text))
