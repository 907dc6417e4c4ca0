"""`init` names the model that training starts from, and its architecture comes with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import rwkvx
from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli import main
from rwkvx.training.config import parse_config, read_config

Writer = Callable[..., Path]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    found = yaml.safe_load(out)
    assert isinstance(found, dict)
    return found


def test_no_copy_of_the_model_block_is_needed(
    write_config: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = rwkvx.init_weights(rwkvx.Model(read_config(write_config()).model))
    save_folder(model, tmp_path / "start")
    path = write_config("second", init=str(tmp_path / "start"))
    without = yaml.safe_load(path.read_text())
    del without["model"]
    path.write_text(yaml.safe_dump(without))
    assert read_config(path).model == model.config
    assert read_config(path, {"model.topk": "3"}).model.topk == 3
    for arguments in ([str(path), "--show-config"], ["--show-config", str(path)]):
        told = shown(arguments, capsys)
        assert told["model"] == model.config.to_dict()
        assert parse_config(told, "shown") == read_config(path)
