"""docs/config.md and docs/api.md are what scripts/reference.py makes of the code."""

import importlib.util
import sys
from types import ModuleType

import pytest
from pages import ROOT

from rwkvx.training.config import field_names


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(reference: ModuleType) -> None:
    pytest.importorskip("transformers")
    assert reference.main(["--check"]) == 0, "run: python scripts/reference.py"


def test_every_field_is_there(reference: ModuleType) -> None:
    text = reference.config_page()
    for name in field_names():
        inner = name.rpartition(".")[2]
        assert inner == "options" or f"| `{inner}` |" in text, name


def test_descriptions(reference: ModuleType) -> None:
    text = "a: one; b: two, three\n    more. c, d: four: five."
    assert reference.described(text, ["a", "b", "c", "d", "e"]) == {
        "a": "one", "b": "two, three more.", "c": "four: five.", "d": "four: five.",
    }  # fmt: skip


def test_docstrings_become_markdown(reference: ModuleType) -> None:
    text = """What it does.

    Args:
        x: [B, T], of
            any dtype.
        y, z: more.

    Raises:
        InputError: too long.
    """
    assert reference.markdown(text) == (
        "What it does.\n\n**Args**\n\n- `x`: [B, T], of any dtype.\n- `y, z`: more.\n\n"
        "**Raises**\n\n- `InputError`: too long."
    )


def test_a_field_without_a_description_is_an_error(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.Part, "__doc__", "One source.\n\nAttributes:\n    weight: more.")
    with pytest.raises(SystemExit, match="the docstring of Part does not describe kind"):
        reference.config_page()
