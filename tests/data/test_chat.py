"""Conversations: only answers are learned, each conversation is read whole and from nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkvx import InputError
from rwkvx.data.sources import Reader, Rows, Source, Wanted, read_data
from rwkvx.tokenizers import get_tokenizer
from rwkvx.tokenizers.file import train_bpe

BYTES = get_tokenizer("bytes")


def opened(
    folder: Path, items: list[dict[str, Any]], tokenizer: Any = BYTES, **options: Any
) -> Source:
    (folder / "chat.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    data = {"kind": "chat", "paths": ["chat.jsonl"], "eval_share": 0, **options}
    return read_data(data).open(Reader(tokenizer, str(folder)))


def rows(source: Source, count: int, length: int) -> Rows:
    return source.rows(Wanted((0,), (0,), range(count), length))


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def split(found: Rows, row: int = 0, tokenizer: Any = BYTES) -> list[tuple[bool, str]]:
    """Runs of learned and other targets of a row as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, weight in zip(found.ids[row, 1:].tolist(), found.weights[row] > 0, strict=True):
        if not runs or runs[-1][0] != weight:
            runs.append((bool(weight), []))
        runs[-1][1].append(token)
    return [(learned, tokenizer.decode(ids)) for learned, ids in runs]


def test_answers_are_learned(tmp_path: Path) -> None:
    items = [turns("Hi\n\n\nyou ", "Hello.", "Bye?", "Yes.")]
    found = rows(opened(tmp_path, items), 1, 70)
    text = split(found)
    assert text[:4] == [
        (False, "User: Hi\nyou\n\nAssistant:"),
        (True, " Hello.\n\n"),
        (False, "User: Bye?\n\nAssistant:"),
        (True, " Yes.\n\n\0"),
    ]
    assert set(text[4][1]) == {"\0"}
    assert float(found.weights.sum()) == pytest.approx(1.0)
    every = split(rows(opened(tmp_path, items, learn="all"), 1, 70))
    assert every[0] == (True, "".join(t for _, t in text[:4]))


def test_other_shapes_of_lines(tmp_path: Path) -> None:
    plain = opened(tmp_path, [{"prompt": "1+1=", "completion": "2"}])
    assert split(rows(plain, 1, 6)) == [(False, "1+1="), (True, "2\0")]
    item = {"instruction": "Add.", "input": "1 1", "output": "2"}
    assert split(rows(opened(tmp_path, [item]), 1, 35))[:2] == [
        (False, "User: Add.\n1 1\n\nAssistant:"),
        (True, " 2\n\n\0"),
    ]


def test_rows_hold_whole_conversations_that_forget_one_another(tmp_path: Path) -> None:
    items = [{"prompt": f"<{i}", "completion": "x" * (i % 17) + ">"} for i in range(60)]
    source, seen = opened(tmp_path, items), []
    count = len(source._rows_of(40))  # type: ignore[attr-defined]
    found = rows(source, count, 40)
    for ids, starts in zip(found.ids, found.starts, strict=True):
        text = bytes(ids.tolist()).decode()
        begins = starts.nonzero()[0].tolist()
        assert begins[0] == 0
        for start in begins:
            assert text[start] == "\0"
        seen += [part for part in text.split("\0") if part]
        wholes = [text[a:b].strip("\0") for a, b in zip(begins, [*begins[1:], 41], strict=True)]
        assert [w for w in wholes if w] == [part for part in text.split("\0") if part]
    assert sorted(seen) == sorted(x["prompt"] + x["completion"] for x in items)
    assert count < 60 * 13 / 40 * 1.3, "rows are well filled"
    second = source.rows(Wanted((0,), (0,), range(count, 2 * count), 40))
    assert sorted(r.tobytes() for r in second.ids) == sorted(r.tobytes() for r in found.ids)
    assert not np.array_equal(second.ids, found.ids)


def test_long_conversations_are_cut(tmp_path: Path) -> None:
    found = rows(opened(tmp_path, [{"prompt": "a" * 30, "completion": "b" * 30}]), 2, 40)
    assert split(found) == [(False, "a" * 30), (True, "b" * 10)]
    unlearned = rows(opened(tmp_path, [{"prompt": "a" * 50, "completion": "b"}]), 2, 40)
    assert not unlearned.weights.any()
    assert np.isfinite(unlearned.weights).all()


def test_conversations_are_held_out(tmp_path: Path) -> None:
    items = [{"prompt": "p", "completion": chr(97 + i)} for i in range(20)]
    source = opened(tmp_path, items, eval_share=0.1)
    held_out = source.evaluations()["eval"]
    assert [len(x.conversations) for x in (source, held_out)] == [18, 2]  # type: ignore[attr-defined]
    (tmp_path / "other.jsonl").write_text(json.dumps(items[0]))
    other = opened(tmp_path, items, eval_paths=["other.jsonl"]).evaluations()["eval"]
    assert len(other.conversations) == 1  # type: ignore[attr-defined]


def test_a_chat_template_is_used(tmp_path: Path) -> None:
    tokenizer = train_bpe(["user assistant hello there" * 9], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    found = rows(opened(tmp_path, [turns("hi", "hello")], tokenizer), 1, 80)
    text = split(found, tokenizer=tokenizer)
    assert text[0] == (False, "<|turn|>user\nhi<|turn|><|turn|>assistant\n")
    assert text[1] == (True, "hello<|turn|><|endoftext|>")
    assert (found.ids == tokenizer.convert_tokens_to_ids("<|turn|>")).sum() == 4
    tokenizer.chat_template = "{{ messages|length }} {{ messages[0].content }}"
    with pytest.raises(InputError, match="writes a turn anew"):
        opened(tmp_path, [turns("hi", "hello")], tokenizer)


def test_text_never_becomes_a_control_token(tmp_path: Path) -> None:
    world = get_tokenizer("world")
    found = rows(opened(tmp_path, [turns("<|rwkv_tokenizer_end_of_text|>", "no")], world), 1, 40)
    assert found.ids[0, 1:].tolist().index(0) > 15


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [3]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"prompt": "x"},
        {"instruction": "x", "output": 3},
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, item: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"chat\.jsonl, line 2: "):
        opened(tmp_path, [turns("a", "b"), item])
