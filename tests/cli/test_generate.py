"""Sampling, and ``rwkvx generate`` over a model that is a table."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkvx
from rwkvx.cli import main
from rwkvx.errors import InputError
from rwkvx.sampling import PIECE_TOKENS, check_logits, generate, pick_token
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
    ("option", "value", "words"),
    [
        ("--temperature", "-1", "a number from 0 to 1e+09, got -1.0"),
        ("--temperature", "nan", "a number from 0 to 1e+09, got nan"),
        ("--temperature", "inf", "a number from 0 to 1e+09, got inf"),
        ("--temperature", "hot", "a number from 0 to 1e+09, got 'hot'"),
        ("--top-p", "0", "a number above 0 and up to 1, got 0.0"),
        ("--top-p", "1.5", "a number above 0 and up to 1, got 1.5"),
        ("--max-tokens", "-1", "a whole number from 0 to 16777216, got -1"),
        ("--max-tokens", "1" + 30 * "0", "a whole number from 0 to 16777216, got 1000"),
        ("--seed", str(2**64), f"a whole number from 0 to {2**63 - 1}, got {2**64}"),
        ("--seed", "9" * 6000, f"a whole number from 0 to {2**63 - 1}, got '999"),
        ("--dtype", "float8", "'float8' is not one of 'float32'"),
    ],
)
def test_bad_values(
    option: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line before anything is loaded."""
    model = Speaker(b"")
    assert run(["x", option, value], model, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: Invalid value for '{option}': ")
    assert words in err
    assert err.endswith("(see: rwkvx generate --help)\n")
    assert len(err) <= 301
    assert not model.read


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-320, 5e-324, 1e-3, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "in float16: try dtype bfloat16 or float32"),
        (torch.bfloat16, "in bfloat16: try dtype float32"),
        (torch.float32, "in float32: try dtype float64"),
    ],
)
def test_logits_that_are_not_finite_are_one_error(
    dtype: torch.dtype, advice: str, bad: float, temperature: float
) -> None:
    logits_V = torch.zeros(20, dtype=dtype)
    logits_V[7] = bad
    for draw in (
        lambda: pick_token(logits_V, temperature, 1.0),
        lambda: list(generate(flat(logits_V), [1], max_tokens=3, temperature=temperature)),
        lambda: check_logits(logits_V.expand(2, 3, -1)),
    ):
        with pytest.raises(InputError, match=advice):
            draw()


def test_the_command_ends_in_that_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has been printed stays, and the line stands alone."""

    class Sick(Speaker):
        def __call__(self, ids_BT: Tensor, state: Any = None, logits: str = "all") -> Any:
            out_BTV, state = super().__call__(ids_BT, state, logits)
            return out_BTV if len(self.read) < 3 else out_BTV * torch.nan, state

    for temperature in ("0", "1"):
        assert run(["a", "--temperature", temperature], Sick(b"bcd"), monkeypatch) == 1
        out, err = capsys.readouterr()
        assert out == "abc\n"
        assert err.startswith("error: the model's logits hold NaN or infinities in float32: try")
        assert err.count("\n") == 1


@pytest.mark.parametrize("temperature", [1e-45, 1e-320, 5e-324])
def test_the_smallest_temperatures_take_the_largest_logit(temperature: float) -> None:
    logits_V = torch.randn(100) * 1e3
    draws = {pick_token(logits_V, temperature, 1.0) for _ in range(20)}
    assert draws == {int(logits_V.argmax())}


def test_a_long_prompt_is_read_in_pieces_and_told() -> None:
    read, told = [], []

    def model(ids_BT: Tensor, state: int | None, logits: str) -> tuple[Tensor, int]:
        read.append((ids_BT.shape[1], logits, state))
        return torch.zeros(1, 1, 9), (state or 0) + ids_BT.shape[1]

    ids = [1] * (2 * PIECE_TOKENS + 5)
    assert len(list(generate(model, ids, max_tokens=2, stop_ids=(), advance=told.append))) == 2
    assert [x[:2] for x in read] == [
        (PIECE_TOKENS, "none"), (PIECE_TOKENS, "none"), (5, "last"), (1, "last")
    ]  # fmt: skip
    assert told == [PIECE_TOKENS, PIECE_TOKENS, 5]


def test_a_text_without_tokens_begins_a_document() -> None:
    """Whatever id the model's tokenizer has for it, and 0 without a tokenizer."""
    model = Speaker(b"z")
    list(generate(model, [], max_tokens=1))
    assert model.read == [[0]]
    model = Speaker(b"z")
    model.tokenizer = SimpleNamespace(eos_token_id=77)  # type: ignore[assignment]
    assert list(generate(model, [], max_tokens=3)) == [ord("z"), 0, 0]
    assert model.read[0] == [77]
    assert list(generate(flat(torch.zeros(5)), [], max_tokens=1, stop_ids=())) != []


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
    assert frequencies(1.0, 1e-320)[1] == 1
    assert frequencies(0, 1.0)[1] == 1
