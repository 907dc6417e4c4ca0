"""Token files: every document comes back, held-out tails, other tokenizers and damage refused."""

import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rwkvx import InputError
from rwkvx.cli import main
from rwkvx.data.tokens import open_tokens, write_tokens
from rwkvx.tokenizers import get_tokenizer
from rwkvx.tokenizers.file import train_bpe

BYTES, WORLD = get_tokenizer("bytes"), get_tokenizer("world")


def some_texts(count: int = 40) -> list[str]:
    rng = random.Random()
    words = ["one", "tv\u00e5", "\u4eca\u5929", "four", "!", "\n"]
    return [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(count)]


def test_documents_come_back(tmp_path: Path) -> None:
    for tokenizer in (BYTES, WORLD, train_bpe(some_texts(), 300)):
        texts = some_texts()
        documents = [(t, i >= 35) for i, t in enumerate(texts)]
        made = write_tokens(tmp_path / "a.tokens", documents, tokenizer)
        assert len(made.documents) == 41
        for text, start, end in zip(texts, made.documents[:-1], made.documents[1:], strict=True):
            assert made.tokens[end - 1] == tokenizer.eos_token_id
            assert tokenizer.decode(made.tokens[start : end - 1].tolist()) == text
        assert made.training == made.documents[35]
        assert made.tokens.dtype == np.uint16
        assert isinstance(made.tokens, np.memmap)


def test_the_file_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    documents = [(t, False) for t in some_texts(60)]
    tokenizer = train_bpe(some_texts(), 300)
    for processes in (1, 2):
        write_tokens(tmp_path / str(processes), documents, tokenizer, processes)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_it_is_a_safetensors_file(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [("hello", False), ("you", False)], BYTES)
    found = load_file(tmp_path / "a")
    assert found["tokens"].tolist() == [*b"hello\0you\0"]
    assert found["documents"].tolist() == [0, 6, 10]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "a", "some text, some more text " * 9
    one, other = train_bpe([text], 270), train_bpe(["quite other words " * 9], 270)
    write_tokens(path, [(text, False)], one, tokenizer_name="first")
    assert len(open_tokens(path, train_bpe([text], 270)).documents) == 2
    for tokenizer in (other, BYTES, WORLD):
        with pytest.raises(InputError, match=r"made with another tokenizer \(first\)"):
            open_tokens(path, tokenizer)


def test_large_vocabularies_have_larger_numbers(tmp_path: Path) -> None:
    tokenizer = train_bpe(["text"], 300)
    tokenizer.add_tokens([f"word-{i}" for i in range(70_000)])
    made = write_tokens(tmp_path / "a", [("word-69999", False)], tokenizer)
    assert made.tokens.dtype == np.uint32
    assert tokenizer.decode(made.tokens[:-1].tolist()) == "word-69999"


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with pytest.raises(InputError, match=r"a\.tokens is missing"):
        open_tokens(path, BYTES)
    with pytest.raises(InputError, match="no text to write"):
        write_tokens(path, [], BYTES)
    assert not list(tmp_path.iterdir())
    write_tokens(path, [("hello", False)], BYTES)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-3], whole[:4100], b"\xff" * 5000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.tokens"):
            open_tokens(path, BYTES)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as status:
            main(["tokenize", *args])
        out, err = capsys.readouterr()
        return int(status.value.code or 0), out, err

    texts = [f"This is document number {i}, of a few words. " * 5 for i in range(20)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    sources = [str(tmp_path / f"{i}.txt") for i in range(20)]
    bpe, out = str(tmp_path / "bpe"), str(tmp_path / "a.tokens")
    new = ["--train-bpe", "300", "--tokenizer", bpe, "--processes", "1"]
    status, text, err = run(*sources, *new, "--held-out", "0.11", "--out", out)
    assert status == 0, err
    assert "of 20 documents" in text
    made = open_tokens(Path(out), get_tokenizer(bpe))
    assert made.training == made.documents[18]
    assert run(*sources, *new, "--out", out)[::2] == (
        1, f"error: {bpe} exists already: a trained tokenizer goes into a new folder\n",
    )  # fmt: skip
    status, text, err = run(*sources, "--tokenizer", bpe, "--out", out, "--processes", "1")
    assert status == 0, err
    assert ", 0 of them held out" in text
    assert run(*sources, "--tokenizer", "klingon", "--out", out)[0] == 1
