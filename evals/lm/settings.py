"""What decides the results of an lm-eval run, besides the model; the options of the command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwkvx.errors import InputError

# lm-eval's: of Python's random, NumPy, torch (generation) and the few-shot examples.
SEEDS = (0, 1234, 1234, 1234)


@dataclass(frozen=True)
class Settings:
    """Everything but the model, where its data are, and how fast it goes.

    limit: so many items of each task, or a share of them when below 1. samples: item numbers by
    task, in its place. chat: the model's chat template, or one by name; chat_file: a file of one.
    seeds: see SEEDS. gen_kwargs: replace those of the tasks.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    samples: Mapping[str, list[int]] | None = None
    max_length: int | None = None
    truncate: str | None = None
    dtype: str = "float32"
    chat: bool | str = False
    chat_file: str | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int | None, ...] = SEEDS
    include: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    predict_only: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("--tasks names no task")
        if self.limit is not None and self.samples is not None:
            raise InputError("--limit and --samples exclude each other")
        if self.fewshot_as_multiturn and not self.chat:
            raise InputError("--fewshot-as-multiturn needs --apply-chat-template")
        _check_drawing(self.gen_kwargs)

    def as_dict(self) -> dict[str, Any]:
        """For reports and for the folder of the results."""
        return asdict(self)


def _check_drawing(options: Mapping[str, Any]) -> None:
    """lm-eval's rule: tasks say do_sample: false, and would silently stay greedy."""
    asked = [name for name in ("temperature", "top_p", "top_k") if options.get(name)]
    if asked and "do_sample" not in options:
        raise InputError(
            f"--gen-kwargs {asked[0]} needs do_sample=True beside it (do_sample=False for greedy)"
        )


def read_limit(text: str) -> float:
    """A whole number of items from 1 on, or a share between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value) or (value >= 1 and value != int(value)):
        raise InputError(f"--limit {text!r}: a whole number from 1 on, or a share below 1")
    return value


def read_seeds(text: str) -> tuple[int | None, ...]:
    """One seed for all, or four: of random, NumPy, torch and the few-shot examples; or None."""
    try:
        seeds = tuple(
            None if part.strip().lower() == "none" else int(part) for part in text.split(",")
        )
    except ValueError:
        seeds = ()
    if len(seeds) not in (1, 4) or any(s is not None and not 0 <= s < 2**32 for s in seeds):
        raise InputError(f"--seed {text!r}: one whole number from 0 on, or four with commas")
    return seeds if len(seeds) == 4 else seeds * 4


def read_samples(text: str) -> dict[str, list[int]]:
    """Item numbers by task: JSON, or a file of it."""
    path = Path(text).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8") if path.is_file() else text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--samples is neither JSON nor a file of it: {str(error)[:80]}"
        ) from error
    numbers = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(n, list) and n and all(_is_number(i) for i in n) for n in numbers):
        raise InputError('--samples maps tasks to item numbers, such as {"piqa": [0, 1, 2]}')
    return dict(found)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_mapping(option: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """Options such as `key=value,key=value` or JSON, as lm-eval's command reads them."""
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    found: dict[str, Any] = {}
    for text in texts:
        try:
            part = try_parse_json(text) if text.lstrip().startswith("{") else key_val_to_dict(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{option}: {str(error)[:120]}") from error
        if not isinstance(part, dict):
            raise InputError(f"{option} {text[:60]!r} is neither key=value nor a JSON object")
        found |= part
    return found
