"""The command group: quick help, and errors as one line with a non-zero exit status."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import rwkvx
from rwkvx.cli import cli, main
from rwkvx.cli.lazy import LazyGroup, explain_missing_module
from rwkvx.errors import InputError
from rwkvx.files import replacing


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """["demo"], ["eval"], ["eval", "passkey"], ..."""
    context = click.Context(group)
    for name in group.list_commands(context):
        yield [*path, name]
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


def run(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    monkeypatch.delenv("RWKVX_DEBUG", raising=False)
    with pytest.raises(SystemExit) as status:
        main(args)
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def failing(error: Exception) -> click.Command:
    @click.command("fails")
    def fails() -> None:
        raise error

    return fails


def test_help_is_quick() -> None:
    """Help of the groups imports nothing heavy, and none of the commands."""
    code = (
        "import sys\n"
        "from rwkvx.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: status = e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lm_eval'} & set(sys.modules)\n"
        "heavy |= {m for m in sys.modules if m.startswith('rwkvx_')}\n"
        "assert not heavy and not status, (heavy, status)\n"
    )
    for args in (["--help"], ["eval", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)


def test_all_commands_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(["--help"], capsys, monkeypatch)
    assert status == 0
    assert isinstance(cli, LazyGroup)
    for name, text in ((n, t) for n, (_, t) in cli.lazy.items()):
        assert f"  {name} " in out
        assert text.split()[0] in out


def test_every_help_has_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = list(every_command(cli))
    assert ["eval", "passkey"] in commands
    for command in commands:
        status, out, err = run([*command, "--help"], capsys, monkeypatch)
        assert status == 0, err
        assert f"rwkvx {' '.join(command)}" in out.partition("Example")[2], command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("length 10 is too short"), 1, "length 10 is too short"),
        (InputError("two\n  lines"), 1, "two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.yaml"), 1, "a.yaml: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (click.ClickException("of click"), 1, "of click"),
        (click.BadParameter("odd"), 2, "Invalid value: odd (see: rwkvx fails --help)"),
        (click.Abort(), 130, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError("No module", name="matplotlib.pyplot"),
            1,
            "this needs the package matplotlib, which is missing: pip install 'rwkvx[eval]'",
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_errors_are_one_line(
    error: Exception,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cli.lazy, "fails", (failing(error), "fails"))
    code, out, err = run(["fails"], capsys, monkeypatch)
    # click first ends the line that ^C on a terminal may have left open.
    assert (code, out, err.lstrip("\n")) == (status, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
@pytest.mark.parametrize("name", ["train", "eval", "demo", "generate"])
def test_signals_end_in_a_line_that_says_how_to_go_on(
    name: str,
    number: int,
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what was half written is removed; the handlers of before are back."""

    @click.command()
    def command() -> None:
        with replacing(tmp_path / "a"):
            signal.raise_signal(number)

    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    outer = signal.signal(number, before)  # it is ignored by what runs in the background of a shell
    monkeypatch.setitem(cli.lazy, name, (command, ""))
    code, _, err = run([name], capsys, monkeypatch)
    advice = "" if name == "generate" else ": give the same command again to go on from there"
    assert (code, err.lstrip("\n")) == (status, f"error: {words}{advice}\n")
    assert not list(tmp_path.iterdir())
    assert signal.signal(number, outer) is before


def started(*args: str, **options: Any) -> tuple[int, str]:
    """Status and standard error of the command line in a process of its own."""
    code = "import sys; from rwkvx.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=environment, text=True, stderr=subprocess.PIPE, **options)
    return done.returncode, done.stderr


def test_the_package_runs_as_a_module() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "rwkvx", "--version"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == f"rwkvx, version {rwkvx.__version__}"


def test_where_nobody_reads_what_is_printed() -> None:
    """As with `| head`: silence."""
    read, write = os.pipe()
    os.close(read)
    assert started("--help", stdout=write) == (1, "")
    os.close(write)


def test_where_standard_output_is_full_or_closed() -> None:
    with open("/dev/full", "w") as full:
        assert started("--help", stdout=full) == (1, "error: No space left on device\n")
    assert started("--help", preexec_fn=lambda: os.close(1)) == (0, "")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_standard_output_cannot_show(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        click.echo(os.fsdecode(b"m\xff\xe9") + " é 今")

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setitem(cli.lazy, "says", (command, ""))
    with pytest.raises(SystemExit) as status:
        main(["says"])
    assert status.value.code == 0
    assert stream.buffer.getvalue().startswith(b"m\\udcff\\udce9 ")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce] not enough memory: you tried to allocate 9 EB")],
)
def test_memory_that_runs_out_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.lazy, "fails", (failing(error), "fails"))
    status, _, err = run(["fails"], capsys, monkeypatch)
    assert status == 1
    assert err.startswith("error: out of memory")
    assert err.count("\n") == 1


def test_no_line_is_long_or_odd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("x" * 9999, "\x1b[31mred\x07", "a\ud800b", "\u202eabc"):
        for error in (InputError(text), OSError(5, text), click.UsageError(text)):
            monkeypatch.setitem(cli.lazy, "fails", (failing(error), "fails"))
            _, _, err = run(["fails"], capsys, monkeypatch)
            assert len(err) <= 301
            assert err[:-1].isprintable()


def test_what_the_package_offers_is_listed() -> None:
    assert {"load", "Model", "InputError", "__version__"} <= set(dir(rwkvx))
    assert set(rwkvx.__all__) <= set(dir(rwkvx))
    assert all(getattr(rwkvx, name) for name in rwkvx.__all__)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RWKVX_DEBUG", raising=False)
    monkeypatch.setitem(cli.lazy, "fails", (failing(RuntimeError("a bug")), "fails"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fails"])


def test_debug_keeps_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKVX_DEBUG", "1")
    monkeypatch.setitem(cli.lazy, "fails", (failing(InputError("mine")), "fails"))
    with pytest.raises(InputError, match="mine"):
        main(["fails"])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nonsense"], "error: No such command 'nonsense'"),
        (["generate", "--model"], "error: Option '--model' requires an argument"),
        (["generate", "x", "--model", "m", "--top", "1"], "error: No such option"),
    ],
)
def test_bad_usage(
    args: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, err = run(args, capsys, monkeypatch)
    assert (status, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert "--help)" in err


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("lm_eval.api", "pip install 'rwkvx[eval]'"),
        ("tensorboard", "pip install 'rwkvx[train]'"),
        ("somelib.part", "pip install somelib"),
        ("rwkvx_evals.nothing", "this installation of rwkvx has no module rwkvx_evals.nothing"),
    ],
)
def test_missing_modules_are_explained(module: str, advice: str) -> None:
    assert advice in str(explain_missing_module(ModuleNotFoundError("no", name=module)))
