"""The shape of the code base: who may import whom, how long a file and a function may be."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder, import name, and what of ours the files in it may import. Arrows point one way:
# configs -> rwkvx -> kernels; evals, the command line and tests on top.
PACKAGES = {
    "kernels": ("rwkvx_kernels", {"rwkvx_kernels"}),
    "rwkvx": ("rwkvx", {"rwkvx", "rwkvx_kernels", "rwkvx_configs"}),
    "evals": ("rwkvx_evals", {"rwkvx", "rwkvx_kernels", "rwkvx_evals", "rwkvx_configs"}),
    "configs": ("rwkvx_configs", set()),
}
OURS = {name for name, _ in PACKAGES.values()}
COMMAND_LINE = "rwkvx/cli"  # the one place in rwkvx that may reach rwkvx_evals
# Of a kernel family: never import one another; what they share is in common.py.
IMPLEMENTATIONS = ("reference", "torch", "numba", "triton")

FILE_LINES, FUNCTION_LINES, TRITON_LINES = 400, 60, 120


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def import_name(path: Path) -> str:
    """Dotted module name of a file in one of the packages."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [PACKAGES[folder][0], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, also inside functions and by name."""
    package = import_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield from (
                (node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant)
            )


def called(node: ast.Call) -> str:
    """Last part of the name that a call calls."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def wrong_arrows(path: Path, tree: ast.AST) -> Iterator[str]:
    where = path.relative_to(ROOT)
    allowed = PACKAGES[where.parts[0]][1]
    if where.is_relative_to(COMMAND_LINE):
        allowed = allowed | {"rwkvx_evals"}
    for line, name in imports(path, tree):
        root = name.partition(".")[0]
        if root in OURS and root not in allowed:
            yield f"{where}:{line} imports {name}"
        if root in ("kernels", "evals", "configs"):
            yield f"{where}:{line} imports {name}: use the name that is installed"


def sibling_implementations(path: Path, tree: ast.AST) -> Iterator[str]:
    """Imports of one implementation of a kernel family by another."""
    own = next((x for x in IMPLEMENTATIONS if path.stem.startswith(x)), None)
    if own is None:
        return
    family = import_name(path).rpartition(".")[0]
    for line, name in imports(path, tree):
        if not name.startswith(f"{family}."):
            continue
        stem = name[len(family) + 1 :].partition(".")[0]
        other = next((x for x in IMPLEMENTATIONS if stem.startswith(x)), own)
        if other != own:
            yield f"{path.relative_to(ROOT)}:{line} imports {name}"


def imported_modules(path: Path, tree: ast.AST, modules: set[str]) -> set[str]:
    """Which of `modules` a file imports when it or one of its functions runs."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for annotations alone: nothing runs it
    for _, name in imports(path, tree):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


@cache
def import_graph() -> dict[str, set[str]]:
    """Of every module of ours, which others it imports."""
    trees = {path: parse(path) for path in sources(*PACKAGES)}
    modules = {import_name(path) for path in trees}
    return {import_name(p): imported_modules(p, tree, modules) for p, tree in trees.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none if there is no such."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def planted(file: str, code: str) -> list[str]:
    """The circle that there is if that code stands in a file as well."""
    graph, path = import_graph(), ROOT / file
    more = imported_modules(path, ast.parse(code), set(graph))
    return circle({**graph, import_name(path): graph[import_name(path)] | more})


def test_nothing_imports_itself() -> None:
    """Neither at once nor by way of others, wherever in a file the import stands."""
    assert not circle(import_graph())


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("kernels/dispatch.py", "from rwkvx_kernels.wkv7 import api"),
        ("kernels/time_mix/common.py", "def late():\n    from . import numba_scan"),
        ("kernels/tools/operators.py", "import rwkvx_kernels.chunk_attention.triton_ops"),
        ("rwkvx/errors.py", "def late():\n    importlib.import_module('rwkvx.model')"),
    ],
)
def test_a_circle_is_seen(file: str, code: str) -> None:
    assert import_name(ROOT / file) in planted(file, code)


def test_a_circle_for_annotations_alone_is_none() -> None:
    code = "if TYPE_CHECKING:\n    from rwkvx_kernels.wkv7 import api"
    assert not planted("kernels/dispatch.py", code)


def test_arrows_point_one_way() -> None:
    files = sources(*PACKAGES)
    assert len(files) > 10
    assert not [problem for path in files for problem in wrong_arrows(path, parse(path))]


def test_implementations_do_not_import_one_another() -> None:
    problems = [
        p for path in sources("kernels") for p in sibling_implementations(path, parse(path))
    ]
    assert not problems


@pytest.mark.parametrize(
    ("file", "code", "found"),
    [
        ("kernels/wkv7/api.py", "from rwkvx.config import ModelConfig", 1),
        ("kernels/wkv7/api.py", "from . import reference", 0),
        ("rwkvx/model.py", "def f():\n    import rwkvx_evals.passkey", 1),
        ("rwkvx/model.py", "importlib.import_module('rwkvx_evals.lm')", 1),
        ("rwkvx/model.py", "from kernels import wkv7", 1),
        ("rwkvx/model.py", "from rwkvx_kernels.wkv7 import wkv7", 0),
        ("rwkvx/cli/demo.py", "from rwkvx_evals.lm import run", 0),
        ("configs/__init__.py", "import rwkvx", 1),
    ],
)
def test_wrong_arrows_are_seen(file: str, code: str, found: int) -> None:
    assert len(list(wrong_arrows(ROOT / file, ast.parse(code)))) == found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from rwkvx_kernels.wkv7.reference import wkv7", 1),
        ("from rwkvx_kernels.wkv7 import reference", 1),
        ("from .triton_forward import launch", 1),
        ("from rwkvx_kernels.wkv7.torch_form import wkv7_torch", 1),
        ("from . import numba_recurrence", 0),
        ("from .common import check", 0),
    ],
)
def test_sibling_implementations_are_seen(code: str, found: int) -> None:
    path = ROOT / "kernels/wkv7/numba_scan.py"
    assert len(list(sibling_implementations(path, ast.parse(code)))) == found


def test_no_init_files_that_shadow_other_packages() -> None:
    """With kernels/__init__.py, Hugging Face's `kernels` could not be imported from the root."""
    for folder in ("kernels", "evals"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_files_are_short() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in sources(*PACKAGES, "tests", "scripts")}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > FILE_LINES}
    assert not long, f"more than {FILE_LINES} lines: split by stage"


def test_functions_are_short() -> None:
    long = []
    for path in sources(*PACKAGES, "tests", "scripts"):
        budget = TRITON_LINES if path.stem.startswith("triton") else FUNCTION_LINES
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > budget:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not long, f"functions of more than {FUNCTION_LINES} lines"


def test_no_file_is_unpickled_without_care() -> None:
    """Checkpoints from elsewhere may run code when loaded with ``weights_only`` off.

    Compiled loops read what they have written themselves beside the package, as Numba's do.
    """
    unsafe = []
    for path in set(sources(*PACKAGES, "scripts")) - {ROOT / "kernels/tools/numba_loops.py"}:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                values = {k.arg: k.value for k in node.keywords}
                off = values.get("weights_only")
                if isinstance(off, ast.Constant) and off.value is not True:
                    unsafe.append(f"{path.relative_to(ROOT)}:{node.lineno}")
                function = ast.unparse(node.func)
                if function in ("torch.load", "pickle.load", "pickle.loads") and off is None:
                    unsafe.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not unsafe
