"""Results as a run makes them, with all that a report can show, but without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkvx_evals.files import digest
from rwkvx_evals.long.loss import NAME, collect
from rwkvx_evals.long.results import sample_rows, task_results, total
from rwkvx_evals.long.rows import FAILURES

LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)
TASKS = (
    "niah_single_1",
    "niah_multikey_3",
    "ruler_vt",
    "graphwalks_parents",
    "babilong_qa2",
    "passkey",
)


def make_rows(seed: int, tasks: tuple[str, ...] = TASKS, samples: int = 20) -> list[dict[str, Any]]:
    """Rows of answers that get worse with length and with the number of the task."""
    draw = np.random.default_rng(seed)
    rows = []
    for number, task in enumerate(tasks):
        for place, length in enumerate(LENGTHS):
            for index in range(samples):
                share = max(0.0, 1.05 - 0.05 * number - 0.02 * (number + 1) * place**1.5)
                fine = draw.random() < share
                status = "oom" if length == LENGTHS[-1] and number == 4 else "ok"
                if task == "ruler_vt" and index == 3 and place == 4:
                    status = "invalid"
                depth = {"depth": round(index % 10 / 9, 4)} if number in (0, 1, 5) else {}
                score = float(fine) if number != 3 else round(float(draw.beta(9 * share + 1, 2)), 2)
                answer = " 4821" if fine else f" {draw.integers(9999)} <b>&amp;</b>\nand so on " * 3
                rows.append(
                    {
                        "id": f"{task}-{length}-{index}", "task": task, "length": length,
                        "index": index, "status": status, "score": score * (status == "ok"),
                        "answer": answer if status == "ok" else "", "expected": ["4821", "x" * 90],
                        "about": depth, "prompt": digest([task, length, index]),
                        "prompt_tokens": length - 16, "answer_tokens": 6, "truncated": 0,
                    }
                )  # fmt: skip
    return rows


def make_windows(seed: int) -> dict[str, Any]:
    """Loss that falls with position."""
    draw = np.random.default_rng(seed)
    lengths = {}
    for length in LENGTHS[1:]:
        rows = []
        for _ in range(4):
            buckets, low = [], 1
            while low < length:
                high = max(16, 2 * low) if low > 1 else 16
                mean = 2.2 + 1.6 / np.log2(low + 2) + 0.03 * draw.normal()
                buckets.append([low, high, high - low, mean * (high - low)])
                low = high
            rows.append({"status": "ok", "buckets": buckets, "compared": max(0, length - 4096),
                         "key_tokens": length // 50, "key_loss": 0.6 * (length // 50)})  # fmt: skip
        counts = {"asked": 4, "scored": 4} | dict.fromkeys(("failed", "skipped", *FAILURES), 0)
        lengths[str(length)] = collect(rows) | counts
    paper = {"short_window": 4096, "stride": 1024, "alpha": 2.0, "beta": -2.0, "reasons": []}
    return {"lengths": lengths, **paper}


def make_results(seed: int, model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json holds of these rows."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    skipped = {LENGTHS[-1]: 20} if len(names) > 1 else {}
    tasks = {}
    for name in names:
        found = [row for row in rows if row["task"] == name]
        reasons = ["1048576 tokens are more than the 262144 of the model"] if skipped else []
        tasks[name] = {"about": f"about {name}", "source": "a paper"} | task_results(found, {})
        tasks[name]["reasons"] = reasons if name == "passkey" else []
    machine = {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_bytes": 24 << 30, "gpu": None,
               "system": "Linux-6.1", "python": "3.11.7", "commit": "1dcbd9b" * 5}  # fmt: skip
    timing = {
        str(n): {"seconds": n / 900, "read": 50 * n, "generated": 4000, "peak_bytes": 900 * n,
                 "tokens_per_second": 45000.0}
        for n in LENGTHS
    }  # fmt: skip
    return {
        "model": model, "weights": digest(model), "version": "0.1.0", "code": digest("code"),
        "commit": machine["commit"], "command": f"rwkvx eval long --model {model} --tasks a,b,c "
        "--lengths 1k,4k,16k,64k,256k,1m --samples 20 --out runs/a-folder-with-a-long-name",
        "date": "2026-01-02T03:04:05+00:00", "machine": machine,
        "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
        "settings": {"seed": 0, "dtype": "float32", "truncate": None, "chat": False},
        "lengths": list(LENGTHS), "samples": 20, "sample_manifest": digest("samples"),
        "answers": digest(seed),
        "prompt_tokens": {"read": 81_000_000, "without_sharing": 149_000_000},
        "total": total(rows, 20), "tasks": tasks, "timing": timing, "warnings": [],
        NAME: make_windows(seed),
    }  # fmt: skip


def make_run(seed: int, model: str, **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """results.json and the rows of samples.jsonl."""
    rows = sample_rows(make_rows(seed, **more))
    return make_results(seed, model, rows), rows
