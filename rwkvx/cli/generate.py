"""``rwkvx generate``: continue a prompt, printing as it goes."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from rwkvx.cli.options import Within, device_option, dtype_option, model_option, seed_option
from rwkvx.errors import InputError
from rwkvx.ranges import NEW_TOKENS, TEMPERATURE, TOP_P

__all__ = ["generate_command"]

PROMPT_BYTES = 256_000_000


@click.command("generate")
@click.argument("prompt")
@model_option
@click.option("--max-tokens", type=Within(NEW_TOKENS), default=100, show_default=True)
@click.option(
    "--temperature",
    type=Within(TEMPERATURE),
    default=1.0,
    show_default=True,
    help="0: most likely.",
)
@click.option("--top-p", type=Within(TOP_P), default=0.9, show_default=True)
@seed_option
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of an adapter of M.")
@device_option
@dtype_option
def generate_command(
    prompt: str,
    model: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    adapter: Path | None,
    device: str,
    dtype: str,
) -> None:
    """Print PROMPT and its continuation by a model. "-" reads the prompt from standard input.

    An empty prompt begins a document.

    \b
    Examples:
      rwkvx generate --model passkey-tiny "The grass is green." --max-tokens 40
      rwkvx generate --model passkey-tiny - --temperature 0 < prompt.txt
      rwkvx generate --model my-model --adapter runs/chat/chat-step-500 "Who are you?"
    """
    import rwkvx
    from rwkvx.progress import progress
    from rwkvx.sampling import generate
    from rwkvx.tokenizers.stream import prompt_ids, text_stream

    # Bytes all the way: a prompt that is no UTF-8 (a file, an odd argument) is read as it is.
    data = read_prompt() if prompt == "-" else os.fsencode(prompt)
    loaded = rwkvx.load(model, device=device, dtype=dtype, adapter=adapter)
    tokenizer = loaded.tokenizer
    ids = prompt_ids(tokenizer, data) or [tokenizer.eos_token_id]
    check_prompt(loaded, len(ids))
    with progress(len(ids), "prompt", quiet=len(ids) < SHOWN_TOKENS) as bar:
        tokens = generate(
            loaded,
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_ids=[tokenizer.eos_token_id],
            device=device,
            advance=bar.update,
        )
        texts = text_stream(tokenizer, data, tokens)
        click.echo(next(texts), nl=False)  # the prompt, before it is read
        try:
            for text in texts:
                bar.close()
                click.echo(text, nl=False)
        finally:  # also where it ends in an error, whose line is to stand alone
            click.echo()


SHOWN_TOKENS = 20_000  # a shorter prompt is read before a bar would help


def read_prompt() -> bytes:
    """Standard input to its end.

    Raises:
        InputError: it does not end.
    """
    data = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(data) > PROMPT_BYTES:
        raise InputError(f"the prompt on standard input has more than {PROMPT_BYTES:,} bytes")
    return data


def check_prompt(model: Any, tokens: int) -> None:
    """Refuse a prompt whose state this machine cannot hold, before hours of reading it."""
    from rwkvx.costs import state_memory
    from rwkvx.memory import check_room

    if (config := getattr(model, "config", None)) is not None and str(model.device) == "cpu":
        needed = sum(m.at(tokens) for m in state_memory(config, model.dtype.itemsize))
        check_room(needed, f"the state after a prompt of {tokens:,} tokens")
