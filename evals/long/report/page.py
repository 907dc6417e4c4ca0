"""The HTML page of a run: one file, no network, light and dark, for screens of any width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkvx_evals.long.loss import NAME
from rwkvx_evals.long.report.charts import loss_curves, score_curve
from rwkvx_evals.long.report.words import duration, fill

Results = dict[str, Any]
Row = dict[str, Any]


def render_page(results: Results, rows: Sequence[Row]) -> str:
    """rows: of samples.jsonl."""
    groups = misses(rows)
    loss = results.get(NAME)
    tokens = results["prompt_tokens"]
    alone = tokens["without_sharing"]
    return fill(
        "page.html.j2",
        r=results,
        lengths=results["lengths"],
        tiles=_tiles(results),
        alerts=_alerts(results),
        targets={(g["task"], g["length"]): g["id"] for g in groups},
        curves=[(name, _curve(name, task)) for name, task in results["tasks"].items()],
        maps=[m for name, task in results["tasks"].items() if (m := _map(name, task))],
        loss=loss,
        loss_chart=loss_curves(loss["lengths"]) if loss else "",
        saved=round(100 * (1 - tokens["read"] / alone)) if alone else 0,
        misses=groups,
        skipped=_skipped(results),
        facts=facts(results),
    )


def misses(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was not answered quite rightly, by task and length."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["task"], row["length"])
        group = found.setdefault(
            key,
            {"task": key[0], "length": key[1], "id": f"{key[0]}-{key[1]}", "asked": 0, "rows": []},
        )
        group["asked"] += 1
        if row["status"] != "ok" or row["score"] < 1:
            group["rows"].append(row)
    return [group for group in found.values() if group["rows"]]


def _tiles(results: Results) -> list[dict[str, Any]]:
    total = results["total"]
    seconds = sum(entry["seconds"] for entry in results["timing"].values())
    tiles = [
        {"value": f"{total[name]:,}", "label": name, "bad": name == "failed" and total[name]}
        for name in ("asked", "scored", "failed", "skipped", "invalid")
    ]
    tiles[4]["bad"] = total["invalid"] > 0
    return [*tiles, {"value": duration(seconds), "label": "of computing", "bad": False}]


def _alerts(results: Results) -> list[str]:
    total = results["total"]
    words = {
        "invalid": "Samples with logits that are not numbers: the model or its dtype is at fault",
        "oom": "Samples that did not fit into memory, also alone",
        "error": "Samples without an answer from the endpoint",
        "truncated": f"Prompts that were truncated ({results['settings']['truncate']})",
    }
    found = [f"{text}: {total[kind]:,}." for kind, text in words.items() if total[kind]]
    return [*found, *results["warnings"]]


def _curve(name: str, task: dict[str, Any]) -> Any:
    return score_curve([(int(n), entry) for n, entry in task["lengths"].items()], name)


def _map(name: str, task: dict[str, Any]) -> dict[str, Any] | None:
    """Cells by depth (down) and length (right); None for a task without depths."""
    cells = {(cell["length"], cell["depth"]): cell for cell in task["depths"]}
    if not cells:
        return None
    lengths, depths = (sorted({key[i] for key in cells}) for i in (0, 1))
    rows = [(depth, [cells.get((n, depth)) for n in lengths]) for depth in depths]
    return {"name": name, "lengths": lengths, "rows": rows}


def _skipped(results: Results) -> list[tuple[str, str]]:
    found = [(name, r) for name, task in results["tasks"].items() for r in task["reasons"]]
    return found + [(NAME, reason) for reason in results.get(NAME, {}).get("reasons", [])]


def facts(results: Results) -> list[tuple[str, str]]:
    """What it takes to run it again, and where it ran."""
    machine, settings = results["machine"], results["settings"]
    memory = machine.get("memory_bytes")
    place = [machine.get("gpu"), machine.get("cpu"), f"{machine.get('cores')} cores"]
    place += [f"{memory / 2**30:.0f} GiB" if memory else None, machine.get("system")]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    return [
        ("command", results["command"] or "from Python"),
        ("weights", results["weights"]),
        ("rwkvx", f"{results['version']}, code {results['code'][:16]}"),
        ("commit", results["commit"] or "unknown (installed)"),
        ("date", results["date"]),
        ("machine", ", ".join(str(part) for part in place if part)),
        ("versions", f"Python {machine.get('python')}, {versions}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in settings.items())),
        ("samples", f"manifest {results['sample_manifest']}"),
    ]
