"""The command group and how its errors look: one line, a non-zero exit status."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from rwkvx import __version__
from rwkvx.cli.lazy import LazyGroup, explain_missing_module
from rwkvx.cli.process import keep_freed_memory, wait_briefly
from rwkvx.cli.stop import StoppedError, advice, flush_output, is_broken_pipe, stoppable
from rwkvx.errors import LONGEST_LINE, InputError, is_out_of_memory, one_line
from rwkvx.progress import compilation_told

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
            "The main job, on the shipped models.",
        ),
        "train": ("rwkvx.training.command:train_command", "Train a model from a YAML file."),
        "tokenize": (
            "rwkvx.cli.tokenize:tokenize_command",
            "Text into a file of tokens for training.",
        ),
        "eval": (eval_group, "Measure a model: passkey retrieval, lm-eval tasks."),
        "lm-eval": (
            "rwkvx_evals.lm.lm_eval_command:lm_eval_command",
            "lm-eval's own command, with the model rwkvx.",
        ),
        "generate": ("rwkvx.cli.generate:generate_command", "Continue a prompt."),
        "convert": ("rwkvx.cli.convert:convert_command", "Checkpoints in other formats."),
        "ship": (
            "rwkvx_evals.text.ship:ship_command",
            "A trained model in bfloat16, measured, with its card.",
        ),
        "variants": (
            "rwkvx_evals.variants.command:variants_command",
            "Train four architectures alike and compare them.",
        ),
        "bench": ("rwkvx_evals.bench.command:bench_command", "Measure speed on this machine."),
        "info": ("rwkvx.cli.info:info_command", "Show what a model is made of."),
        "check": ("rwkvx.cli.check:check_command", "Compare all ways of running a model."),
    },
)
click.version_option(__version__, prog_name="rwkvx")(cli)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 (bad input), 2 (bad usage), 128 + a signal's number.

    Whatever the user can mend ends in one line ``error: ...`` on standard error; anything else
    is a bug and keeps its traceback. ``RWKVX_DEBUG=1`` keeps every traceback.
    """
    keep_freed_memory()
    wait_briefly()
    args = sys.argv[1:] if args is None else list(args)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be bytes of any kind
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RWKVX_DEBUG") == "1":
        sys.exit(cli.main(args=args, prog_name="rwkvx", standalone_mode=False))
    try:
        with stoppable(), compilation_told():
            status = cli.main(args=args, prog_name="rwkvx", standalone_mode=False)
            flush_output()
    except (click.Abort, KeyboardInterrupt):
        _fail(f"interrupted{advice(args)}", 130)
    except StoppedError as error:
        _fail(f"stopped by {error}{advice(args)}", error.status)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "rwkvx"
        _fail(one_line(error.format_message(), USAGE_LINE) + f" (see: {path} --help)", 2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except ModuleNotFoundError as error:
        _fail(str(explain_missing_module(error)), 1)
    except InputError as error:
        _fail(str(error), 1)
    except OSError as error:
        if is_broken_pipe(error):
            sys.exit(1)
        _fail(_os_error(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(f"out of memory: {error}", 1)
    # In this mode click returns what the command returned, and the status of an early exit.
    sys.exit(status if isinstance(status, int) else 0)


USAGE_LINE = 220  # characters, so that the way to the help fits beside it


def _os_error(error: OSError) -> str:
    """`error` without its number: what went wrong, with which file."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {text}" if error.filename is not None else text


def _fail(message: str, status: int) -> None:
    """Print `message` as one line on standard error and exit."""
    with suppress(OSError, ValueError):  # nobody reads it, or standard error is closed
        flush_output()
    with suppress(OSError, ValueError):
        click.echo(f"error: {one_line(message, LONGEST_LINE - len('error: '))}", err=True)
    sys.exit(status)
