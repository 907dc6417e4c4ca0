"""What does not fit is said before it is asked for."""

import pytest

import rwkvx
from rwkvx import InputError
from rwkvx.cli import main
from rwkvx.memory import check_room, free_memory


def test_room() -> None:
    free = free_memory()
    assert 1e8 < free < 1e14
    check_room(free / 2, "half of it")
    with pytest.raises(InputError, match=r"^a mountain takes 1,000,000\.0 GB, this machine has "):
        check_room(1e15, "a mountain")


def test_a_prompt_whose_state_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """passkey-tiny keeps 2 kB of each token: refused before any of them is read."""
    monkeypatch.setattr("rwkvx.memory.free_memory", lambda: 10**7)
    monkeypatch.setattr(rwkvx.Model, "forward", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(SystemExit) as status:
        main(["generate", "x" * 100_000, "--model", "passkey-tiny"])
    assert status.value.code == 1
    assert "the state after a prompt of 100,000 tokens takes 0." in capsys.readouterr().err
