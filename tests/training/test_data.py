"""Training data: passkey samples, windows of text, and the files they come from."""

import io
import json
import lzma
import re
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvx import InputError
from rwkvx.data.passkey import QUESTION
from rwkvx.tokenizers import get_tokenizer
from rwkvx.training.config import DataConfig, StageConfig
from rwkvx.training.data import PasskeySource, TextSource, build_source, read_tokens

BYTES = get_tokenizer("bytes")
STAGE = StageConfig(steps=1, length=400, batch=6)


def passkey(prose: float = 0.5, other: float = 0.2) -> PasskeySource:
    text = np.frombuffer(b"Call me Ishmael. " * 200, dtype=np.uint8).astype(np.int32)
    return PasskeySource(DataConfig("passkey", prose=prose, other_weight=other), BYTES, text)


@pytest.mark.parametrize("prose", [0.0, 0.5, 1.0])
def test_passkey_samples(prose: float) -> None:
    """The answers are the right number, where the next token is asked for."""
    batch = passkey(prose).batch(STAGE, (1, 2, 3))
    assert batch.inputs.shape == batch.targets.shape == (6, 400)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for row in range(6):
        text = bytes(batch.inputs[row].tolist())
        answer = bytes(batch.targets[row][batch.answers[row]].tolist())
        key = text.partition(b"The pass key is ")[2].partition(b".")[0]
        assert answer == b" " + key + b".\0"
        assert 1 <= int(key) <= 99_999
        first = int(batch.answers[row].nonzero()[0])
        assert text[: first + 1].endswith(QUESTION.encode())
        assert text.count(b"The pass key is " + key + b". Remember it.") == 1
        assert (b"Ishmael" in text) == (prose == 1.0) or prose == 0.5


def test_passkey_weights() -> None:
    """All answers together weigh one, all other tokens `other_weight`, padding nothing."""
    batch = passkey(other=0.2).batch(STAGE, (4,))
    assert float(batch.weights[batch.answers].sum()) == pytest.approx(1.0)
    assert float(batch.weights[~batch.answers].sum()) == pytest.approx(0.2)
    assert float(batch.weights[batch.answers].std()) == pytest.approx(0.0, abs=1e-7)
    for row in range(6):
        end = int(batch.answers[row].nonzero()[-1])
        assert not batch.weights[row, end + 1 :].any()
        assert (batch.weights[row, : end + 1] > 0).all()
    silent = passkey(other=0.0).batch(STAGE, (4,))
    assert not silent.weights[~silent.answers].any()


