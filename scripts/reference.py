#!/usr/bin/env python3
"""Write docs/config.md and docs/api.md from the docstrings and annotations of the code.

    python scripts/reference.py            write both pages
    python scripts/reference.py --check    fail if they are not what would be written

Every field of every configuration class needs a description in its docstring, every public name
of the API a docstring: what has none is an error.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from rwkvx.config import ModelConfig
from rwkvx.data.sources import KINDS, Data, Part
from rwkvx.kinds import options
from rwkvx.ranges import ranges_of
from rwkvx.training.config import StageConfig, TrainConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
GENERATED = "<!-- Made by scripts/reference.py from the docstrings; do not edit. -->\n"
SECTION_NAMES = ("Args", "Attributes", "Returns", "Yields", "Raises")

CONFIG_INTRO = """# Every configuration field

A run is a YAML file. `rwkvx train CONFIG` takes a file or the name of a shipped one
([configs/](../configs)). Every field can also be set on the command line by its dotted name, with a
value in YAML syntax, where it overrides the file:

```sh
rwkvx train passkey_tiny --seed 1 --optimizer.lr 1e-3 --stages.0.steps 100 --show-config
```

`--show-config` prints the run with every field spelled out and trains nothing; without CONFIG, one
to begin from (`rwkvx train --show-config > my.yaml`), where what must be given is marked. A value
outside its range is refused by name before anything is read. Fields without a default must be
given. `null` is what the descriptions call None.
"""

API_INTRO = """# Python API

