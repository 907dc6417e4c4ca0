"""ModelConfig and the order of blocks."""

import pytest
from small import HYBRID

from rwkvx import InputError, ModelConfig, hybrid_pattern
from rwkvx.ranges import ranges_of


def test_round_trip() -> None:
    assert ModelConfig.from_dict(HYBRID.to_dict()) == HYBRID
    assert isinstance(HYBRID.to_dict()["pattern"], list)
    assert ModelConfig.from_dict({**HYBRID.to_dict(), "pattern": ["sparse"]}).pattern == ("sparse",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "unknown model key 'depth'; known: .*width"),
        ({"pattern": ["rwkv7", "mamba"]}, "pattern must be .* one of rwkv7, .*, got 'mamba'"),
        ({"pattern": []}, "pattern must be a list of 1 to 1024 .* got '0 values'"),
        ({"pattern": ["rwkv7"] * 1025}, "pattern must be .* got '1025 values'"),
        ({"pattern": [["rwkv7"]]}, "pattern must be .*"),
        ({"width": 60}, "width 60 is no multiple of head_size 8"),
        ({"width": 0}, "width must be a whole number from 1 to 65536, got 0"),
        ({"width": "32"}, "width must be a whole number from 1 to 65536, got '32'"),
        ({"width": 32.0}, r"width must be .* got 32\.0"),
        ({"width": 65600}, "width must be .* got 65600"),
        ({"width": 2**70}, "width must be .* got 1180591620717411303424"),
        ({"width": 10**9999}, "width must be .* got a number of 33216 bits"),
        ({"vocab_size": True}, "vocab_size must be .* got True"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be .* from 1 to 16777216, got"),
        ({"chunk_size": -1}, "chunk_size must be a whole number from 1"),
        ({"chunk_size": 2**25}, "chunk_size must be"),
        ({"topk": 0}, "topk must be a whole number from 1 to 1048576, got 0"),
        (
            {"topk": 10**18},
            "topk must be a whole number from 1 to 1048576, got 1000000000000000000",
        ),
        ({"topk": None}, "topk must be .* to 1048576, got None"),
        ({"selection": "tree"}, "selection must be one of"),
        ({"selection": ["flat"]}, "selection must be one of"),
        ({"key_conv": -1}, "key_conv must be a whole number from 0"),
        ({"key_conv": "4"}, "key_conv must be a whole number from 0"),
        ({"key_conv": 1000}, "key_conv must be a whole number from 0 to 256"),
        ({"ffn_mult": 10**6}, "ffn_mult must be"),
        (
            {"group_norm_eps": float("nan")},
            "group_norm_eps must be a number from 1e-12 to 0.1, got nan",
        ),
        ({"group_norm_eps": 0}, "group_norm_eps must be"),
        ({"group_norm_eps": "1e-5"}, "group_norm_eps must be .* got '1e-5'"),
        ({"sparse_kv_heads": 3}, "4 heads are no multiple of 3"),
        ({"sparse_kv_heads": 0}, "sparse_kv_heads must be"),
        ({"decay_rank": 0}, "decay_rank must be a whole number from 1 to 65536, got 0"),
        ({"value_rank": 2**40}, "value_rank must be"),
        ({"gate_rank": -5}, "gate_rank must be"),
        ({"tokenizer": "bpe"}, "tokenizer must be one of"),
        ({"pattern": 3}, "pattern must be"),
        ({"pattern": "rwkv7"}, "pattern must be"),
        ({3: 4, "x": 5}, "unknown model key 3"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_dict({**HYBRID.to_dict(), **change})
    assert len(str(caught.value)) <= 300


def test_every_field_has_a_range() -> None:
    assert set(ranges_of(ModelConfig)) == set(HYBRID.to_dict())


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
    for wrong in (10**12, -1, 2.0):
        with pytest.raises(InputError, match="number of blocks must be a whole number from 0"):
            hybrid_pattern(wrong, 0)
