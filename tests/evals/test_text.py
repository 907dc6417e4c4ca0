"""Loss by position, and a model shipped with what was measured of it."""

import json
import lzma
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli import main
from rwkvx.tokenizers import get_tokenizer
from rwkvx_evals.text.positions import BOOK, loss_by_position

TEXT = "Well, Prince, so Genoa and Lucca are now just family estates. " * 40


class Guesser:
    """Knows nothing of the first `after` tokens, and every later one with a certain chance."""

    tokenizer = get_tokenizer("bytes")
    config = SimpleNamespace(vocab_size=256)

    def __init__(self, text: str, after: int) -> None:
        self.ids, self.after = list(text.encode()), after

    def fingerprint(self) -> str:
        return "guesser"

    def __call__(self, ids: torch.Tensor, state: Any = None, logits: str = "all") -> Any:
        """The state is what was read; the next byte is looked up, its logit ln 255 above others."""
        read = [*(state or []), *ids[0].tolist()]
        found = torch.zeros(1, ids.shape[1], 256)
        start = bytes(self.ids).find(bytes(read))
        for i in range(ids.shape[1]):
            seen = len(read) - ids.shape[1] + i + 1
            if seen > self.after and start + seen < len(self.ids):
                found[0, i, self.ids[start + seen]] = math.log(255)
        return found, read


def test_losses_stand_at_their_positions() -> None:
    """Unknown: ln 256. Known with chance 1/2: ln 2. Windows are cut into pieces, which leaves no
    trace."""
    text = "".join(chr(97 + i * i % 26) + chr(97 + i // 26 % 26) for i in range(3000))
    found = loss_by_position(Guesser(text, 255), text, 1500, 3, quiet=True)
    assert [(x["from"], x["to"]) for x in found["buckets"]] == [
        (1, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1500),
    ]  # fmt: skip
    for x in found["buckets"]:
        expected = math.log(256) if x["to"] <= 256 else math.log(2)
        assert x["loss"] == pytest.approx(expected, rel=1e-5)
        assert x["stderr"] == pytest.approx(0, abs=1e-6)
    whole = (255 * math.log(256) + 1244 * math.log(2)) / 1499
    assert found["loss"] == pytest.approx(whole, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(whole / math.log(2), rel=1e-5)
    with pytest.raises(InputError, match="too few for a window"):
        loss_by_position(Guesser(text, 0), text, 6001, 1, quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model, two items of each task and a book."""
    config = rwkvx.ModelConfig(
        256, 64, ("rwkv7", "sparse"), chunk_size=16, topk=2, tokenizer="bytes"
    )
    save_folder(rwkvx.init_weights(rwkvx.Model(config)), tmp_path / "trained")
    (tmp_path / "trained" / "README.md").write_text("# trained\n\n## Data\n\nx\n\n## Limits\n\ny\n")
    goals = [{"goal": "open a door", "sol1": "pull", "sol2": "sing"}] * 2
    texts = [{"text": "the cat sat on the mat"}, {"text": "a dog ate the bone"}]
    for name, rows in (
        ("lambada_openai/lambada_test.jsonl", texts), ("piqa/valid.jsonl", goals)
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n1\n")
    (tmp_path / BOOK).parent.mkdir()
    (tmp_path / BOOK).write_bytes(lzma.compress(TEXT.encode()))
    return tmp_path


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_a_model_is_shipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    command = [
        "ship", str(folder / "trained"), str(folder / "small"), "--data", str(folder),
        "--out", str(folder / "out"), "--length", "128", "--rows", "2",
    ]  # fmt: skip
    status, out, err = run(command, capsys)
    assert status == 0, err
    assert "bits per byte" in out
    card = (folder / "small" / "README.md").read_text()
    order = ("## Data", "## Measured", "| piqa, acc |", "| 64 to 128 |", "## Limits")
    assert [card.index(x) for x in order] == sorted(card.index(x) for x in order)
    shipped = rwkvx.load(folder / "small", dtype="bfloat16", verify=True)
    assert shipped.fingerprint() == rwkvx.load(folder / "trained", dtype="bfloat16").fingerprint()
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("small", "trained")]
    assert sizes[0] < 0.55 * sizes[1]
    status, _, err = run(command, capsys)
    assert (status, "exists already" in err) == (1, True)


def test_four_architectures_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal in all but what mixes over time; a second call measures and trains nothing again."""
    pytest.importorskip("lm_eval")
    import yaml

    text = folder / "train.txt"
    text.write_text(TEXT)
    config = {
        "name": "base",
        "model": {"vocab_size": 256, "tokenizer": "bytes", "width": 64, "head_size": 32,
                  "pattern": ["rwkv7", "rwkv7", "sparse"], "chunk_size": 16, "topk": 2},
        "data": {"kind": "text", "paths": [str(text)], "eval_share": 0.2},
        "stages": [{"steps": 2, "length": 128, "batch": 2, "state_passing": 0.5}],
        "eval_batches": 1,
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    out = folder / "variants"
    command = [
        "variants", str(folder / "base.yaml"), "--data", str(folder), "--out", str(out),
        "--factor", "2", "--rows", "2", "--depths", "2", "--keys", "1", "--limit", "2",
    ]  # fmt: skip
    status, _, err = run(command, capsys)
    assert status == 0, err
    report = (out / "report.md").read_text()
    for label in ("RWKV-7 alone", "hybrid, key convolution", "dense attention"):
        assert label in report
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    names = ("rwkv7", "hybrid", "hybrid-conv", "dense")
    kinds = ({"rwkv7"}, {"rwkv7", "sparse"}, {"rwkv7", "sparse"}, {"window"})
    sizes, before = [], {}
    for name, wanted in zip(names, kinds, strict=True):
        model = rwkvx.load(out / f"{name}-seed-0" / f"{name}-step-2")
        assert set(model.config.pattern) == wanted
        sizes.append(sum(x.numel() for x in model.parameters()))
        files = (out / f"{name}-seed-0").rglob("*.json*")
        before |= {p: p.stat().st_mtime_ns for p in files}
    assert model.config.option("window") > 10**6
    status, _, err = run(command, capsys)
    assert status == 0, err
    assert {p: p.stat().st_mtime_ns for p in before} == before
