"""What of a run determines its weights, and what changed where a run is to go on."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rwkvx.data.sources import Source
from rwkvx.errors import shown
from rwkvx.training.config import StageConfig, TrainConfig

__all__ = ["differences", "identity"]

_ABSENT = "nothing"


def identity(
    config: TrainConfig, sources: Mapping[StageConfig, Source], vocabulary: str, base: str
) -> dict[str, Any]:
    """All that the weights depend on, as JSON; what they do not depend on is not in it.

    Args:
        sources: the opened data of each stage: its content counts, not where it was found.
        vocabulary: fingerprint of the tokenizer; base: that of the model that an adapter is for.
    """
    passing = any(s.state_passing or s.pieces > 1 for s in config.stages)
    optimizer = asdict(config.optimizer)
    if optimizer["schedule"] != "wsd":
        del optimizer["decay"]
    found: dict[str, Any] = {
        "model": {**config.model.to_dict(), "tokenizer": vocabulary},
        "init": config.init,
        "base": base,
        "seed": config.seed,
        "precision": config.precision,
        "average": config.average,
        "keep": config.keep,
        "adapter": _adapter(config),
        "optimizer": {**optimizer, "betas": list(config.optimizer.betas)},
        "steps": [stage.steps for stage in config.stages],
        "stages": [_stage(s, config, sources[s], passing) for s in config.stages],
    }
    if config.keep == "best":  # then evaluations choose the model
        found |= {"eval_every": config.eval_every, "eval_batches": config.eval_batches}
        parts = sources[config.stages[-1]].evaluations()
        found["evaluations"] = {name: part.identity() for name, part in parts.items()}
    return found


def _adapter(config: TrainConfig) -> dict[str, Any]:
    found = {**asdict(config.adapter), "targets": list(config.adapter.targets)}
    return found if config.adapter.kind == "lora" else {"kind": config.adapter.kind}


def _stage(
    stage: StageConfig, config: TrainConfig, source: Source, passing: bool
) -> dict[str, Any]:
    found = {
        "length": stage.length,
        "sequences": stage.batch * config.accumulate,
        "state_passing": stage.state_passing,
        "recurrent_length": stage.recurrent_length,
        "topk": stage.topk or config.model.topk,
        "learn": stage.learn,
        "long_ce": [stage.long_ce, stage.long_ce_window] if stage.long_ce else None,
        "data": source.identity(),
    }
    # Which sequences pass their states on depends on how a step is cut.
    return {**found, "batch": stage.batch} if passing else found


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], step: int, totals: tuple[int, int]
) -> list[str]:
    """Where a run that has come to `step` differs from what it is asked to be, in words.

    More steps than before, and stages after its last one, are no difference.

    Args:
        totals: all steps of the run, old and new.
    """
    before, now = dict(old), dict(new)
    planned, asked = list(before.pop("steps")), list(now.pop("steps"))
    stages = list(before.pop("stages")), list(now.pop("stages"))
    found = [f"{name} is {_words(b)}, not {_words(a)}" for name, b, a in _changed("", before, now)]
    for i, settings in enumerate(stages[0]):
        if i >= len(stages[1]):
            found.append(f"stages are {len(stages[0])}, not {len(stages[1])}")
            break
        found += [
            f"{name} is {_words(b)}, not {_words(a)}"
            for name, b, a in _changed(f"stages.{i}.", settings, stages[1][i])
        ]
        longer = i == len(stages[0]) - 1 and asked[i] > planned[i]
        if asked[i] != planned[i] and not longer:
            found.append(f"stages.{i}.steps is {planned[i]}, not {asked[i]}")
    if totals[1] < max(totals[0], step) and not any(".steps is" in text for text in found):
        found.append(f"steps is {totals[0]}, not {totals[1]}")
    return found


def _changed(
    prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of all that is not equal."""
    for name in [*old, *(x for x in new if x not in old)]:
        a, b = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _changed(f"{prefix}{name}.", a, b)
        elif a != b:
            yield prefix + name, a, b


def _words(value: Any) -> str:
    return value if value == _ABSENT else shown(value, 40)
