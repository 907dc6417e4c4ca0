"""Markdown pages taken apart: blocks, commands, links; and commands run, or parsed like the real.

What a shell block may hold: commands of one line (continued by a backslash), comments, and files
written by ``cat > NAME <<'END'``.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from rwkvx.cli import cli, main
from rwkvx.data.sources import KINDS
from rwkvx.training.config import StageConfig, field_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "kernels/*/README.md", "rwkvx/models/*/README.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = {"python", "sh", "text", "yaml", "json"}
FENCE = re.compile(r"^```(.*)$")
LINK = re.compile(r"\]\(([^()\s]+)\)")


class Block(NamedTuple):
    """A fenced block; `line` is the one that its text starts in."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A line of a shell block, cut into words, and the file that follows it."""

    words: tuple[str, ...]
    body: str = ""

    def __str__(self) -> str:
        return shlex.join(self.words)


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found, opened, lines = [], "", list[str]()
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        if not (fence := FENCE.match(line)):
            lines.append(line)
        elif start:
            found.append(Block(opened, "\n".join(lines) + "\n", start))
            start = 0
        else:
            opened, start = fence[1].strip(), number + 1
            lines.clear()
    if start:
        raise ValueError(f"the block of line {start - 1} has no end")
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    out, inside = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            out.append(line)
    return "\n".join(out)


def commands(text: str) -> list[Command]:
    """The commands of a shell block."""
    found, lines = [], text.replace("\\\n", " ").splitlines()
    while lines:
        line = lines.pop(0)
        if here := re.fullmatch(r"cat > (\S+) <<'(\w+)'", line):
            end = lines.index(here[2])
            found.append(Command(("cat", here[1]), "".join(f"{x}\n" for x in lines[:end])))
            del lines[: end + 1]
        elif words := shlex.split(line, comments=True):
            found.append(Command(tuple(words)))
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures that are no addresses."""
    bare = re.sub(r"`[^`\n]*`", "", prose(text))
    return [x for x in LINK.findall(bare) if not re.match(r"\w+:", x)]


def anchors(text: str) -> set[str]:
    """What a heading is called in a link: lower case, hyphens for spaces, no punctuation."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", head) for head in heads)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}


def broken_links(path: Path, text: str) -> Iterator[str]:
    """Links of a page that lead nowhere."""
    for link in links(text):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.is_relative_to(ROOT) or not target.exists():
            yield f"{link}: no such file"
        elif anchor:
            there = text if target == path else target.read_text(encoding="utf-8")
            if anchor not in anchors(there):
                yield f"{link}: no such heading"


def stale_names(text: str) -> Iterator[str]:
    """Files and dotted names of ours in backticks that are not there."""
    for word in re.findall(r"`([\w./-]+)`", prose(text)):
        if re.match(r"(rwkvx|kernels|evals|configs|scripts|tests|docs)/", word):
            if not (ROOT / word).exists():
                yield word
        elif re.fullmatch(r"rwkvx(_kernels|_evals|_configs)?(\.\w+)+", word) and not _is_there(
            word
        ):
            yield word


def _is_there(name: str) -> bool:
    if (ROOT / name).suffix == ".json":  # a file's name
        return True
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


# Commands

# First words of commands that are not ours; what they do is not for these tests.
ELSEWHERE = {
    "git": "needs the network",
    "hf": "downloads from the hub",
    "cd": "where the checkout is",
    "lm_eval": "lm-eval's own command",
}


def parse(command: Command) -> None:
    """Check a command without running it: its name, its options and what they may be.

    Raises:
        AssertionError, click.UsageError: it would be refused.
    """
    words = list(command.words)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "torchrun":  # torchrun ... -m rwkvx ...
        words = words[words.index("rwkvx") :]
    if words[0] == "rwkvx":
        _parse_ours(words[1:])
    elif words[0] in ("bash", "python") and len(words) > 1:
        assert (ROOT / words[1]).is_file(), f"{command}: no such file"
    else:
        assert words[0] in ELSEWHERE, f"{command}: neither ours nor known"


def _parse_ours(words: list[str]) -> None:
    context = cli.make_context("rwkvx", words)
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    if context.command.name == "train":
        _check_fields(context.args)
    if context.command.name == "lm-eval":
        from lm_eval._cli.harness import HarnessCLI

        HarnessCLI()._parser.parse_args(list(context.params["arguments"]))


def _check_fields(words: Sequence[str]) -> None:
    """That `rwkvx train` knows the fields; of lists and of data, by the last part of the name."""
    inner = {*StageConfig.__dataclass_fields__, "kind", "weight"}
    inner |= {name for kind in KINDS.values() for name in kind.__dataclass_fields__}
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            first, _, last = name.partition(".")
            nested = first in ("data", "stages") and last.rpartition(".")[2] in inner
            assert name in field_names() or nested, f"no field {name}"


def run(command: Command) -> None:
    """Run a command in this process; files of a `cat` are written.

    Raises:
        AssertionError: its status is not 0.
    """
    if command.words[0] == "cat":
        Path(command.words[1]).write_text(command.body)
        return
    assert command.words[0] == "rwkvx", f"{command} is no command of ours"
    with pytest.raises(SystemExit) as ended:
        main(command.words[1:])
    assert ended.value.code == 0, f"{command} ended with status {ended.value.code}"
