"""A thousand broken configs: none is worse than one line of at most 300 characters."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import Writer

from rwkvx import InputError
from rwkvx.training.config import field_names, parse_config, read_config
from rwkvx.training.plan import check_memory, make_plan

COUNT = 1000
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 0.5),
    *(10**9, 10**12, -(10**12), 2**70, 10**400, 1e300, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "1e-3", "nan", "null", "\0", "a\nb", "\ud800", "x" * 10_000, "../..", "~nobody/x"),
    *("cpu", "cuda:99", "[", "{}", "rwkv7"),
    *([], {}, [[]], [0, 2], [1, 2, 3], ["a"], {"a": 1}, {1: 2}, [None], {None: None}, [{}]),
    *({"kind": "text"}, b"\xff"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of nested data."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, x in inner:
        found += places(x, (*path, key))
    return found


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutate(data: dict[str, Any], rng: random.Random) -> None:
    """Change one or two things."""
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(places(data))
        parent: Any = data
        for key in path[:-1]:
            parent = parent[key]
        what = rng.random()
        if what < 0.75:
            parent[path[-1]] = copy.deepcopy(rng.choice([*STRANGE, nested(50)]))
        elif what < 0.85:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[rng.choice(["kind", "weight", "paths", "zebra", 3, "x" * 500])] = rng.choice(
                STRANGE
            )
        else:
            parent.append(copy.deepcopy(parent[0] if parent else None))


def try_config(data: Any) -> None:
    """Read it, and plan it: what cannot be run must be found out by then."""
    config = parse_config(data, "config")
    make_plan(config)
    check_memory(config)
    assert parse_config(config.to_dict(), "config") == config


def refusal(read: Callable[[], Any]) -> str:
    """The message that it ends with; anything else than an InputError ends the test."""
    try:
        read()
    except InputError as error:
        return str(error)
    return ""


def test_a_thousand_mutations(write_config: Writer) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng, refused = random.Random(seed), 0
    mixture = [{"kind": "text", "paths": ["a"]}, {"kind": "passkey", "prose": 0, "weight": 2}]
    chat = {"kind": "chat", "paths": ["a"], "learn": "all"}
    bases = [read_config(write_config(data=d)).to_dict() for d in (mixture, chat)]
    bases.append(yaml.safe_load(write_config().read_text()))
    for number in range(COUNT):
        data = copy.deepcopy(bases[number % len(bases)])
        mutate(data, rng)
        text = refusal(lambda data=data: try_config(data))  # type: ignore[misc]
        refused += bool(text)
        assert len(text) <= 300, (seed, number, text)
        assert text.isprintable(), (seed, number, text)
    assert COUNT / 2 < refused < COUNT


@pytest.mark.parametrize("value", STRANGE, ids=lambda x: repr(x)[:12])
def test_strange_values_on_the_command_line(write_config: Writer, value: Any) -> None:
    path = write_config()
    for name in field_names():
        try:
            text = yaml.safe_dump(value) if not isinstance(value, str) else value
        except ValueError:  # more digits than Python prints
            text = "9" * 5000
        message = refusal(lambda name=name, text=text: read_config(path, {name: text}))  # type: ignore[misc]
        assert len(message) <= 300
        assert message.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"a: " + b"[" * 3000,
        b"a: " + b"{a: " * 3000,
        b"name: &x [*x]",
        b"x: &a [1, 2]\n" + b"".join(b"y%d: &b%d [*a, *a]\n" % (i, i) for i in range(9)),
        b"\xff\xfe\x00\x00",
        b"name: \xff\xfe",
        b"? [1]\n: 2",
        b"!!python/object/apply:os.system ['true']",
        b"a: 1\na: 2",
        b"steps: 0x" + b"f" * 9000,
        b"2001-99-99: 1",
        b"---\na: 1\n---\nb: 2\n",
        b"\0",
        b"",
        b"3",
    ],
)
def test_strange_files(tmp_path: Path, content: bytes) -> None:
    for name in ("a.yaml", b"n\xe4me.yaml".decode("utf-8", "surrogateescape")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_config(path)
        assert len(str(caught.value)) <= 300
        assert str(caught.value).isprintable()
