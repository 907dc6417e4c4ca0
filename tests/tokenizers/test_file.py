"""Tokenizers of a file: read, trained, carried by models through every way in and out."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkvx
from rwkvx import InputError, Model, ModelConfig
from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli import main
from rwkvx.init import init_weights
from rwkvx.tokenizers import get_tokenizer
from rwkvx.tokenizers.file import count_ids, fingerprint, read_tokenizer, save_tokenizer, train_bpe
from rwkvx.tokenizers.stream import prompt_ids, text_stream

TEXT = "It was the best of times, it was the worst of times. Na\u00efve \u4eca\u5929! " * 20
BPE = train_bpe([TEXT], 320)
GENERAL = settings(max_examples=100, deadline=None)


@GENERAL
@given(text=st.text(max_size=200))
def test_every_text_comes_back(text: str) -> None:
    ids = BPE.encode(text, add_special_tokens=False)
    assert BPE.decode(ids) == text
    assert 0 not in ids
    assert all(i < 320 for i in ids)


def test_a_trained_tokenizer() -> None:
    assert BPE.eos_token_id == BPE.bos_token_id == BPE.pad_token_id == 0
    assert 257 <= count_ids(BPE) <= 320
    assert len(BPE.encode(TEXT)) < len(TEXT) / 2
    assert 0 not in BPE.encode("a<|endoftext|>b", add_special_tokens=False)
    assert fingerprint(train_bpe([TEXT], 320)) == fingerprint(BPE)
    with pytest.raises(InputError, match="needs more than 256 ids, not 256"):
        train_bpe([TEXT], 256)


def test_saved_and_read(tmp_path: Path) -> None:
    names = save_tokenizer(BPE, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        found = read_tokenizer(path)
        assert found.encode(TEXT) == BPE.encode(TEXT)
        assert fingerprint(found) == fingerprint(BPE)
        assert found.eos_token_id == 0
    assert get_tokenizer(str(tmp_path / "new")).encode("times") == BPE.encode("times")


def test_fingerprints_tell_tokenizers_apart() -> None:
    found = {fingerprint(x) for x in (BPE, get_tokenizer("world"), get_tokenizer("bytes"))}
    assert len(found) == 3
    other = train_bpe([TEXT], 320)
    other.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert fingerprint(other) != fingerprint(BPE)
    padded = train_bpe([TEXT], 320)
    padded(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint(padded) == fingerprint(BPE)


def test_the_end_of_document(tmp_path: Path) -> None:
    """Named in tokenizer_config.json, else id 0 if that is special, else an error."""
    save_tokenizer(BPE, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path).eos_token_id == 0
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="has no end of document: name it as eos_token"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))
    found = read_tokenizer(tmp_path)
    assert found.eos_token_id == found.pad_token_id == BPE.encode("!")[0]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": 3}'])
def test_damaged_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [BPE, get_tokenizer("bytes"), get_tokenizer("world")])
def test_text_comes_character_by_character(tokenizer: Any) -> None:
    rng = random.Random()
    alphabet = "ab \u00e5\u4eca\U0001f44d\n"
    for _ in range(20):
        prompt, text = ("".join(rng.choices(alphabet, k=rng.randint(0, 9))) for _ in range(2))
        ids = tokenizer.encode(text, add_special_tokens=False) if text else []
        parts = list(text_stream(tokenizer, prompt.encode(), ids))
        assert "".join(parts) == prompt + text
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
        assert prompt_ids(tokenizer, prompt.encode()) == tokenizer.encode(prompt)
    cut = tokenizer.encode("\u4eca", add_special_tokens=False)
    if len(cut) > 1:
        assert "".join(text_stream(tokenizer, b"x", cut[:-1])) == "x\N{REPLACEMENT CHARACTER}"
    if tokenizer is BPE:
        with pytest.raises(InputError, match="no UTF-8"):
            prompt_ids(tokenizer, b"\xff")


# ------------------------------------------------- models that carry one


def a_model(pattern: tuple[str, ...] = ("rwkv7", "sparse"), vocab_size: int = 320) -> Model:
    config = ModelConfig(
        vocab_size, 64, pattern, chunk_size=4, topk=2, tokenizer="file", ffn_mult=1
    )
    model = init_weights(Model(config))
    model.use_tokenizer(BPE)
    return model


def test_a_model_folder_carries_it(tmp_path: Path) -> None:
    save_folder(a_model(), tmp_path / "m")
    loaded = rwkvx.load(tmp_path / "m", verify=True)
    assert loaded.tokenizer.encode(TEXT) == BPE.encode(TEXT)
    save_folder(loaded, tmp_path / "again")
    assert rwkvx.load(tmp_path / "again").tokenizer.encode(TEXT) == BPE.encode(TEXT)
    (tmp_path / "m" / "tokenizer.json").unlink()
    alone = rwkvx.load(tmp_path / "m")
    assert alone(torch.tensor([[1, 2]]))[0] is not None
    with pytest.raises(InputError, match=r"lacks its tokenizer\.json"):
        _ = alone.tokenizer


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_folder(a_model(vocab_size=count_ids(BPE) - 1), tmp_path / "m")
    with pytest.raises(InputError, match=f"has {count_ids(BPE) - 1} rows, but the tokenizer"):
        rwkvx.load(tmp_path / "m")


def test_the_auto_classes_read_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    save_folder(a_model(), tmp_path / "m")
    found = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert found.encode("a<|endoftext|>" + TEXT) == BPE.encode("a<|endoftext|>" + TEXT)
    assert found.eos_token_id == AutoConfig.from_pretrained(tmp_path / "m").eos_token_id == 0


def test_ids_of_another_end_stand_in_the_config(tmp_path: Path) -> None:
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.eos_token = "!"
    model = a_model()
    model.use_tokenizer(tokenizer)
    save_folder(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id > 0
    assert rwkvx.load(tmp_path / "m").tokenizer.eos_token == "!"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as status:
        main(args)
    out, err = capsys.readouterr()
    assert not status.value.code, err
    return out


def test_converting_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through our folders, with sparse blocks added, and through the folders of fla."""
    save_folder(a_model(("rwkv7", "rwkv7")), tmp_path / "m")
    source = str(tmp_path / "m")
    for name, options in (("a", []), ("b", ["--expand", "1"]), ("c", ["--to", "fla"])):
        run(capsys, "convert", source, str(tmp_path / name), *options)
        assert rwkvx.load(tmp_path / name).tokenizer.encode(TEXT) == BPE.encode(TEXT)
    run(capsys, "convert", str(tmp_path / "c"), str(tmp_path / "d"))
    found = rwkvx.load(tmp_path / "d", verify=True)
    assert found.config.tokenizer == "file"
    assert found.tokenizer.encode(TEXT) == BPE.encode(TEXT)
    assert "tokenizer file" in run(capsys, "info", str(tmp_path / "d"))


def test_generating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(a_model(), tmp_path / "m")
    command = ["generate", "--model", str(tmp_path / "m"), "--seed", "1", "--max-tokens", "8"]
    for prompt in ("It was", ""):
        out = run(capsys, *command, prompt)
        assert out.startswith(prompt)
        assert len(out) > len(prompt) + 1