def test_asking_again() -> None:
    """In pieces after the needle's, in the filler, with answers that count."""
    stage = StageConfig(1, 1024, 16, recurrent_length=128)
    source = PasskeySource(DataConfig("passkey", prose=0.0, ask_again=1.0), BYTES, None)
    batch = source.batch(stage, (0,))
    seen = set()
    for row, targets, answers in zip(batch.inputs, batch.targets, batch.answers, strict=True):
        text = bytes(row.tolist()).decode()
        needle = text.index("\nThe pass key is ")
        key = re.match(r"\nThe pass key is (\d+)\. Remember it\.", text[needle:]).group(1)  # type: ignore[union-attr]
        asked = [m.start() for m in re.finditer(r"\nWhat is the pass key\?", text)]
        pieces = [start // 128 for start in asked[:-1]]
        first = (needle + len(source.builder.needle(int(key)))) // 128 + 1
        assert pieces == list(range(first, 7))
        assert bytes(targets[answers].tolist()) == f" {key}.".encode() * len(asked) + b"\0"
        seen.add(len(asked))
    assert len(seen) > 3
    plain = PasskeySource(DataConfig("passkey", prose=0.0), BYTES, None).batch(stage, (0,))
    assert all(bytes(r.tolist()).count(b"\nWhat is the pass key?") == 1 for r in plain.inputs)


def test_a_stage_may_have_its_own_share_of_prose() -> None:
    def fillers(stage_prose: float, prose: float) -> set[bool]:
        stage = StageConfig(1, 400, 20, prose=stage_prose)
        return {b"Ishmael" in bytes(r.tolist()) for r in passkey(prose).batch(stage, (0,)).inputs}

    assert fillers(-1, 0.5) == {True, False}
    assert fillers(1, 0.5) == {True}
    assert fillers(0, 0.5) == {False}
    source = PasskeySource(DataConfig("passkey", prose=0.0), BYTES, None)
    with pytest.raises(InputError, match=r"needs data\.paths with prose"):
        source.batch(StageConfig(1, 400, 2, prose=1.0), (0,))


def test_each_filler_is_evaluated_alone() -> None:
    parts = passkey(0.5).evaluations(StageConfig(1, 400, 20))
    assert list(parts) == ["standard", "prose"]
    for name, stage in parts.items():
        rows = passkey(0.5).batch(stage, (0,)).inputs
        assert {b"Ishmael" in bytes(r.tolist()) for r in rows} == {name == "prose"}
    source = PasskeySource(DataConfig("passkey", prose=0.0), BYTES, None)
    assert list(source.evaluations(STAGE)) == ["standard"]


def test_noise_replaces_prose_alone() -> None:
    plain, noisy = (StageConfig(1, 400, 20, prose=1.0, noise=x) for x in (0.0, 0.5))
    source = passkey()
    known = set(b"Call me Ishmael. ")

    def strange(stage: StageConfig) -> list[float]:
        shares = []
        for row in source.batch(stage, (0,)).inputs:
            text = bytes(row.tolist())
            start = text.index(b"information there.\n") + 19
            prose = text[start : text.rindex(b"\nWhat is the pass key?")]
            needle = prose.index(b"\nThe pass key is ")
            prose = prose[:needle] + prose[needle + 60 :]  # whole and untouched
            shares.append(sum(b not in known for b in prose) / max(1, len(prose)))
        return shares

    assert max(strange(plain)) < 0.05  # the needle's last bytes
    found = strange(noisy)
    assert min(found) < 0.1 < 0.3 < max(found) < 0.6


def test_numbers_in_prose() -> None:
    stage = StageConfig(1, 400, 20, prose=1.0, numbers=40.0)
    found = [
        len(re.findall(rb" \d{1,5}\. ", bytes(r.tolist()).split(b"information there.")[1]))
        for r in passkey().batch(stage, (0,)).inputs
    ]
    assert min(found) < 3  # two are the needle's and the answer's
    assert max(found) > 4


def test_samples_are_seeded_and_fresh() -> None:
    source = passkey()
    first, again, other = (source.batch(STAGE, s) for s in ((0, 0, 5), (0, 0, 5), (0, 0, 6)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.inputs, other.inputs)
    rows = {bytes(r.tolist()) for s in range(20) for r in source.batch(STAGE, (s,)).inputs}
    assert len(rows) == 120
    ends = {int(source.batch(STAGE, (s,)).answers[0].nonzero()[-1]) for s in range(30)}
    assert len(ends) > 10, "the alignment of prompts to chunks varies"


def test_passkey_needs_room() -> None:
    with pytest.raises(InputError, match="of 100 tokens is too short: prompt and answer need 2"):
        passkey().batch(StageConfig(1, 100, 1), (0,))
    with pytest.raises(InputError, match=r"prose of data\.paths has 3400 tokens"):
        passkey(prose=1.0).batch(StageConfig(1, 3500, 1), (0,))
    with pytest.raises(InputError, match=r"data\.prose > 0 needs data\.paths"):
        build_source(DataConfig("passkey"), BYTES)
    build_source(DataConfig("passkey", prose=0.0), BYTES).batch(STAGE, (0,))


def test_the_shortest_passkey_length_that_is_said_to_work_works() -> None:
    source = passkey(prose=0.0)
    with pytest.raises(InputError) as caught:
        source.batch(StageConfig(1, 100, 1), (0,))
    needed = int(str(caught.value).split(" need ")[1].split()[0])
    for seed in range(40):  # keys of any length
        batch = source.batch(StageConfig(1, needed + 4, 1), (seed,))
        assert batch.answers.any()


def test_text_windows() -> None:
    source = TextSource(np.arange(1000, dtype=np.int32))
    batch = source.batch(StageConfig(1, 50, 4), (9,))
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert float(batch.weights.sum()) == pytest.approx(1.0)
    assert not batch.answers.any()
    assert batch.inputs.dtype == torch.int64
    assert torch.equal(batch.inputs, source.batch(StageConfig(1, 50, 4), (9,)).inputs)
    whole = TextSource(np.arange(51, dtype=np.int32)).batch(StageConfig(1, 50, 2), (0,))
    assert whole.inputs[:, 0].tolist() == [0, 0]
    with pytest.raises(InputError, match="has 1000 tokens, a sequence needs 1001"):
        source.batch(StageConfig(1, 1000, 1), (0,))


def read(folder: Path, *names: str, limit_mb: float = 1.0) -> bytes:
    config = DataConfig("text", paths=names, limit_mb=limit_mb)
    return bytes(read_tokens(config, BYTES, str(folder)).tolist())


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"two"))
    lines = "\n".join(json.dumps({"text": t}) for t in ("three", "a\nb")) + "\n\n"
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    with tarfile.open(tmp_path / "e.tar.xz", "w:xz") as archive:
        for name, text in (("x/f.txt", b"four"), ("x/picture.png", b"no"), ("y.txt", b"five")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    assert read(tmp_path, "a.txt") == b"one\0"
    assert read(tmp_path, "b.txt.xz", "a.txt") == b"two\0one\0"
    assert read(tmp_path, "c.jsonl") == read(tmp_path, "d.jsonl.xz") == b"three\0a\nb\0"
    assert read(tmp_path, "e.tar.xz") == b"four\0five\0"


def test_limit(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 600)
    names = ("a.txt", "b.txt", "c.txt")
    assert read(tmp_path, *names, limit_mb=0.001) == b"a" * 600 + b"\0" + b"b" * 600 + b"\0"


def test_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setenv("RWKVX_DATA", str(tmp_path))
    config = DataConfig("text", paths=("a.txt",))
    assert len(read_tokens(config, BYTES, None)) == 4
    monkeypatch.delenv("RWKVX_DATA")
    with pytest.raises(InputError, match=r"text a\.txt is not there: .*--data or RWKVX_DATA"):
        read_tokens(config, BYTES, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\xff", "cannot read text"),
        ("a.txt.xz", b"not xz", "cannot read text"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "cannot read text"),
        ("a.tar.xz", lzma.compress(b"text" * 1000)[:60], "cannot read text"),
        ("a.tar.xz", b"nothing", "cannot read text"),
        ("a.jsonl", b'{"text": "a"}\n{"title": "b"}\n', 'line 2: no JSON object with a "text"'),
        ("a.jsonl", b'{"text": 3}\n', "line 1: no JSON"),
        ("a.jsonl", b"[1]\n", "line 1: no JSON"),
        ("a.jsonl", b"{\n", "line 1: no JSON"),
        ("a.jsonl", b"", "no text in"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path, name)


def test_truncated_archives(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 50_000
        noise = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
        archive.addfile(member, io.BytesIO(noise))
    whole = (tmp_path / "a.tar.xz").read_bytes()
    (tmp_path / "a.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read text"):
        read(tmp_path, "a.tar.xz")


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: str, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        return [{"text": "one"}, {"text": "two"}] if args[0] == "good" else [{"content": "x"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = build_source(DataConfig("hub", paths=("good", "subset"), split="dev"), BYTES)
    assert isinstance(source, TextSource)
    assert bytes(source.tokens.tolist()) == b"one\0two\0"
    assert calls[0][0] == ("good", "subset")
    assert calls[0][1]["split"] == "dev"
    with pytest.raises(InputError, match='no "text" column'):
        build_source(DataConfig("hub", paths=("other",)), BYTES)
    with pytest.raises(InputError, match="names no data set"):
        build_source(DataConfig("hub"), BYTES)
    with pytest.raises(InputError, match=r"data\.paths names no text file"):
        build_source(DataConfig("text"), BYTES)
