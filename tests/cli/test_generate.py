"""Sampling, and ``rwkvx generate`` over a model that is a table."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkvx
from rwkvx.cli import main
from rwkvx.errors import InputError
from rwkvx.sampling import generate, pick_token
from rwkvx.tokenizers import get_tokenizer


class Speaker:
    """Says a fixed byte string whatever it reads; its state counts the tokens it has read."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.tokenizer = get_tokenizer("bytes")
        self.read: list[list[int]] = []

    def __call__(
        self, ids_BT: Tensor, state: int | None = None, logits: str = "all"
    ) -> tuple[Tensor, int]:
        assert (ids_BT.dtype, logits) == (torch.int64, "last")
        self.read.append(ids_BT[0].tolist())
        step = len(self.read) - 1
        assert (state is None) == (step == 0)
        out_BTV = torch.full((1, 1, 256), -1e9)
        out_BTV[0, 0, self.text[step] if step < len(self.text) else 0] = 0
        return out_BTV, (state or 0) + ids_BT.shape[1]


def run(
    args: list[str], model: Speaker, monkeypatch: pytest.MonkeyPatch, stdin: bytes = b""
) -> int:
    monkeypatch.setitem(vars(rwkvx), "load", lambda *_, **__: model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as status:
        main(["generate", "--model", "speaker", *args])
    return int(status.value.code or 0)


def test_generate_prints_prompt_and_continuation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Speaker("Wörld 👍!".encode())
    assert run(["Hellö "], model, monkeypatch) == 0
    assert capsys.readouterr().out == "Hellö Wörld 👍!\n"
    # The prompt is read once, then one token at a time.
    assert model.read[0] == list("Hellö ".encode())
    assert [len(ids) for ids in model.read[1:]] == [1] * len("Wörld 👍!".encode())


def test_max_tokens_may_cut_a_character(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["a", "--max-tokens", "2"], Speaker("bö".encode()), monkeypatch) == 0
    assert capsys.readouterr().out == "ab\N{REPLACEMENT CHARACTER}\n"
    model = Speaker(b"never")
    assert run(["a", "--max-tokens", "0"], model, monkeypatch) == 0
    assert not model.read


def test_prompt_from_standard_input_may_be_any_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Speaker(b"z")
    assert run(["-"], model, monkeypatch, stdin=b"\xff\x00a") == 0
    assert model.read[0] == [255, 0, 97]


def test_empty_prompt_starts_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Speaker(b"z")
    assert run([""], model, monkeypatch) == 0
    assert model.read[0] == [0]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["--temperature", "nan"], "temperature must be 0 or more, got nan"),
        (["--top-p", "0"], "top-p must be above 0 and at most 1, got 0.0"),
        (["--top-p", "1.5"], "top-p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_values(
    args: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["x", *args], Speaker(b""), monkeypatch) == 1
    assert capsys.readouterr() == ("", f"error: {line}\n")


def flat(logits_V: Tensor) -> Any:
    """A model whose every step has these logits."""
    return lambda ids_BT, state, logits: (logits_V.expand(1, 1, -1), None)


def test_seeds() -> None:
    model = flat(torch.zeros(50))
    first, again, other = (
        list(generate(model, [1], max_tokens=30, seed=seed, stop_ids=())) for seed in (1, 1, 2)
    )
    assert first == again != other
    unseeded = [list(generate(model, [1], max_tokens=30, stop_ids=())) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_stops_before_a_stop_id() -> None:
    model = flat(torch.tensor([0.0, 0.0, 9.0]))
    assert list(generate(model, [1], max_tokens=5, temperature=0, stop_ids=(2,))) == []
    assert list(generate(model, [1], max_tokens=5, temperature=0)) == [2] * 5
    with pytest.raises(InputError, match="max-tokens"):
        generate(model, [1], max_tokens=-1)


def test_temperature_and_top_p() -> None:
    probs_V = torch.tensor([0.1, 0.5, 0.15, 0.25])
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature: float, top_p: float) -> Tensor:
        picks = [pick_token(probs_V.log(), temperature, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(picks), minlength=4) / 4000

    # Four standard errors of a frequency over 4000 draws: 4 * sqrt(0.25 / 4000) = 0.032.
    assert (frequencies(1.0, 1.0) - probs_V).abs().max() < 0.032
    two = torch.tensor([0, 2 / 3, 0, 1 / 3])  # 0.5 falls short of 0.7, 0.5 + 0.25 reaches it
    assert (frequencies(1.0, 0.7) - two).abs().max() < 0.032
    squared = probs_V**2 / (probs_V**2).sum()
    assert (frequencies(0.5, 1.0) - squared).abs().max() < 0.032
    assert frequencies(1.0, 0.01)[1] == 1
    assert frequencies(0, 1.0)[1] == 1
