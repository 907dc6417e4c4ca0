"""What of each model is compared: loss by position, retrieval by length, LAMBADA."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import rwkvx
from rwkvx.files import read_json, write_json
from rwkvx_evals.lm.evaluate import evaluate as evaluate_lm
from rwkvx_evals.lm.settings import Settings as LmSettings
from rwkvx_evals.passkey.evaluate import evaluate as evaluate_passkey
from rwkvx_evals.passkey.plan import Settings as PasskeySettings
from rwkvx_evals.passkey.plan import depth_values
from rwkvx_evals.text.positions import measure_book


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        length, rows: tokens and number of the windows that losses are taken of.
        lengths, depths, seeds: of the retrieval prompts. limit: LAMBADA items, None for all.
    """

    length: int
    rows: int
    lengths: tuple[int, ...]
    depths: int
    seeds: int
    limit: int | None


def measure(
    model_folder: Path, name: str, out: Path, book: Path, data: Path | None, sizes: Sizes
) -> dict[str, Any]:
    """Everything of one model; what `out` has already is not measured again."""
    path = out / "measured.json"
    asked = {**sizes._asdict(), "lengths": list(sizes.lengths)}
    if path.exists() and (found := read_json(path)).get("sizes") == asked:
        return dict(found)
    model = rwkvx.load(model_folder)
    retrieval = PasskeySettings(
        sizes.lengths, depth_values(sizes.depths), sizes.seeds, 16, "float32"
    )
    lengths = {}
    for task, haystack in (("passkey", None), ("niah", book)):  # in filler; in prose
        results = evaluate_passkey(model, name, retrieval, out / task, haystack=haystack)
        lengths[task] = results["lengths"]
    lm = evaluate_lm(
        model, name, LmSettings(("lambada_openai",), limit=sizes.limit), out / "lm", folder=data
    )
    found = {
        "sizes": asked,
        "parameters": sum(x.numel() for x in model.parameters()),
        "text": measure_book(model, book, sizes.length, sizes.rows),
        **lengths,
        "lambada": [row for row in lm["table"] if row["value"] is not None],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found
