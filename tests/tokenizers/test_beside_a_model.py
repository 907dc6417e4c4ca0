"""What is added to the tokenizer in a model's folder is read as AutoTokenizer reads it."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

import rwkvx
from rwkvx import InputError, Model, ModelConfig
from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli import main
from rwkvx.init import init_weights
from rwkvx.tokenizers import get_tokenizer
from rwkvx.tokenizers.file import count_ids, fingerprint, train_bpe

KINDS = ("world", "bytes", "file")
WORDS = ("<|user|>", "今天é", "two words", "cat", "<pad>", "<|im_end|>", "<b>", " ", "a", "\n\n")
CONFIG = "tokenizer_config.json"


def a_folder(folder: Path, kind: str) -> Path:
    """A model with 40 rows to spare, and its tokenizer as it comes."""
    rows = {"world": 65536, "bytes": 256, "file": 320}[kind] + 40
    shape = ModelConfig(rows, 64, ("rwkv7",), tokenizer=kind, ffn_mult=1)
    model = init_weights(Model(shape))
    if kind == "file":
        model.use_tokenizer(train_bpe(["It was the best of times. " * 20], 320))
    save_folder(model, folder)
    return folder


def grow(tokenizer: Any) -> None:
    alone = AddedToken("cat", single_word=True, lstrip=True, normalized=False)
    tokenizer.add_tokens(["<|user|>", "今天é", "two words", alone])
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>", "<b>"]}
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


def assert_equal(own: Any, theirs: Any) -> None:
    """Ids of random texts, special tokens, and a conversation."""
    rng = random.Random()
    for _ in range(20):
        text = "".join(rng.choices(WORDS, k=12))
        for split in (True, False):
            ids = own.encode(text, split_special_tokens=split)
            assert ids == theirs.encode(text, split_special_tokens=split)
        assert own.decode(ids) == theirs.decode(ids)
    assert own.special_tokens_map == theirs.special_tokens_map
    assert own.chat_template == theirs.chat_template
    assert len(own) == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_reads_what_was_added(tmp_path: Path, kind: str) -> None:
    folder = a_folder(tmp_path / "m", kind)
    theirs = AutoTokenizer.from_pretrained(folder)
    grow(theirs)
    theirs.save_pretrained(folder)
    model = rwkvx.load(folder)
    own = model.tokenizer
    assert_equal(own, AutoTokenizer.from_pretrained(folder))
    turns = [{"role": "user", "content": "cat <b>"}]
    said = own.apply_chat_template(turns, split_special_tokens=True)
    assert said["input_ids"] == theirs.encode("<|user|>cat <b>")
    assert own.pad_token_id == theirs.convert_tokens_to_ids("<pad>") >= len(theirs) - 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["folder", "fla"])
def test_what_was_added_is_carried(tmp_path: Path, kind: str, target: str) -> None:
    """Added to the tokenizer of a model, through folders of both kinds."""
    model = rwkvx.load(a_folder(tmp_path / "m", kind))
    plain = fingerprint(model.tokenizer)
    grow(model.tokenizer)
    save_folder(model, tmp_path / "grown")
    path = FORMATS["folder"].read(tmp_path / "grown", {})
    FORMATS[target].write(path, tmp_path / "again")
    again = rwkvx.load(tmp_path / "again", verify=True).tokenizer
    assert_equal(again, model.tokenizer)
    assert fingerprint(again) == fingerprint(model.tokenizer) != plain
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config["pad_token_id"] == again.pad_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_room_for_a_tokenizer_says_so(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_folder(tmp_path / "model", kind)
    for grown in (False, True):
        if grown:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            grow(tokenizer)
            tokenizer.save_pretrained(folder)
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(folder), str(tmp_path / f"{grown}.pth")])
        assert ended.value.code == 0
        notes = capsys.readouterr().err.splitlines()
        told = [line for line in notes if "no place for the tokenizer" in line]
        assert len(told) == int(grown or kind == "file")
        assert all(len(line) <= 300 and line.startswith("note: ") for line in notes)


def test_a_plain_vocabulary_needs_no_file(tmp_path: Path) -> None:
    """And no description of another class, or of another vocabulary than was asked for, is read."""
    folder = a_folder(tmp_path / "m", "world")
    assert rwkvx.load(folder).tokenizer_to_save is None
    rwkvx.load(folder).tokenizer.encode("a")
    foreign = {"tokenizer_class": "RwkvTokenizer", "eos_token": "</s>", "auto_map": {"a": ["b.C"]}}
    for content in (foreign, {"tokenizer_class": "ByteTokenizer", "pad_token": "<pad>"}):
        (folder / CONFIG).write_text(json.dumps(content))
        found = rwkvx.load(folder).tokenizer
        assert (found.eos_token_id, found.pad_token_id, len(found)) == (0, 0, 65536)
    (folder / CONFIG).write_text(json.dumps({"tokenizer_class": "WorldTokenizer", "x_token": "!"}))
    assert len(rwkvx.load(folder, tokenizer="bytes").tokenizer) == 256


def test_unused_ids_can_be_named(tmp_path: Path) -> None:
    """The slots of the World vocabulary, and ids with gaps between them."""
    folder = a_folder(tmp_path / "m", "world")
    names = {65530: "<|im_start|>", 65540: "é later"}
    added = {str(i): {"content": name, "special": False} for i, name in names.items()}
    (folder / CONFIG).write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = rwkvx.load(folder).tokenizer
    text = "a<|im_start|>bé laterc"
    ids = tokenizer.encode(text)
    assert ids == AutoTokenizer.from_pretrained(folder).encode(text)
    assert {65530, 65540} <= set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
    assert tokenizer.decode([65531, 65537]) == ""
    assert count_ids(tokenizer) == len(tokenizer) == 65541
    tokenizer.add_tokens(["the one after"])
    assert tokenizer.encode("the one after") == [65541]


def token(content: Any) -> dict[str, Any]:
    return {"content": content, "special": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "content",
    [
        b"", b"[1]", b"\xff\xfe", b'{"a": ', b"[" * 100_000,
        {"added_tokens_decoder": {"65600": 3}},
        {"added_tokens_decoder": {"many": token("x")}},
        {"added_tokens_decoder": {"65600": token(3)}},
        {"added_tokens_decoder": [1]},
        {"pad_token": 3},
        {"padding_side": "up"},
        {"model_max_length": "long"},
    ],
)  # fmt: skip
def test_damage_is_one_line(tmp_path: Path, kind: str, content: Any) -> None:
    folder = a_folder(tmp_path / "m", kind)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / CONFIG).write_bytes(data)
    with pytest.raises(InputError, match=CONFIG) as said:
        rwkvx.load(folder)
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize("added", [(-1, "x"), (70, "G"), (5, "x"), (65536, "")])
def test_ids_that_no_text_comes_back_from(tmp_path: Path, added: tuple[int, str]) -> None:
    folder = a_folder(tmp_path / "m", "world")
    decoder = {str(added[0]): token(added[1])}
    (folder / CONFIG).write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(InputError, match=f"id {added[0]} cannot be that of the added token"):
        rwkvx.load(folder)


def test_too_many_tokens_for_the_embedding(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "m", "bytes")
    decoder = {"300": token("<x>")}
    (folder / CONFIG).write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(InputError, match="has 296 rows, but the tokenizer 'bytes' has 301 ids"):
        rwkvx.load(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [CONFIG, "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, kind: str, name: str) -> None:
    folder = a_folder(tmp_path / "m", kind)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name}: it is a pipe"):
        rwkvx.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_is_run(tmp_path: Path, kind: str) -> None:
    folder = a_folder(tmp_path / "m", kind)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    (folder / "modeling_rwkvx.py").write_bytes((folder / "evil.py").read_bytes())
    for auto_map in ({"AutoTokenizer": ["evil.T", "evil.T"]}, ["evil.T"], "evil.T"):
        told = {"auto_map": auto_map, "pad_token": "<pad>", "trust_remote_code": True}
        (folder / CONFIG).write_text(json.dumps(told))
        assert rwkvx.load(folder).tokenizer.pad_token == "<pad>"
    assert not (tmp_path / "ran").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
NAMES = (
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "pad_token",
    "eos_token", "x_token", "chat_template", "model_max_length", "padding_side", "auto_map",
    "split_special_tokens", "model_input_names", "tokenizer_class", "vocab_file", "backend",
    "clean_up_tokenization_spaces", "init_inputs", "model_specific_special_tokens",
)  # fmt: skip
DECODERS = st.dictionaries(
    st.integers(-3, 400).map(str), st.fixed_dictionaries({"content": st.text(max_size=3) | JSON})
)


@pytest.mark.parametrize("kind", ["bytes", "file"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_description_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"any-{kind}"
    if not folder.exists():
        a_folder(folder, kind)
    told = data.draw(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
    if data.draw(st.booleans()):
        told["added_tokens_decoder"] = data.draw(DECODERS)
    (folder / CONFIG).write_text(json.dumps(told))
    try:
        tokenizer = rwkvx.load(folder).tokenizer
    except InputError:  # anything else would be an error of ours
        return
    ids = tokenizer.encode("It was 今天", add_special_tokens=False)
    assert tokenizer.decode(ids) == "It was 今天"
    assert max(ids) < len(get_tokenizer("bytes")) + 200
