"""Training configs: every field checked, overridden by dotted name."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from running import BASE, TEXT

from rwkvx import InputError, Model, ModelConfig, init_weights
from rwkvx.checkpoint.folder import save_folder
from rwkvx.data.sources.text import Text
from rwkvx.data.tokens import write_tokens
from rwkvx.files import read_yaml
from rwkvx.tokenizers import get_tokenizer
from rwkvx.training.config import StageConfig, field_names, parse_config, read_config
from rwkvx.training.trainer import Trainer

Writer = Callable[..., Path]


def test_values_arrive(write_config: Writer) -> None:
    config = read_config(write_config())
    assert config.model.pattern == ("rwkv7", "sparse")
    assert config.stages[1] == StageConfig(4, 40, 2, 0.5)
    assert config.total_steps == 6
    assert [config.stage(s).length for s in range(7)] == [24, 24, 40, 40, 40, 40, 40]
    assert read_config(write_config(), {"steps": "4"}).total_steps == 4
    assert read_config(write_config(), {"steps": "40"}).total_steps == 6
    assert read_config(write_config(out=""), {}).folder == Path("runs/small")


SHIPPED = sorted(Path(str(files("rwkvx_configs"))).glob("*.yaml"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what shipped configs start from: text, conversations, tokens, a model."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "text.txt").write_text(TEXT * 4)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    write_tokens(folder / "text.tokens", [(TEXT * 4, False), (TEXT, True)], get_tokenizer("bytes"))
    config = ModelConfig.from_dict(BASE["model"])
    save_folder(init_weights(Model(config), 0), folder / "model")
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_run(path: Path, shared: Path, tmp_path: Path) -> None:
    """Two steps of each stage on a tiny model and tiny data; all else is as it is shipped."""
    found = read_yaml(path)
    pattern = found.get("model", BASE["model"])["pattern"]
    small = {**BASE["model"], "pattern": list(dict.fromkeys(pattern))}  # a block of each kind
    places = {
        "text": {"paths": [str(shared / "text.txt")]},
        "passkey": {"paths": [str(shared / "text.txt")]},
        "tokens": {"path": str(shared / "text.tokens")},
        "chat": {"paths": [str(shared / "chat.jsonl")]},
    }
    data = found["data"] if isinstance(found["data"], list) else [found["data"]]
    length = 320 if any(source["kind"] == "passkey" for source in data) else 32
    if found.get("init"):
        found |= {"init": str(shared / "model"), "model": None}
    else:
        found["model"] = small
    for source in data:
        source |= places[source["kind"]]
    for stage in found["stages"]:
        cut = {"recurrent_length": length // 2} if stage.get("recurrent_length") else {}
        cut |= {"long_ce_window": 8} if stage.get("long_ce") else {}
        stage |= {"steps": 2, "length": length, "batch": 2, **cut}
    found |= {"out": str(tmp_path / "run"), "tokenizer": "", "device": "cpu", "compile": False}
    found |= {"probe": [300] if found.get("probe") else [], "eval_batches": 1}
    model = Trainer(parse_config(found, str(path))).run()
    assert all(bool(x.isfinite().all()) for x in model.parameters())
    assert found["name"] == path.stem


def test_a_config_as_it_is_spelled_out_is_the_same(write_config: Writer) -> None:
    """Fields that one kind of block brings among them."""
    model = {**BASE["model"], "pattern": ["window", "rwkv7"], "window": 24}
    config = read_config(write_config(model=model, stages=[{"steps": 1, "length": 8, "batch": 1}]))
    assert config.model.option("window") == 24
    assert parse_config(config.to_dict(), "again") == config


def test_shipped_sizes() -> None:
    """What configs say of themselves."""
    config = read_config(Path(str(files("rwkvx_configs"))) / "passkey_tiny.yaml")
    assert max(s.length for s in config.stages) <= 4096


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optimizer.lr", "1e-3", 0.001),  # text in YAML 1.1, which wants 1.0e-3
        ("optimizer.lr", "1", 1.0),
        ("optimizer.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("seed", "7", 7),
        ("precision", "bf16", "bf16"),
        ("gradient_checkpointing", "true", True),
        ("model.pattern", "[rwkv7, rwkv7]", ("rwkv7", "rwkv7")),
        ("model.sparse_kv_heads", "1", 1),
        ("model.sparse_kv_heads", "null", None),
        ("stages", "[{steps: 1, length: 8, batch: 1}]", (StageConfig(1, 8, 1),)),
    ],
)
def test_overrides(write_config: Writer, name: str, text: str, value: Any) -> None:
    assert name in field_names()
    found: Any = read_config(write_config(), {name: text})
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_data_is_overridden_too(write_config: Writer) -> None:
    config = read_config(write_config(), {"data.paths": "[a.txt, b.txt]"})
    assert config.data.parts[0].options == Text(("a.txt", "b.txt"))
    mixed = [{"kind": "text", "paths": ["a"]}, {"kind": "text", "paths": ["b"], "weight": 2}]
    config = read_config(write_config(data=mixed), {"data.1.paths": "[c]", "data.0.weight": "3"})
    assert [p.weight for p in config.data.parts] == [3.0, 2.0]
    assert config.data.parts[1].options == Text(("c",))


def test_a_stage_may_change_the_data(write_config: Writer) -> None:
    """What it names on top of the run's data, or other data."""
    stage = {"steps": 1, "length": 8, "batch": 1}
    kinds = [
        {},
        {"limit_mb": 2},
        {"kind": "passkey", "prose": 0},
        [{"kind": "text", "paths": ["c"]}],
    ]
    stages = [stage if not own else {**stage, "data": own} for own in kinds]
    config = read_config(write_config(data={"kind": "text", "paths": ["a"]}, stages=stages))
    found = [config.data_of(s) for s in config.stages]
    assert found[0] is config.data
    assert found[1].parts[0].options == Text(("a",), limit_mb=2.0)
    assert found[2].parts[0].kind == "passkey"
    assert found[3].parts[0].options == Text(("c",))


