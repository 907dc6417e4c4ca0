"""`rwkvx eval lm` and `rwkvx lm-eval` as users type them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli import main
from rwkvx.errors import InputError

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from rwkvx_evals.lm.settings import Settings, read_limit, read_mapping, read_samples, read_seeds


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's index of all its tasks and its `pip list` take longer than a test."""
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    # Its handler would keep the standard error of the first test.
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)
    monkeypatch.delenv("RWKVX_DATA", raising=False)
    monkeypatch.delenv("RWKVX_DEBUG", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_folder(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with questions of COPA and BoolQ."""
    folder = tmp_path / "data" / "llm_foundry_eval"
    folder.mkdir(parents=True)
    rows = [
        {"query": f"The cat {n}, because", "choices": ["it ate.", "it sat."], "gold": n % 2}
        for n in range(5)
    ]
    (folder / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Definitions of one's own: COPA's data as questions, and a task that generates."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: aps/super_glue\ndataset_name: copa\ntraining_split: train\n"
        "validation_split: validation\noutput_type: multiple_choice\n"
        'doc_to_text: "{{premise}}"\ndoc_to_choice: "{{[choice1, choice2]}}"\n'
        "doc_to_target: label\nmetric_list:\n  - {metric: acc, aggregation: mean, "
        "higher_is_better: true}\n"
    )
    (folder / "writes.yaml").write_text(
        "task: writes\ndataset_path: aps/super_glue\ndataset_name: copa\n"
        "validation_split: validation\noutput_type: generate_until\n"
        'doc_to_text: "{{premise}}"\ndoc_to_target: "{{choice1}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 3, do_sample: false}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and the last line of standard error."""
    with pytest.raises(SystemExit) as status:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    last = err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    return int(status.value.code or 0), out, last


def test_eval_lm(
    model: Path,
    data: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two models of one name and two settings: four folders, each with its own results."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other" / "model"
    changed = tiny_model()
    with torch.no_grad():
        changed.head.weight += 1
    save_folder(changed, other)
    common = ("--tasks", "mine,writes", "--include-path", tasks, "--data", data)
    for path in (model, other):
        for more in ((), ("--num-fewshot", 2, "--limit", "0.5", "--seed", 7)):
            status, out, err = run(capsys, "eval", "lm", "--model", path, *common, *more)
            assert status == 0, err
            assert "note: writes: greedy" in out
            assert ("other evaluated items" in out) == bool(more)
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(folders) == 4
    assert all(name.startswith("lm-model-") for name in folders)
    assert len({name.split("-")[2] for name in folders}) == 2
    status, _, err = run(
        capsys, "eval", "lm", "--model", other, *common, "--out", tmp_path / "runs" / folders[0],
        "--limit", 1,
    )  # fmt: skip
    assert status == 1
    assert err.startswith("error: ")
    assert "holds results of other" in err
    results = json.loads((tmp_path / "runs" / folders[0] / "results.json").read_text())
    assert results["run"]["versions"]["lm_eval"]
    assert set(results["run"]) >= {"date", "command", "machine", "commit"}


def test_answers_that_are_missing(
    data: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.emb.weight[ord("4")] = 1e38  # finite, but not what comes out of it
        broken.blocks[0].ln1.weight.fill_(1e38)
    save_folder(broken, tmp_path / "broken")
    status, out, err = run(
        capsys, "eval", "lm", "--model", tmp_path / "broken", "--tasks", "mine", "--data", data,
        "--include-path", tasks, "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 1
    assert "requests have no answer" in err
    assert "n/a" in out
    status, _, err = run(
        capsys, "lm-eval", "--data", data, "run", "--model", "rwkvx", "--tasks", "mine",
        "--model_args", f"pretrained={tmp_path / 'broken'}", "--include_path", tasks,
    )  # fmt: skip
    assert status == 1
    assert "no score would be right" in err


def test_bad_input_is_one_line(
    model: Path, data: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"architectures": ["L"], "model_type": "llama"}')
    empty = ("--model", model, "--data", data, "--include-path", tasks, "--out", tmp_path / "o")
    for arguments, said in [
        (("--model", llama), "holds a llama model .* rwkvx lm-eval run --model hf"),
        ((*empty, "--tasks", ","), "names no task"),
        ((*empty, "--tasks", "mine", "--limit", "0"), "--limit '0'"),
        ((*empty, "--tasks", "mine", "--limit", "2.5"), "--limit '2.5'"),
        ((*empty, "--tasks", "mine", "--seed", "1,2"), "--seed '1,2'"),
        ((*empty, "--tasks", "mine", "--samples", "{"), "--samples is neither JSON"),
        ((*empty, "--tasks", "mine", "--apply-chat-template"), "has no chat template"),
        ((*empty, "--tasks", "mine", "--fewshot-as-multiturn"), "needs --apply-chat-template"),
        ((*empty, "--tasks", "mine", "--gen-kwargs", "temperature=0.7"), "needs do_sample=True"),
        ((*empty, "--tasks", "writes", "--gen-kwargs", "num_beams=3"), "num_beams=3 is not supp"),
        ((*empty, "--tasks", "writes", "--gen-kwargs", "x"), "--gen-kwargs: expected"),
        ((*empty, "--tasks", "mine", "--max-length", "4"), "10 of 10 requests are longer"),
    ]:
        status, _, err = run(capsys, "eval", "lm", *arguments)
        assert status == 1, arguments
        assert err.startswith("error: ")
        assert len(err) - len(str(tmp_path)) <= 300
        assert re.search(said, err), (said, err)
    # Nothing came of these: the folder is still free.
    status, _, err = run(capsys, "eval", "lm", *empty, "--tasks", "mine", "--truncate", "left",
                         "--max-length", "9")  # fmt: skip
    assert status == 0, err


def test_a_chat_template(
    model: Path, data: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a file beside the model, and as one that is named: the turns are in the prompts."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    named = tmp_path / "own.jinja"
    named.write_text(template.replace("assistant:", "bot:"))
    common = (
        "eval", "lm", "--model", model, "--data", data, "--tasks", "mine", "--include-path", tasks,
        "--limit", 2, "--num-fewshot", 1, "--log-samples", "--system-instruction", "Be brief.",
    )  # fmt: skip
    status, _, err = run(
        capsys, *common, "--apply-chat-template", named, "--out", tmp_path / "named"
    )
    assert status == 0, err
    (model / "chat_template.jinja").write_text(template)
    status, _, err = run(
        capsys, *common, "--out", tmp_path / "own", "--fewshot-as-multiturn",
        "--apply-chat-template",
    )  # fmt: skip
    assert status == 0, err
    for out, end in (("named", "bot:"), ("own", "assistant:")):
        (file,) = (tmp_path / out / "model").glob("samples_mine_*.jsonl")
        prompt = json.loads(file.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.startswith("\0system: Be brief.|user: The cat")
        assert prompt.endswith(f".|{end}")
        assert prompt.count("user: ") == 2


def test_lm_evals_own_command(
    model: Path, data: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few-shot, samples, own tasks, generation options: the same numbers as `rwkvx eval lm`."""
    status, out, err = run(
        capsys, "lm-eval", "--data", data, "run", "--model", "rwkvx", "--model_args",
        f"pretrained={model},dtype=float32", "--tasks", "mine", "writes", "--include_path", tasks,
        "--num_fewshot", 2, "--log_samples", "--output_path", tmp_path / "theirs", "--gen_kwargs",
        "max_gen_toks=2", "--batch_size", "auto",
    )  # fmt: skip
    assert status == 0, err
    assert "|mine" in out
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())
    assert theirs["config"]["model"] == "rwkvx"
    assert len(list((tmp_path / "theirs").rglob("samples_*.jsonl"))) == 2
    status, _, err = run(
        capsys, "eval", "lm", "--model", model, "--data", data, "--tasks", "mine,writes",
        "--include-path", tasks, "--num-fewshot", 2, "--gen-kwargs", "max_gen_toks=2",
        "--out", tmp_path / "ours", "--log-samples",
    )  # fmt: skip
    assert status == 0, err
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())
    for task in ("mine", "writes"):
        for metric in ("acc,none", "exact_match,none"):
            expected = theirs["results"][task].get(metric)
            assert ours["lm_eval"]["results"][task].get(metric) == expected
    (mine,) = (tmp_path / "ours").rglob("samples_mine_*.jsonl")
    (same,) = (tmp_path / "theirs").rglob("samples_mine_*.jsonl")
    assert mine.read_text() == same.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--model", "rwkvx", "--tasks", "nothing"), "Tasks not found: nothing"),
        (("run", "--model", "rwkvx", "--tasks", "mine"), "needs pretrained="),
        (("--model", "rwkvx", "--model_args", "pretrained=none", "--tasks", "mine"), "no model"),
    ],
)
def test_lm_evals_refusals_are_one_line(
    arguments: tuple[str, ...],
    said: str,
    tasks: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = run(capsys, "lm-eval", "--data", data, *arguments, "--include_path", tasks)
    assert status == 1
    assert err.startswith("error: ")
    assert said in err


def test_readers_of_options() -> None:
    assert read_limit("10") == 10
    assert read_limit("0.25") == 0.25
    assert read_seeds("3") == (3, 3, 3, 3)
    assert read_seeds("0,None,1,2") == (0, None, 1, 2)
    assert read_samples('{"a": [0, 2]}') == {"a": [0, 2]}
    assert read_mapping("--x", ("a=1,b=[1, 2]", '{"c": {"d": null}}')) == {
        "a": 1, "b": [1, 2], "c": {"d": None}
    }  # fmt: skip
    for text in ("nan", "inf", "-1", "", "1e400", "x"):
        with pytest.raises(InputError, match="--limit"):
            read_limit(text)
    for text in ("[]", "{}x", '{"a": 1}', '{"a": [-1]}', '{"a": [true]}', '{"a": []}', "[" * 9999):
        with pytest.raises(InputError, match="--samples"):
            read_samples(text)
    for text in ("{", "{1", "a", "=" * 3 + "{"):
        found: Any = None
        try:
            found = read_mapping("--x", (text,))
        except InputError as error:
            found = str(error)
        assert found
    with pytest.raises(InputError, match="exclude each other"):
        Settings(("a",), limit=1, samples={"a": [1]})
