"""Samples as JSON lines, for other programs; with what lm-eval needs to run them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rwkvx.progress import progress
from rwkvx.ranges import COUNT, check
from rwkvx_evals.files import package_version, write_atomically, write_json, write_text
from rwkvx_evals.long.task import Sample, Task
from rwkvx_evals.long.tasks import find_tasks
from rwkvx_evals.long.writer import Encoder, Writer

MANIFEST = "manifest.json"


def export(
    folder: Path,
    tokenizer: Encoder,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    *,
    data: Path | None = None,
    book: Path | None = None,
) -> dict[str, Any]:
    """Writes `NAME-LENGTH.jsonl` for every task and length, and a manifest; returns the manifest.

    A row has id, prompt, answers and tokens (of the prompt), and the task and `about` that scoring
    needs. The manifest has the SHA-256 of each file and of each sample (`Sample.sha256`), and
    whether the tokenizer, given the prompts as text, gives the tokens that they were made of
    (looked at for the first sample of each file). Beside each file stands a YAML with which lm-eval
    runs it: `lm_eval --include_path FOLDER --tasks NAME-LENGTH`. Every file is written whole or not
    at all; the same call writes the same bytes.

    Raises InputError for a length too short for a task, missing data, a full disk.
    """
    check("samples", samples, COUNT)
    writer = Writer(tokenizer, seed=seed, data=data, book=book)
    write_text(folder / "rwkvx_long.py", _HELPER)
    files: dict[str, Any] = {}
    wanted = [(task, length) for task in tasks for length in lengths]
    with progress(len(wanted) * samples, "export", "sample") as bar:
        for task, length in wanted:
            path = folder / f"{task.name}-{length}.jsonl"
            files[path.name] = _export(path, writer, task, length, samples, bar.update)
            write_text(path.with_suffix(".yaml"), _lm_eval_yaml(task, path.stem))
    manifest = {
        "version": package_version(),
        "seed": seed,
        "tokenizer": type(tokenizer).__name__,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _export(
    path: Path,
    writer: Writer,
    task: Task,
    length: int,
    samples: int,
    advance: Callable[[], object],
) -> dict[str, Any]:
    """Writes one file, a row at a time; returns what the manifest says of it."""
    entry: dict[str, Any] = {"task": task.name, "length": length}

    def write(temporary: Path) -> None:
        sha, hashes = hashlib.sha256(), {}
        with temporary.open("wb") as file:
            for index in range(samples):
                sample = task.sample(writer, length, index)
                # Other letters as \uXXXX: json is four times as fast with them as with UTF-8.
                row = json.dumps(as_row(task, sample)).encode() + b"\n"
                file.write(row)
                sha.update(row)
                hashes[sample.id] = sample.sha256
                if index == 0:
                    entry["text_gives_tokens"] = writer.reads_as_written(sample)
                advance()
        entry.update(sha256=sha.hexdigest(), samples=hashes)

    write_atomically(path, write)
    return entry


def as_row(task: Task, sample: Sample) -> dict[str, Any]:
    """A sample as a row of an exported file."""
    return {
        "id": sample.id,
        "prompt": sample.text,
        "answers": list(sample.answers),
        "tokens": len(sample.ids),
        "task": task.name,
        "about": dict(sample.about),
    }


def score_row(row: Mapping[str, Any], answer: str) -> float:
    """0 to 1 for an answer to a row of an exported file."""
    [task] = find_tasks([row["task"]])
    none = np.empty(0, dtype=np.int64)
    sample = Sample(row["id"], none, row["prompt"], tuple(row["answers"]), row["about"])
    return task.score(answer, sample)


def _lm_eval_yaml(task: Task, name: str) -> str:
    config = {
        "task": name,
        "dataset_path": "",
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": list(task.stop),
            "max_gen_toks": task.answer_tokens,
            "do_sample": False,
        },
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    functions = (
        "custom_dataset: !function rwkvx_long.load\nprocess_results: !function rwkvx_long.score\n"
    )
    return yaml.safe_dump(config, sort_keys=False) + functions


_HELPER = '''"""Lets lm-eval read and score the samples beside this file; needs rwkvx[eval]."""

import json
from pathlib import Path

import datasets
from rwkvx_evals.long.export import score_row


def load(file, **_):
    """The rows of a file of this folder; `about` as text, as its keys differ between tasks."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"about": json.dumps(row["about"])} for row in rows]
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc, results):
    return {"score": score_row(doc | {"about": json.loads(doc["about"])}, results[0])}
'''
