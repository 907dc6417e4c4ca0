"""The card of a trained model: README.md in its folder, as the hub shows it."""

from collections.abc import Mapping
from typing import Any

from rwkvx.training.config import TrainConfig

__all__ = ["model_card"]


def model_card(config: TrainConfig, result: Mapping[str, Any]) -> str:
    """What the model is, what it read, how it was trained, what it scores, what it cannot do.

    result: what results.json says of it.
    """
    model, kinds = config.model, ", ".join(sorted(set(config.model.pattern)))
    longest = max(stage.length for stage in config.stages)
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in result["evaluation"].items())
    changed = [text for change in result["changes"] for text in change["changed"]]
    sections = {
        "": f"A language model of {len(model.pattern)} blocks ({kinds}), width {model.width}, "
        f"{result['parameters']:,} parameters, vocabulary of {model.vocab_size:,}.",
        "Use": USE.format(name=config.name),
        "Data": _data(config),
        "Recipe": f"{result['steps']:,} steps, {result['tokens']:,} tokens, sequences of up to "
        f"{longest:,} tokens; {config.precision}, peak learning rate {config.optimizer.lr:g} "
        f"({config.optimizer.schedule}), seed {config.seed}."
        + (f" Started from `{config.init}`." if config.init else "")
        + (f" {result['skipped_steps']} steps had no update." if result["skipped_steps"] else "")
        + (f" Changed on the way: {'; '.join(changed)}." if changed else "")
        + f"\n\n`{result['command']}`\n\n{result['machine']}; torch {result['torch']}, rwkvx "
        f"{result['rwkvx']}, commit {result['commit']}; {result['date']}.",
        "Scores": f"On data that training did not read:\n\n| | |\n|---|---|\n{scores}"
        if scores
        else "None were taken.",
        "Limits": LIMITS.format(longest=longest),
    }
    body = "\n\n".join(f"## {name}\n\n{text}" if name else text for name, text in sections.items())
    return f"{FRONT}\n# {config.name}\n\n{body}\n"


def _data(config: TrainConfig) -> str:
    """A line for each source of each stage."""
    lines = []
    for data in dict.fromkeys(config.data_of(stage) for stage in config.stages):
        whole = sum(part.weight for part in data.parts)
        for part in data.parts:
            options = part.to_dict()
            options.pop("weight")
            told = ", ".join(f"{name} {value}" for name, value in options.items() if value)
            lines.append(f"- {part.weight / whole:.0%}: {told}")
    return "\n".join(lines)


FRONT = """---
library_name: rwkvx
pipeline_tag: text-generation
tags: [rwkv, rwkv-7, sparse-attention]
---"""

USE = """```python
import rwkvx

model = rwkvx.load("{name}")  # this folder; or transformers' AutoModelForCausalLM
```"""

LIMITS = """It continues text of the kind that it read, in the languages that it read. It has not
been taught to answer, to be right, or to leave out what may harm. Sequences beyond {longest:,}
tokens are longer than any it was trained on: what it scores there is to be measured
(`rwkvx eval`)."""
