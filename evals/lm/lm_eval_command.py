"""`rwkvx lm-eval`: lm-eval's own command line, which knows no models from outside, with ours."""

from __future__ import annotations

import sys

import click

from rwkvx.data.folder import data_folder


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--data", help="Folder with the tasks' data; default: RWKVX_DATA, else the hub.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval_command(data: str | None, arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command with everything it offers, and with the model `rwkvx`.

    ARGUMENTS go to lm-eval as they are: run, ls, validate and their options (run --help).

    \b
    --model_args of --model rwkvx:
      pretrained=NAME|PATH    what rwkvx loads
      dtype=float32           or bfloat16, float16, float64, int8
      max_length=N            refuse longer requests, or truncate=left|middle them
      chat_template=FILE      in place of the model's own
      chunk_size=, topk=, ... fields of the model's config

    \b
    Examples:
      rwkvx lm-eval run --model rwkvx --model_args pretrained=passkey-tiny --tasks piqa --limit 50
      rwkvx lm-eval --data FOLDER run --model hf --model_args pretrained=llama --tasks arc_easy
      rwkvx lm-eval ls tasks
    """
    folder = data_folder(data)
    from lm_eval.__main__ import cli_evaluate

    import rwkvx_evals.lm.model  # noqa: F401 (registers it)
    from rwkvx_evals.lm.harness import refusals_in_one_line
    from rwkvx_evals.lm.replace import replaced
    from rwkvx_evals.lm.tasks import local_data

    with (
        replaced(sys, "argv", ["lm-eval", *arguments]),
        local_data(folder),
        refusals_in_one_line(),
    ):
        cli_evaluate()
