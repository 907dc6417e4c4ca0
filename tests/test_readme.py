"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

from rwkvx.cli import main

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, beside the folder that `rwkvx convert` makes."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "passkey-tiny", "my-model"])
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), {})
    assert (tmp_path / "my-copy" / "config.json").is_file()
