"""What a model costs before there is one: memory of its state, FLOPs beside its weights."""

from collections import Counter

from rwkvx.config import ModelConfig
from rwkvx.kinds import Memory, kind_of


def state_memory(config: ModelConfig, element: int = 4) -> list[Memory]:
    """Of one sequence, by block. `element`: bytes of a number of the model's dtype."""
    return [kind_of(kind).memory(config, element) for kind in config.pattern]


def mixing_flops(config: ModelConfig, start: int, stop: int) -> Counter[str]:
    """Of tokens `start` ... `stop` - 1 of a sequence, forward, by what is done, in all blocks;
    without the products with weights. A multiplication and an addition are two."""
    total: Counter[str] = Counter()
    for kind, count in Counter(config.pattern).items():
        each = kind_of(kind).flops(config, start, stop)
        total.update({name: count * flops for name, flops in each.items()})
    return total


def decode_bytes(config: ModelConfig, tokens: int, element: int) -> int:
    """Of the state, read and written for one token after so many, in all blocks."""
    return sum(kind_of(kind).decode_bytes(config, tokens, element) for kind in config.pattern)
