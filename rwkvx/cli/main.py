"""The command group and how its errors look: one line, a non-zero exit status."""

import os
import sys
from collections.abc import Sequence

import click

from rwkvx import __version__
from rwkvx.cli.lazy import LazyGroup, explain_missing_module
from rwkvx.cli.process import keep_freed_memory, wait_briefly
from rwkvx.errors import InputError

__all__ = ["cli", "main"]

eval_group = LazyGroup(
    "eval",
    help="""Measure a model.

    \b
    Examples:
      rwkvx eval passkey --model passkey-tiny --lengths 1k,4k,16k --depths 10 --seeds 5
      rwkvx eval lm --model passkey-tiny --tasks lambada_openai,piqa
      rwkvx eval long --model passkey-tiny --tasks passkey,niah_single_1 --lengths 1k,4k
      rwkvx eval compare runs/long-A runs/long-B --out runs/a-b
    """,
    lazy={
        "passkey": (
            "rwkvx_evals.passkey.command:passkey_command",
            "Find a hidden number by context length and depth.",
        ),
        "lm": ("rwkvx_evals.lm.command:lm_command", "Run lm-eval's own tasks."),
        "long": (
            "rwkvx_evals.long.command:long_command",
            "Long-context tasks of exact lengths, for any model.",
        ),
        "compare": (
            "rwkvx_evals.compare.command:compare_command",
            "Finished runs of eval long, sample by sample.",
        ),
    },
)

cli = LazyGroup(
    "rwkvx",
    help="""RWKV-7 blocks with top-k sparse attention blocks: train, measure, generate.

    \b
    Examples:
      rwkvx demo
      rwkvx generate --model passkey-tiny "Once upon a time"
      rwkvx eval passkey --model passkey-tiny --lengths 1k,4k

    Every command explains itself with --help. RWKVX_DEBUG=1 shows full tracebacks; RWKVX_DATA
    names the folder with evaluation data.
    """,
    lazy={
        "demo": (
            "rwkvx.cli.demo:demo_command",
            "The main job, on the shipped model.",
        ),
        "train": ("rwkvx.training.command:train_command", "Train a model from a YAML file."),
        "eval": (eval_group, "Measure a model: passkey retrieval, lm-eval tasks."),
        "generate": ("rwkvx.cli.generate:generate_command", "Continue a prompt."),
        "convert": ("rwkvx.cli.convert:convert_command", "Checkpoints in other formats."),
        "bench": ("rwkvx_evals.bench.command:bench_command", "Measure speed on this machine."),
        "info": ("rwkvx.cli.info:info_command", "Show what a model is made of."),
    },
)
click.version_option(__version__, prog_name="rwkvx")(cli)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 (bad input), 2 (bad usage) or 130 (interrupted).

    Whatever the user can mend ends in one line ``error: ...`` on standard error; anything else
    is a bug and keeps its traceback. ``RWKVX_DEBUG=1`` keeps every traceback.
    """
    keep_freed_memory()
    wait_briefly()
    if os.environ.get("RWKVX_DEBUG") == "1":
        sys.exit(cli.main(args=args, prog_name="rwkvx", standalone_mode=False))
    try:
        status = cli.main(args=args, prog_name="rwkvx", standalone_mode=False)
    except click.Abort:
        _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "rwkvx"
        _fail(f"{error.format_message()} (see: {path} --help)", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except ModuleNotFoundError as error:
        _fail(str(explain_missing_module(error)), 1)
    except InputError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(_os_error(error), 1)
    # In this mode click returns what the command returned, and the status of an early exit.
    sys.exit(status if isinstance(status, int) else 0)


def _os_error(error: OSError) -> str:
    """`error` without its number: what went wrong, with which file."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {text}" if error.filename is not None else text


def _fail(message: str, status: int) -> None:
    """Print `message` as one line on standard error and exit."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)
