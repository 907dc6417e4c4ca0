"""A thousand mutated journals of an lm-eval run: read, or refused in one line, and never wrong."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_model

from rwkvx.errors import InputError
from rwkvx_evals.journal import Journal

pytest.importorskip("lm_eval")

from rwkvx_evals.lm.answers import check_row, score_of, text_of
from rwkvx_evals.lm.generation import Generator, Prompt
from rwkvx_evals.lm.options import Options
from rwkvx_evals.lm.requests import Request
from rwkvx_evals.lm.scoring import Scorer

REQUESTS = [Request((1, 2, n), (3, 4)) for n in range(6)]
PROMPTS = [Prompt((5, n), Options(limit=2)) for n in range(3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a finished run."""
    path = tmp_path_factory.mktemp("journal") / "requests.jsonl"
    with Journal(path, check_row) as journal:
        scorer = Scorer(tiny_model(), 256, journal=journal)
        scorer.score(REQUESTS)
        Generator(scorer, 0).generate(PROMPTS)
    return path.read_bytes()


Mutation = Callable[[bytes, random.Random], bytes]


def bytes_replaced(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at + rng.randrange(9) :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def field_changed(content: bytes, rng: random.Random) -> bytes:
    """One field of one row: gone, or of another kind."""
    rows = [json.loads(line) for line in content.splitlines()]
    row = rng.choice(rows)
    name = rng.choice(list(row))
    values = [None, True, -3, 1e999, "x", [], {}, "\ud800", 10**500, float("nan"), "ok", "oom",
              "generate", "loglikelihood", rng.choice(rows)["key"]]  # fmt: skip
    if rng.random() < 0.3:
        del row[name]
    else:
        row[name] = rng.choice(values)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    return text.encode("utf-8", "surrogatepass")


def lines_moved(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    hostile = [b"[" * 50_000, b"{}", b"\0" * 40, b"9" * 5000, b'{"key":' * 5000, b"", b"null",
               b'{"key": "k", "kind": ["generate"], "status": {}}', b"\xff\xfe", b"\r"]  # fmt: skip
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(hostile) + b"\n")
    return b"".join(lines)


MUTATIONS: list[Mutation] = [bytes_replaced, cut, field_changed, lines_moved]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutated_journals(whole: bytes, mutate: Mutation, tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tmp_path / "requests.jsonl"
    refused = 0
    for _ in range(250):
        path.write_bytes(mutate(whole, rng))
        began = time.monotonic()
        try:
            journal = Journal(path, check_row)
        except InputError as error:
            refused += 1
            message = str(error)
            assert message.isprintable()
            assert len(message) <= 300
        else:
            with journal:
                for row in journal.rows.values():
                    answers = (score_of(row), text_of(row))
                    assert answers.count(None) == (2 if row["status"] == "oom" else 1)
        assert time.monotonic() - began < 20
    assert mutate is cut or refused > 20


def test_a_row_of_another_kind_answers_nothing(whole: bytes, tmp_path: Path) -> None:
    """Keys of scores on rows of texts: the answers are computed again."""
    rows = [json.loads(line) for line in whole.splitlines()]
    texts = [row for row in rows if row["kind"] == "generate"]
    scores = [row for row in rows if row["kind"] == "loglikelihood"]
    for text, score in zip(texts, scores, strict=False):
        text["key"] = score["key"]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*scores, *texts)))
    with Journal(path, check_row) as journal:
        scorer = Scorer(tiny_model(), 256, journal=journal)
        found = scorer.score(REQUESTS)
    with Journal(tmp_path / "fresh.jsonl", check_row) as journal:
        expected = Scorer(tiny_model(), 256, journal=journal).score(REQUESTS)
    assert found == expected
