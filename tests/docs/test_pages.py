"""Everything a page shows holds: blocks run or parse, links lead somewhere, names are there.

Each page's blocks run in order, in one folder of their own, except the commands listed here.
"""

import ast
import json
import re
from pathlib import Path

import click
import pages
import pytest
import torch
import yaml
from pages import ELSEWHERE, PAGES, ROOT, Command, blocks, commands, parse, run, title

# Starts of commands that are parsed but not run, and why.
PARSED = {
    "rwkvx demo": "minutes: the main job",
    "rwkvx eval lm": "minutes, and data that is not part of the package",
    "rwkvx lm-eval": "minutes, and data that is not part of the package",
    "rwkvx eval passkey --model passkey-tiny --lengths 1k": "minutes",
    "rwkvx eval long": "minutes, and books that are not part of the package",
    "rwkvx eval compare": "of runs that take minutes",
    "lm_eval": "minutes, and data that is not part of the package",
    "rwkvx check": "minutes where Triton's interpreter is one of the implementations",
    "rwkvx convert rwkv7-g1-0.1b.pth": "a file of the reader's",
    "rwkvx tokenize books.tar.xz": "books of the reader's",
    "rwkvx tokenize books_public_domain": "books that are not part of the package",
    "rwkvx train rwkvx_nano": "hours, and the tokens made before",
    "rwkvx ship": "minutes, and data that is not part of the package",
    "rwkvx bench": "minutes, and nothing else should run meanwhile",
    "rwkvx train passkey_tiny --data": "25 minutes",
    "torchrun": "several devices",
    "bash scripts": "they install, and run these tests",
    "python scripts": "test_reference.py runs it",
    **ELSEWHERE,
}
GPU_PAGES = {"docs/gpu.md"}  # all their blocks need one
# A word that stands for something of the reader's own, such as MODEL or pretrained=MODEL.
PLACEHOLDER = re.compile(r"(^|[=/])[A-Z][A-Z_-]+($|/)")


def is_run(command: Command) -> bool:
    if command.words[0] == "cat":
        return True
    listed = any(str(command).startswith(start) for start in PARSED)
    return not listed and not any(map(PLACEHOLDER.search, command.words))


def check_block(block: pages.Block, where: str, on_gpu: bool, names: dict[str, object]) -> None:
    """Run a block, or parse what is not run."""
    assert block.language in pages.LANGUAGES, f"{where}: a block of {block.language!r}"
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.text, where, "exec")
        if not on_gpu:
            exec(code, names)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "sh":
        for command in commands(block.text):
            if on_gpu or not is_run(command):
                parse(command)
            else:
                run(command)


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_blocks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RWKVX_DATA", raising=False)
    threads, names = torch.get_num_threads(), dict[str, object]()
    try:
        for block in blocks(path.read_text(encoding="utf-8")):
            on_gpu = title(path) in GPU_PAGES
            check_block(block, f"{title(path)}:{block.line}", on_gpu, names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_links_and_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not list(pages.broken_links(path, text))
    assert not list(pages.stale_names(text))


@pytest.mark.parametrize("index", ["docs/README.md", "docs/results/README.md"])
def test_the_index_leads_to_every_page(index: str) -> None:
    path = ROOT / index
    there = {
        (path.parent / link.partition("#")[0]).resolve()
        for link in pages.links(path.read_text(encoding="utf-8"))
    }
    wanted = {p.resolve() for p in path.parent.glob("*.md")} - {path}
    if path.parent.name == "results":
        wanted |= set(path.parent.glob("**/report.md"))
    assert not wanted - there


def test_the_first_page_is_short_and_its_figures_are_in_the_reports() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    rows = re.findall(r"^\| .* \| (.+) \| \[report\]\((docs/results/\S+)\) \|$", text, re.MULTILINE)
    assert 5 <= len(rows) <= 10
    number = re.compile(r"\d[\d.,]*\d|\d")
    for figure, report in rows:
        there = set(number.findall((ROOT / report).read_text(encoding="utf-8")))
        assert set(number.findall(figure)) <= there, f"{figure} is not in {report}"


def test_every_shipped_model_has_a_card() -> None:
    configs = list((ROOT / "rwkvx/models").glob("*/config.json"))
    assert configs
    for config in configs:
        card = config.with_name("README.md").read_text(encoding="utf-8")
        assert card.startswith("---\n")
        assert {"use", "data", "recipe", "scores", "limits"} <= pages.anchors(card), config


@pytest.mark.parametrize(
    "text",
    [
        "rwkvx train passkey_tiny --no-such-field 1",
        "rwkvx train passkey_tiny --data.no_such 1",
        "rwkvx eval passkey --model MODEL --dephts 3",
        "rwkvx eval passkey --model MODEL --seeds many",
        "rwkvx no-such-command",
        "rwkvx bench cpu --threads 0",
        "bash scripts/no_such.sh",
        "frobnicate --all",
    ],
)
def test_a_wrong_command_is_seen(text: str) -> None:
    (command,) = commands(text)
    with pytest.raises((AssertionError, click.UsageError)):
        parse(command)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](no_such.md)", 1),
        ("[a](README.md#no-such-heading)", 1),
        ("![a](docs/no_such.png)", 1),
        ("[a](../outside.md)", 1),
        ("[a](README.md) `[b](no_such.md)` [c](https://example.org)", 0),
        ("# One *heading*\n[a](#one-heading)", 0),
    ],
)
def test_a_broken_link_is_seen(text: str, found: int) -> None:
    assert len(list(pages.broken_links(ROOT / "README.md", text))) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`rwkvx/no_such.py`", 1),
        ("`rwkvx.no_such.thing`", 1),
        ("`rwkvx.sampling.no_such`", 1),
        ("`rwkvx/model.py`, `rwkvx.load`, `rwkvx_kernels.wkv7.wkv7`, `scripts/demo.sh`", 0),
    ],
)
def test_a_stale_name_is_seen(text: str, found: int) -> None:
    assert len(list(pages.stale_names(text))) == found


def test_commands_of_a_block() -> None:
    text = "rwkvx info \\\n  'a b'  # why\n\ncat > x.yaml <<'END'\na: 1\n\nEND\nrwkvx demo\n"
    assert commands(text) == [
        Command(("rwkvx", "info", "a b")),
        Command(("cat", "x.yaml"), "a: 1\n\n"),
        Command(("rwkvx", "demo")),
    ]
    with pytest.raises(ValueError, match="no end"):
        blocks("```sh\nrwkvx demo\n")


def test_every_axis_letter_is_in_the_glossary() -> None:
    """Legends on top of modules name no letter that the glossary's table lacks."""
    table = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition("## Axis letters")[2]
    known = set("".join(re.findall(r"^\| ([A-Z](?:, [A-Z])*) \|", table, re.MULTILINE)))
    used = {}
    for path in (
        p for folder in ("kernels", "rwkvx", "evals") for p in (ROOT / folder).rglob("*.py")
    ):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if legend := re.search(
            r"\bAx(?:es|is suffixes)\b[^:;]*[:;] (.*?)(\.\s|\.$|$)", text, re.DOTALL
        ):
            words = " ".join(legend[1].split())
            used |= dict.fromkeys(re.findall(r"(?:^|[,;] )([A-Z]) ", words), title(path))
    assert len(used) > 10
    assert not {letter: path for letter, path in used.items() if letter not in known}
