"""setup.cfg against the tree: nothing that is written is left out of an installation."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = {"rwkvx": "rwkvx", "kernels": "rwkvx_kernels", "evals": "rwkvx_evals"}
CODE["configs"] = "rwkvx_configs"


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]


def packages(setup_cfg: configparser.ConfigParser) -> set[str]:
    return set(lines(setup_cfg["options"]["packages"]))


def test_every_package_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    found = set()
    for folder, name in CODE.items():
        for path in (ROOT / folder).rglob("*.py"):
            if ROOT / "rwkvx/models" in path.parents:  # of a model's folder: data
                continue
            found.add(".".join([name, *path.parent.relative_to(ROOT / folder).parts]))
    assert found == packages(setup_cfg)


def test_folders_are_mapped(setup_cfg: configparser.ConfigParser) -> None:
    mapping = dict(re.split(r"\s*=\s*", x) for x in lines(setup_cfg["options"]["package_dir"]))
    assert mapping == {name: folder for folder, name in CODE.items()}


def test_sub_packages_have_init_files(setup_cfg: configparser.ConfigParser) -> None:
    folders = {name: folder for folder, name in CODE.items()}
    for package in packages(setup_cfg):
        root, *rest = package.split(".")
        wanted = root in ("rwkvx", "rwkvx_configs") or bool(rest)
        init = ROOT.joinpath(folders[root], *rest, "__init__.py")
        assert init.exists() == wanted, package


def test_every_data_file_is_packaged(setup_cfg: configparser.ConfigParser) -> None:
    names = {name: folder for folder, name in CODE.items()}
    covered = set()
    for package, patterns in setup_cfg["options.package_data"].items():
        root, *rest = package.split(".")
        base = ROOT.joinpath(names[root], *rest)
        for pattern in lines(patterns):
            # To setuptools a closing ** means files; to pathlib, before Python 3.13, folders.
            covered |= set(base.glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
    for folder in CODE:
        for path in (ROOT / folder).rglob("*"):
            data = path.is_file() and path.suffix not in (".py", ".md")
            data = data and path.parent.name != "__pycache__"
            assert not data or path in covered, f"{path.relative_to(ROOT)} would not be installed"


def test_typed_markers() -> None:
    for folder in ("rwkvx", "kernels", "evals"):
        assert (ROOT / folder / "py.typed").is_file()


def test_metadata_has_one_home() -> None:
    """pip needs [build-system] in pyproject.toml; everything else stands in setup.cfg."""
    text = (ROOT / "pyproject.toml").read_text()
    assert [line for line in text.splitlines() if line.startswith("[")] == ["[build-system]"]


def test_torch_is_new_enough(setup_cfg: configparser.ConfigParser) -> None:
    """Older ones have holes in ``weights_only=True``: CVE-2025-32434, CVE-2026-24747."""
    assert "torch>=2.10" in lines(setup_cfg["options"]["install_requires"])


def test_version_is_the_same_everywhere(setup_cfg: configparser.ConfigParser) -> None:
    import rwkvx

    assert rwkvx.__version__ == setup_cfg["metadata"]["version"]
