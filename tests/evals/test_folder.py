"""Results belong to a task, a model and settings: nobody else's are overwritten."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rwkvx.errors import InputError
from rwkvx_evals.folder import MARK, claim, default_folder, model_label, owner, provenance

MINE = owner("lm", "model", "a" * 64, {"limit": None, "tasks": ("piqa",)})


def test_a_folder_is_taken_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    claim(folder, MINE)
    (folder / "results.json").write_text("mine")
    claim(folder, MINE)
    claim(folder, {**MINE, "model": "renamed"})
    for other, said in [
        (owner("passkey", "model", "a" * 64, {}), "results of lm, not of passkey"),
        (
            owner("lm", "model", "b" * 64, MINE["settings"]),
            "other weights (aaaaaaaa, not bbbbbbbb)",
        ),
        (owner("lm", "model", "a" * 64, {"limit": 3, "tasks": ["piqa"]}), "(limit: null, not 3)"),
        (owner("lm", "model", "a" * 64, {}), "other settings"),
    ]:
        with pytest.raises(InputError) as caught:
            claim(folder, other)
        assert said in str(caught.value)
        assert "--out" in str(caught.value)
    assert (folder / "results.json").read_text() == "mine"
    claim(folder, MINE)


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt"):
        claim(tmp_path, MINE)
    assert not (tmp_path / MARK).exists()
    with pytest.raises(InputError, match="cannot use"):
        claim(tmp_path / "notes.txt", MINE)


def test_a_folder_in_which_nothing_was_written_is_free(tmp_path: Path) -> None:
    claim(tmp_path, MINE)
    (tmp_path / "requests.jsonl").write_text("")
    (tmp_path / ".hidden").write_text("x")
    other = owner("lm", "model", "b" * 64, {})
    claim(tmp_path, other)
    (tmp_path / "requests.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="other weights"):
        claim(tmp_path, MINE)


def test_default_folders_differ(tmp_path: Path) -> None:
    names = {
        default_folder(owner(task, "model", weights, settings))
        for task in ("lm", "long")
        for weights in ("a" * 64, "b" * 64)
        for settings in ({}, {"limit": 2}, {"limit": 3})
    }
    assert len(names) == 12
    name = default_folder(MINE).name
    assert name.startswith("lm-model-aaaaaaaa-")
    assert default_folder(json.loads(json.dumps(MINE))).name == name
    (tmp_path / "model").mkdir()
    assert model_label(str(tmp_path / "model" / ".")) == "model"
    assert model_label("passkey-tiny") == "passkey-tiny"


def test_damaged_marks_are_one_line(tmp_path: Path) -> None:
    """Whatever the mark holds: refused in one line, or found to be another's."""
    rng = random.Random(5)
    (tmp_path / "results.json").write_text("x")
    good = json.dumps(MINE)
    for number in range(400):
        content = mutated(good, rng) if number else "[" * 100_000
        (tmp_path / MARK).write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            claim(tmp_path, MINE)
        except InputError as error:
            message = str(error)
            assert message.isprintable(), content
            assert len(message) <= 300
        else:
            found: Any = json.loads(content)
            assert all(found[k] == json.loads(good)[k] for k in ("task", "weights", "settings"))


def mutated(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    piece = rng.choice(['"', "{}", "\0", "null", "\ud800", "9" * 400, "\n", "", "é" * 500, "["])
    return text[:at] + piece + text[at + rng.randrange(30) :]


def test_where_results_come_from() -> None:
    found = provenance(("numpy", "no-such-package"))
    assert set(found) == {"date", "command", "commit", "versions", "machine"}
    assert found["versions"]["numpy"]
    assert found["versions"]["no-such-package"] is None
    assert {"rwkvx", "python", "torch"} <= set(found["versions"])
    json.dumps(found)
