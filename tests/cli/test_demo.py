"""`rwkvx demo` on a tiny random model: both parts, what is said without data, and bad input."""

import json
from pathlib import Path

import pytest
import torch

import rwkvx
from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli import demo, main


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with random weights; and prompts short enough for a test."""
    config = rwkvx.ModelConfig(
        256, 64, ("rwkv7", "sparse"), chunk_size=16, topk=2, tokenizer="bytes"
    )
    random = rwkvx.init_weights(rwkvx.Model(config))
    with torch.no_grad():
        for weight in random.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    save_folder(random, tmp_path / "tiny-model")
    monkeypatch.setattr(demo, "QUICK_LENGTHS", "300,400")
    monkeypatch.setattr(demo, "QUICK_DEPTHS", 2)
    monkeypatch.delenv("RWKVX_DATA", raising=False)
    return tmp_path / "tiny-model"


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(["demo", *arguments])
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def write_data(folder: Path) -> Path:
    """Two items of each task, in the layout of the data folder."""
    texts = [{"text": "the cat sat on the mat"}, {"text": "a dog ate the bone"}]
    goals = [{"goal": "open a door", "sol1": "pull", "sol2": "sing"}] * 2
    for name, rows in (
        ("lambada_openai/lambada_test.jsonl", texts),
        ("piqa/valid.jsonl", goals),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n")
    return folder


def test_both_parts_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    out, data = tmp_path / "out", write_data(tmp_path / "data")
    arguments = ["--quick", "--model", str(model), "--out", str(out), "--data", str(data)]
    status, printed, err = run(arguments, capsys)
    assert status == 0, err
    results = json.loads((out / "passkey/results.json").read_text())
    assert results["total"]["asked"] == 2 * 2 * 2
    assert results["model"] == "tiny-model"
    files = (
        "passkey/heatmap.png",
        "passkey/report.md",
        "lm-quick/scores.png",
        "lm-quick/report.md",
    )
    for name in files:
        assert (out / name).stat().st_size > 0
        assert str(out / name) in printed
    assert "piqa" in printed
    assert printed.splitlines()[-1].startswith("done in ")


def test_without_data_the_first_part_stands(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    arguments = ["--quick", "--model", str(model), "--out", str(out)]
    status, printed, _ = run([*arguments, "--data", str(tmp_path / "empty")], capsys)
    assert status == 0
    assert (out / "passkey/heatmap.png").exists()
    left_out = [line for line in printed.splitlines() if line.startswith("left out: ")]
    wanted = ["lambada_openai/lambada_test.jsonl", "long_docs/tolstoy_war_and_peace.txt.xz"]
    for line, path in zip(left_out, wanted, strict=True):
        assert f"name a folder that holds {path}" in line
    assert not (out / "lm/report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--data", "no/such/folder"], "is not a folder"),
        (["--model", "MODEL", "--out", "/dev/null/x"], "cannot open"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model) if x == "MODEL" else x for x in arguments]
    status, _, err = run(["--quick", *arguments], capsys)
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_time_in_words() -> None:
    assert [demo.minutes(x) for x in (0.4, 59.4, 60, 314)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "5 min 14 s",
    ]
