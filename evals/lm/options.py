"""What a task asks of generation: honoured, or refused in one line, never ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from rwkvx.errors import InputError

DEFAULT_NEW_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = ("until", "stop", *_LENGTHS, "do_sample", "temperature", "top_p", "top_k")
# What other engines offer, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1, None),
    "min_p": (0, None),
    "use_cache": (True, False, None),
}


@dataclass(frozen=True)
class Options:
    """How to continue a prompt: up to `limit` tokens or one of the texts `until`.

    temperature: 0 is greedy; else logits are divided by it, the `top_k` largest kept (0: all) and
    of those the fewest whose probabilities reach `top_p`.
    """

    until: tuple[str, ...] = ()
    limit: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def words(self) -> str:
        """For reports: "greedy", or how tokens are drawn."""
        if self.temperature == 0.0:
            return "greedy"
        kept = f", top-p {self.top_p:g}" if self.top_p < 1.0 else ""
        kept += f", top-k {self.top_k}" if self.top_k else ""
        return f"sampled at temperature {self.temperature:g}{kept}"


def read_options(given: Mapping[str, Any]) -> Options:
    """`generation_kwargs` of a task, by lm-eval's own rules (`normalize_gen_kwargs`).

    do_sample decides; without it a temperature above 0 means sampling. do_sample without a
    temperature samples at 1, as in transformers. Raises InputError for what is not known, not a
    number or out of range, and for beams.
    """
    for name, value in given.items():
        if name not in _KNOWN and (name not in _NEUTRAL or value not in _NEUTRAL[name]):
            raise InputError(
                f"generation option {_show(name)}={_show(value)} is not supported; known: "
                f"{', '.join(_KNOWN)}"
            )
    sampling = given.get("do_sample")
    if sampling not in (None, True, False):
        raise InputError(f"generation option do_sample={_show(sampling)} is not True or False")
    asked: dict[str, Any] = {n: int(_number(given, n, 0, whole=True)) for n in _given(given)}
    temperature = _number(given, "temperature", 1.0 if sampling else 0.0)
    if sampling and temperature == 0.0:
        raise InputError("generation options do_sample=True and temperature=0 contradict another")
    top_p, top_k = _number(given, "top_p", 1.0), _number(given, "top_k", 0, whole=True)
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"generation option top_p={_show(top_p)} is not above 0 and at most 1")
    asked |= {} if sampling is None else {"do_sample": bool(sampling)}
    normal: Any = normalize_gen_kwargs({**asked, "temperature": temperature}, DEFAULT_NEW_TOKENS)
    until = _stops("until", given.get("until")) + _stops("stop", given.get("stop"))
    if not normal["do_sample"]:
        return Options(until, normal["max_gen_toks"])
    return Options(until, normal["max_gen_toks"], temperature, top_p, int(top_k))


def _given(options: Mapping[str, Any]) -> list[str]:
    return [name for name in _LENGTHS if options.get(name) is not None]


def _stops(name: str, value: Any) -> tuple[str, ...]:
    """One text, a list of them, or None; empty texts end nothing, as everywhere in lm-eval."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"generation option {name}={_show(value)} is no text and no list of texts")
    return tuple(text for text in texts if text)


def _number(given: Mapping[str, Any], name: str, default: float, *, whole: bool = False) -> float:
    """An option as a number from 0 on; `default` where it is not given."""
    value = given.get(name)
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    wrong = isinstance(value, bool) or not math.isfinite(number) or number < 0
    if wrong or (whole and number != int(number)):
        kind = "whole number" if whole else "number"
        raise InputError(f"generation option {name}={_show(value)} is not a {kind} from 0 on")
    return number


def _show(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else f"{text[:59]}…"
