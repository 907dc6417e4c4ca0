"""``rwkvx generate``: continue a prompt, printing as it goes."""

import os
import sys
from pathlib import Path

import click

__all__ = ["generate_command"]


@click.command("generate")
@click.argument("prompt")
@click.option(
    "--model", required=True, metavar="M", help="Shipped name, our own folder or a .pth file."
)
@click.option("--max-tokens", type=click.IntRange(0), default=100, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0: most likely.")
@click.option("--top-p", type=float, default=0.9, show_default=True)
@click.option("--seed", type=int, default=None, help="For the same continuation again.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of an adapter of MODEL.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
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

    \b
    Examples:
      rwkvx generate --model passkey-tiny "The grass is green." --max-tokens 40
      rwkvx generate --model passkey-tiny - --temperature 0 < prompt.txt
    """
    import rwkvx
    from rwkvx.sampling import generate
    from rwkvx.tokenizers.stream import prompt_ids, text_stream

    # Bytes all the way: a prompt that is no UTF-8 (a file, an odd argument) is read as it is.
    data = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    loaded = rwkvx.load(model, device=device, dtype=dtype)
    tokenizer, state = loaded.tokenizer, None
    if adapter is not None:
        from rwkvx.adapters import apply_adapter, starting_state

        apply_adapter(loaded, adapter)
        state = starting_state(loaded, 1)
    tokens = generate(
        loaded,
        prompt_ids(tokenizer, data) or [tokenizer.eos_token_id],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=[tokenizer.eos_token_id],
        device=device,
        state=state,
    )
    for text in text_stream(tokenizer, data, tokens):
        click.echo(text, nl=False)
    click.echo()