What `import rwkvx` offers comes first, then the modules around it, then the kernels, which are
plain functions on tensors and need no model. Shapes are written `[B, T, C]`: the letters are those
of the [glossary](glossary.md#axis-letters). Errors that a user can mend are `rwkvx.InputError`,
with one line of text.
"""

# Headings of the API page: a module, and which of its names (None: all of `__all__`).
API: dict[str, tuple[str, tuple[str, ...]]] = {
    "rwkvx": (
        "Models and states",
        (
            "load", "Model", "ModelConfig", "hybrid_pattern", "init_weights", "ModelState",
            "select_state", "repeat_state", "explain", "InputError",
        ),
    ),
    "rwkvx.sampling": ("Generation", ("generate", "pick_token")),
    "rwkvx.checkpoint.folder": ("Saving", ("save_folder",)),
    "rwkvx.check": ("Checking", ("check",)),
    "rwkvx.tokenizers": ("Tokenizers", ("get_tokenizer",)),
    "rwkvx.hf": ("Hugging Face", ("RwkvxForCausalLM", "RwkvxConfig", "StateCache")),
    "rwkvx_kernels.wkv7": ("Kernels: WKV7", ("wkv7",)),
    "rwkvx_kernels.chunk_attention": (
        "Kernels: chunk attention",
        ("chunk_attention", "attend_chunks", "cached_chunk_attention", "KeyValueCache"),
    ),
    "rwkvx_kernels.chunk_select": ("Kernels: chunk selection", ("select_chunks", "chunk_means")),
    "rwkvx_kernels.time_mix": ("Kernels: time mix", ("time_mix",)),
    "rwkvx_kernels.token_shift": ("Kernels: token shift", ("token_shift",)),
    "rwkvx_kernels.channel_mix": ("Kernels: channel mix", ("squared_relu",)),
    "rwkvx_kernels.linear": ("Kernels: products", ("linear", "low_rank", "linear_cross_entropy")),
}  # fmt: skip
METHODS = {  # of classes that users call
    "Model": ("forward", "fresh_state", "set_topk", "fingerprint", "tokenizer", "impl"),
    "ModelConfig": ("to_dict", "from_dict"),
    "ModelState": ("rows", "recurrent"),
    "RwkvxForCausalLM": ("forward", "save_pretrained"),
    "KeyValueCache": (),
}


# Docstrings


def parts_of(text: str) -> dict[str, str]:
    """A Google docstring by section: "" for what stands before the first."""
    found, name = {"": ""}, ""
    for line in inspect.cleandoc(text).splitlines():
        head = line.removesuffix(":")
        if line.endswith(":") and head in SECTION_NAMES:
            name = head
            found[name] = ""
        else:
            found[name] += line + "\n"
    return {name: inspect.cleandoc(text) for name, text in found.items()}


def described(text: str, names: list[str]) -> dict[str, str]:
    """Of "a, b: what. c: what", the description by name; names that are not there are left out."""
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    head = re.compile(rf"(?:^|\n\s*|(?<=[.;,]) (?:and )?)((?:{name})(?:, (?:{name}))*): ")
    marks, found = list(head.finditer(text)), dict[str, str]()
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        end = after.start() if after else len(text)
        words = " ".join(text[mark.end() : end].split()).rstrip(";,")
        found |= dict.fromkeys(mark[1].split(", "), words)
    return found


def markdown(text: str) -> str:
    """A docstring as Markdown: sections as lists, an indented example after "::" as a block."""
    out = []
    for section, body in parts_of(text).items():
        if not section:
            out.append(_paragraphs(body))
            continue
        lines = re.sub(r"\n[ ]{2,}", " ", body)  # a continued entry
        if section == "Returns":
            out.append(f"**Returns** {' '.join(body.split())}")
        else:
            out.append(f"**{section}**\n\n" + "\n".join(f"- {_entry(x)}" for x in _rows(lines)))
    return "\n\n".join(x for x in out if x)


def _rows(text: str) -> Iterator[str]:
    """Entries of a section: lines that do not go on from the one before."""
    row = ""
    for line in text.splitlines():
        if row and not re.match(r"[\w*, ]+: ", line):
            row += f" {line}"
        else:
            if row:
                yield row
            row = line
    if row:
        yield row


def _entry(row: str) -> str:
    names, colon, words = row.partition(": ")
    return f"`{names}`: {words}" if colon and re.fullmatch(r"[\w.*, ]+", names) else row


def _paragraphs(text: str) -> str:
    """Plain text, whose indented parts are code."""
    out = []
    for part in re.split(r"\n\n", text.strip("\n")):
        if all(line.startswith("    ") for line in part.splitlines()):
            out.append(f"```text\n{inspect.cleandoc(part)}\n```")
        else:
            out.append(part.replace("``", "`").replace("::", ":"))
    return "\n\n".join(out)


# Configuration


def config_page() -> str:
    """docs/config.md.

    Raises:
        SystemExit: a field that the docstring of its class does not describe.
    """
    sections = [
        ("The run", _class(TrainConfig)),
        ("model", _class(ModelConfig, extra=_option_rows(), without=("options",))),
        ("stages", "A list; stages run one after the other.\n\n" + _class(StageConfig)),
    ]
    for f in fields(TrainConfig):
        kind = _plain_hint(TrainConfig, f.name)
        if is_dataclass(kind) and kind not in (ModelConfig, Data):
            sections.append((f.name, _class(kind)))
    sections.append(("data", DATA_INTRO + _class(Part, without=("options",))))
    sections += [(f"data, kind: {name}", _class(kind)) for name, kind in KINDS.items()]
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections)
    return f"{GENERATED}{CONFIG_INTRO}\n{text}\n"


DATA_INTRO = """One source, `data: {kind: ..., ...}`, or a list of them, each with a weight. The
fields of a source depend on its kind and stand beside `kind`.

"""


def _class(kind: type, extra: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> str:
    """What a dataclass is, and the table of its fields."""
    parts = parts_of(kind.__doc__ or "")
    names = [f.name for f in fields(kind)]
    text = parts.get("Attributes", "") or parts[""]
    words, rows = described(text, names), list[str]()
    for f in fields(kind):
        if f.name in without:
            continue
        if f.name not in words:
            raise SystemExit(f"the docstring of {kind.__name__} does not describe {f.name}")
        default = f.default if f.default_factory is MISSING else f.default_factory()
        cells = (*_values(kind, f.name), _default(default), words[f.name])
        rows.append(_row(f.name, *cells))
    intro = parts[""] if "Attributes" in parts else text[: text.find(". ") + 1]
    return "\n".join([_paragraphs(intro), "", *HEAD, *rows, *extra])


HEAD = ("| field | type | values | default | what |", "|---|---|---|---|---|")


def _row(name: str, kind: str, values: str, default: str, what: str) -> str:
    cells = (f"`{name}`", kind, values, default, what)
    return f"| {' | '.join(x.replace('|', chr(92) + '|') for x in cells)} |"


def _option_rows() -> tuple[str, ...]:
    """Fields that single kinds of block bring to the model."""
    return tuple(
        _row(name, "int", _short(option.range.words), _default(option.default), option.about)
        for name, option in options().items()
    )


def _values(kind: type, name: str) -> tuple[str, str]:
    """Type and range of a field."""
    hint = _plain_hint(kind, name)
    found = ranges_of(kind).get(name)
    return _type(hint), _short(found[0].words) if found else ""


def _plain_hint(kind: type, name: str) -> Any:
    hint = get_type_hints(kind, include_extras=True)[name]
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _type(hint: Any) -> str:
    """Of a field, as YAML has it."""
    if is_dataclass(hint):
        anchor = next(
            f.name for f in fields(TrainConfig) if _plain_hint(TrainConfig, f.name) is hint
        )
        return f"[{anchor}](#{anchor})"
    inner, kind = get_args(hint), get_origin(hint)
    if kind in (Union, UnionType):
        return " or ".join(_type(x) for x in inner)
    if hint == tuple[StageConfig, ...]:
        return "[stages](#stages)"
    if kind is tuple:
        return f"list of {_type(inner[0])}" if inner[-1] is ... else f"{len(inner)} numbers"
    return "null" if hint is type(None) else str(hint.__name__)


def _short(words: str) -> str:
    """A range without the word for its type, which stands beside it."""
    words = re.sub(r"\ba (whole )?number (?=from|above)", "", words).replace(" of , ", ' of "", ')
    return re.sub(r"^a list of (\d+) to (\d+) values, each ", r"\1 to \2 of: ", words)


def _default(value: Any) -> str:
    """As YAML has it."""
    if value is MISSING:
        return "required"
    if value is None:
        return "null"
    if is_dataclass(value):
        return "see there"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f'`"{value}"`' if isinstance(value, str) else f"{value:g}"


# API


def api_page() -> str:
    """docs/api.md."""
    sections = []
    for module, (title, names) in API.items():
        home = import_module(module)
        entries = [_documented(f"{module}.{name}", getattr(home, name)) for name in names]
        sections.append("\n\n".join([f"## {title}", *entries]))
    return f"{GENERATED}{API_INTRO}\n" + "\n\n".join(sections) + "\n"


def _documented(path: str, thing: Any) -> str:
    """A function, or a class with the methods that users call."""
    name = path.rpartition(".")[2]
    if not isinstance(thing, type):
        return f"### {name}\n\n{_signature(path, thing)}\n\n{_doc(path, thing)}"
    out = [f"### {name}\n\n`class {path}`\n\n{_doc(path, thing)}"]
    for method in METHODS.get(name, ()):
        own = inspect.getattr_static(thing, method)
        if isinstance(own, property):
            told = _doc(f"{path}.{method}", own.fget)
            out.append(f"#### {name}.{method}\n\nA property. {told}")
        else:
            shown = _signature(f"{name}.{method}", getattr(thing, method))
            out.append(f"#### {name}.{method}\n\n{shown}\n\n{_doc(f'{path}.{method}', own)}")
    return "\n\n".join(out)


def _signature(path: str, function: Callable[..., Any]) -> str:
    """The call, an argument a line where it is long."""
    signature = inspect.signature(function)
    own = [p for n, p in signature.parameters.items() if n not in ("self", "cls")]
    result = inspect.formatannotation(signature.return_annotation)
    words, star = [], False
    for p in own:
        if p.kind is p.KEYWORD_ONLY and not star:
            words.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        words.append(str(p))
    line = f"{path}({', '.join(words)}) -> {result}"
    if len(line) > 100:
        line = f"{path}(\n" + "".join(f"    {word},\n" for word in words) + f") -> {result}"
    line = re.sub(r"\b(torch|typing|collections\.abc|pathlib|rwkvx[\w.]*)\.(?=[A-Z])", "", line)
    return f"```text\n{line}\n```"


def _doc(path: str, thing: Any) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise SystemExit(f"{path} has no docstring")
    return markdown(text)


PAGES: dict[str, Callable[[], str]] = {"config.md": config_page, "api.md": api_page}


def main(arguments: list[str]) -> int:
    """Write the pages; with --check, the number of those that are out of date."""
    stale = 0
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if arguments != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is out of date: python scripts/reference.py", file=sys.stderr)
            stale += 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
