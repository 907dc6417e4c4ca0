"""Bytes changed at random: a model comes out, or one line that names the file; nothing else."""

import random
from pathlib import Path

import pytest
from weights import config, random_checkpoint

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli.info import describe

SHAPE = config(
    vocab_size=30, width=64, pattern=["rwkv7"] * 2, ffn_mult=1,
    decay_rank=2, iclr_rank=2, value_rank=2, gate_rank=2,
)  # fmt: skip
HEADERS = 3000  # bytes at either end that hold more than numbers
TRIALS = 40


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Shorter, or with up to four bytes changed, mostly where the structure is."""
    if draw.random() < 0.1:
        return content[: draw.randrange(len(content))]
    changed, near = bytearray(content), min(HEADERS, len(content))
    for _ in range(draw.choice([1, 1, 4])):
        places = (draw.randrange(near), -1 - draw.randrange(near), draw.randrange(len(content)))
        changed[draw.choice(places)] ^= draw.randrange(1, 256)
    return bytes(changed)


@pytest.mark.parametrize("name", FORMATS)
def test_damage_never_ends_in_a_crash(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "model"
    FORMATS[name].write(random_checkpoint(SHAPE), whole)
    parts = [p for p in sorted(whole.iterdir()) if p.name != "SHA256SUMS"] if whole.is_dir() else []
    draw, said = random.Random(name), []
    for _ in range(TRIALS):
        part = draw.choice(parts or [whole])
        content = part.read_bytes()
        part.write_bytes(damaged(content, draw))
        for read in (rwkvx.load, describe):
            try:
                read(whole)
            except InputError as error:
                said.append(str(error))
        part.unlink()  # what is mapped stays as it is
        part.write_bytes(content)
    assert 4 < len(said) < 2 * TRIALS
    assert not [line for line in said if str(tmp_path) not in line or "\n" in line]
    assert rwkvx.load(whole).config.width == SHAPE.width
