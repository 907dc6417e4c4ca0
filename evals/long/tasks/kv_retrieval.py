"""Lost in the Middle's retrieval of a value from a JSON object."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import match_all
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer


class KeyValues:
    """All samples share the object; each asks for another key."""

    name = "kv_retrieval"
    about = "the value of one key in a JSON object of random UUIDs"
    source = (
        "Lost in the Middle (arXiv 2307.03172), its prompt and score; any length instead of 75 "
        "to 300 keys, one object for all samples of a seed, and a line of noise behind it"
    )
    answer_tokens = 50
    stop: tuple[str, ...] = ("\n",)

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        hay = writer.haystack(
            "the JSON object", lambda: _records(writer.rng(self.name, "records")), before=",\n "
        )
        units = writer.capacity(self, length, self.layout(hay, str(uuid.UUID(int=0))))
        # A unit is a record, or several where the tokenizer merges over their ends.
        unit = int(rng.integers(units))
        records = hay.text(unit, unit + 1, opens=True, closes=True).strip(",\n ").split(",\n ")
        key, value = records[rng.integers(len(records))].strip('"').split('": "')
        depth = round(hay.size(unit) / hay.size(units), 4)
        layout = self.layout(hay, key, units)
        return writer.sample(self, length, index, layout, [value], depth=depth)

    def layout(self, hay: Haystack, key: str, units: int | None = None) -> Layout:
        return Layout(
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            "JSON data:\n{",
            hay,
            f'\n\nKey: "{key}"\nCorresponding value:',
            close="}",
            filler=(" ", ""),
            units=units,
        )

    def score(self, answer: str, sample: Sample) -> float:
        return match_all(answer, sample.answers)


def _records(rng: np.random.Generator) -> Iterator[str]:
    while True:
        key, value = (uuid.UUID(bytes=rng.bytes(16), version=4) for _ in range(2))
        yield f',\n "{key}": "{value}"'


TASKS = [KeyValues()]