def test_overrides_reach_what_the_file_leaves_out(write_config: Writer) -> None:
    config = read_config(write_config(optimizer={}), {"optimizer.clip": "2"})
    assert config.optimizer.clip == 2.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("depth", "1", "unknown key 'depth'"),
        ("optimizer.speed", "1", "unknown key 'speed'"),
        ("sequence_paralel", "2", "did you mean sequence_parallel?"),
        ("stages", "[{steps: 1, lenght: 8, batch: 1}]", "did you mean length?"),
        ("model.depth", "1", "unknown key 'depth'"),
        ("stages", "[{steps: 1, length: 8, batch: 1, rows: 2}]", "unknown key 'rows'"),
        ("steps", "1.5", '"steps" - should be "int"'),
        ("steps", "-1", "steps must be a whole number from 0"),
        ("steps", "1000000000000", "steps must be a whole number from 0 to 1000000000"),
        ("seed", "true", '"seed" - should be "int"'),
        ("optimizer.lr", "fast", '"optimizer.lr" - should be "float"'),
        ("optimizer.lr", "true", '"optimizer.lr" - should be "float"'),
        ("optimizer.betas", "0.9", '"optimizer.betas" - should be'),
        ("data.paths", "a.txt", '"paths" - should be'),
        ("data.prose", "0.5", "unknown key 'prose' in data (text)"),
        ("stages", "{steps: 1}", "stages must be a list of stages"),
        ("stages", "[]", "at least one stage"),
        ("stages", "[{steps: 0, length: 8, batch: 1}]", "steps must be a whole number from 1"),
        ("stages", "[{steps: 1, length: 8}]", "batch"),
        (
            "stages",
            "[{steps: 1, length: 8, batch: 1, state_passing: 2}]",
            "state_passing must be a number from 0 to 1",
        ),
        (
            "stages",
            "[{steps: 1, length: 8, batch: 1, topk: -1}]",
            "topk must be a whole number from 0",
        ),
        ("stages", "[{steps: 1, length: 8, batch: 1, numbers: 1}]", "unknown key 'numbers'"),
        ("stages", "[{steps: 1, length: 8, batch: 1, data: {prose: 1}}]", "in stages[0].data"),
        ("stages", "[3]", "stages[0] holds no mapping"),
        ("stages.0.steps", "0", "steps must be a whole number from 1"),
        ("stages.7.steps", "1", "cannot set stages.7.steps"),
        ("precision", "fp8", "precision must be one of"),
        ("data.kind", "images", "data.kind must be one of"),
        ("optimizer.lr", ".nan", "lr must be a number from 0 to 10"),
        ("optimizer.betas", "[0, 2]", "betas must be two numbers from 0 to below 1"),
        ("optimizer.schedule", "linear", "schedule must be one of"),
        ("accumulate", "0", "accumulate must be a whole number from 1"),
        ("average", "1", "average must be a number from 0 to"),
        ("eval_batches", "0", "eval_batches must be a whole number from 1"),
        ("model.width", "17", "width 17 is no multiple of head_size 8"),
        ("model.pattern", "[mamba]", "'mamba'"),
        ("name.first", "x", "cannot set name.first: name is no mapping"),
        ("seed", "[1", "the value of seed is damaged"),
    ],
)
def test_mistakes_are_one_clear_line(
    write_config: Writer, name: str, text: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write_config(), {name: text})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"{", b"\xff\xfe\x00", b"name: [1"])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        read_config(path)
    with pytest.raises(InputError, match=r"cannot read .*missing\.yaml"):
        read_config(tmp_path / "missing.yaml")


def test_missing_fields_are_named(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("name: x\n")
    with pytest.raises(InputError, match='missing value for field "model"'):
        read_config(path)
