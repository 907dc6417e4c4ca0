"""ModelConfig and the order of blocks."""

import pytest
from small import HYBRID

from rwkvx import InputError, ModelConfig, hybrid_pattern


def test_round_trip() -> None:
    assert ModelConfig.from_dict(HYBRID.to_dict()) == HYBRID
    assert isinstance(HYBRID.to_dict()["pattern"], list)
    assert ModelConfig.from_dict({**HYBRID.to_dict(), "pattern": ["sparse"]}).pattern == ("sparse",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "unknown model key 'depth'; known: .*width"),
        ({"pattern": ["rwkv7", "mamba"]}, "pattern must name blocks of .*'mamba'"),
        ({"pattern": []}, "pattern must name"),
        ({"width": 60}, "width 60 is no multiple of head_size 8"),
        ({"width": 0}, "width must be a positive whole number, got 0"),
        ({"width": "32"}, "width must be a positive whole number, got '32'"),
        ({"width": 32.0}, "width must be a positive"),
        ({"vocab_size": True}, "vocab_size must be a positive"),
        ({"chunk_size": -1}, "chunk_size must be a positive"),
        ({"topk": 0}, "topk must be a positive"),
        ({"selection": "tree"}, "selection must be one of"),
        ({"key_conv": -1}, "key_conv must be 0"),
        ({"key_conv": "4"}, "key_conv must be 0"),
        ({"sparse_kv_heads": 3}, "4 heads are no multiple of 3"),
        ({"sparse_kv_heads": 0}, "sparse_kv_heads must be"),
        ({"decay_rank": 0}, "decay_rank must be"),
        ({"gate_rank": -5}, "gate_rank must be"),
        ({"tokenizer": "bpe"}, "tokenizer must be one of"),
        ({"pattern": 3}, "pattern must name"),
        ({"pattern": "rwkv7"}, "pattern must name"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict({**HYBRID.to_dict(), **change})


@pytest.mark.parametrize("key", ["vocab_size", "width", "pattern"])
def test_missing_keys_are_named(key: str) -> None:
    data = HYBRID.to_dict()
    del data[key]
    with pytest.raises(InputError, match=f"lacks '{key}'"):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize(
    ("width", "ranks"),
    [
        (128, (32, 32, 32, 64)),
        (768, (64, 64, 32, 128)),
        (2048, (128, 128, 64, 224)),
        (2560, (128, 128, 96, 256)),
        (4096, (160, 160, 96, 320)),
    ],
)
def test_low_ranks(width: int, ranks: tuple[int, ...]) -> None:
    """2.5 √C for w and a, 1.7 √C for v, 5 √C for g, to multiples of 32."""
    config = ModelConfig(vocab_size=10, width=width, pattern=("rwkv7",))
    assert tuple(config.ranks[x] for x in "wavg") == ranks


def test_patterns() -> None:
    r, s = "rwkv7", "sparse"
    assert hybrid_pattern(12, 4) == (r, r, r, s) * 4
    assert hybrid_pattern(4, 1) == (r, r, r, r, s)
    assert hybrid_pattern(3, 0) == (r, r, r)
    with pytest.raises(InputError, match="13 rwkv7 blocks cannot be spread evenly before 4"):
        hybrid_pattern(13, 4)
