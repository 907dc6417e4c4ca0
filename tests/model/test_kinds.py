"""A kind of block is one file: one that only this test knows goes through the whole package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small import HYBRID, error, random_ids, random_model
from torch import Tensor, nn

import rwkvx
from rwkvx import InputError, Model, ModelConfig, decoding
from rwkvx.checkpoint import pth
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.expand import expand
from rwkvx.checkpoint.folder import save_folder
from rwkvx.cli.info import describe
from rwkvx.costs import mixing_flops, state_memory
from rwkvx.hf import RwkvxConfig, RwkvxForCausalLM
from rwkvx.kinds import KINDS
from rwkvx.kinds.contract import Memory, Mixer, Option, Shape
from rwkvx.ranges import Whole
from rwkvx.state import state_bytes


class SumState(NamedTuple):
    total: Tensor
    ffn_shift: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> "SumState":
        return SumState(*map(f, self))

    def recurrent(self) -> "SumState":
        return self.map(Tensor.detach)

    def select(self, index: Tensor) -> "SumState":
        return self.map(lambda x: x[index])

    def bytes(self) -> int:
        return sum(x.nbytes for x in self)


class Sum(Mixer):
    """A decayed sum of what was read, times a gain: the least that mixes over time."""

    State = SumState
    recurrent = True
    options = {"half_life": Option(4, Whole(1, 99), "tokens until half of it is forgotten")}  # noqa: RUF012

    def __init__(self, config: ModelConfig, position: int) -> None:
        super().__init__(config, position)
        self.gain = nn.Parameter(torch.empty(config.width))

    def forward(
        self,
        x: Tensor,
        state: SumState,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, SumState, Tensor | None]:
        assert cu_seqlens is None
        decay, total, outputs = 0.5 ** (1 / self.config.option("half_life")), state.total, []
        for token in x.unbind(1):
            total = total * decay + token
            outputs.append(total * self.gain)
        return torch.stack(outputs, 1), SumState(total, state.ffn_shift), v_first

    def state_shapes(self) -> dict[str, Shape | None]:
        return {"total": (self.config.width,), "ffn_shift": (self.config.width,)}

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.gain)

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        return f"half-life {config.option('half_life')}"

    @classmethod
    def memory(cls, config: ModelConfig, element: int) -> Memory:
        return Memory(2 * config.width * element)

    @classmethod
    def flops(cls, config: ModelConfig, start: int, stop: int) -> dict[str, int]:
        return {"sums": 3 * config.width * (stop - start)}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setitem(KINDS, "sum", Sum)
    pattern = ("rwkv7", "sum", "sparse", "rwkv7")
    data = {**HYBRID.to_dict(), "vocab_size": 256, "pattern": pattern, "half_life": 7}
    return ModelConfig.from_dict(data)


@torch.no_grad()
def test_it_reads_and_decodes(config: ModelConfig) -> None:
    model, ids = random_model(config).float(), random_ids(60, batch=1)
    whole, state = model(ids)
    decoder = decoding.start(model, model.fresh_state(1), 60)
    assert isinstance(decoder, decoding.compiled.CompiledDecoder)  # around it, that is
    steps = torch.cat([decoder.step(token) for token in ids.split(1, dim=1)], dim=1)
    assert error(steps, whole) < 1e-5
    assert state_bytes(state) == sum(m.at(60) for m in state_memory(config))
    assert mixing_flops(config, 0, 10)["sums"] == 30 * config.width


def test_it_is_initialised_saved_shown_and_loaded(config: ModelConfig, tmp_path: Path) -> None:
    model = rwkvx.init_weights(Model(config))
    assert not model.blocks[1].att.gain.any()
    save_folder(model, tmp_path / "model")
    loaded = rwkvx.load(tmp_path / "model")
    assert loaded.config == config
    assert loaded.config.option("half_life") == 7
    assert loaded.fingerprint() == model.fingerprint()
    rows = dict(describe(tmp_path / "model"))
    assert rows["sum blocks"] == "half-life 7"
    other = rwkvx.load(tmp_path / "model", half_life=9)
    assert other.config.option("half_life") == 9
    with pytest.raises(InputError, match="half_life must be a whole number from 1 to 99, got 0"):
        rwkvx.load(tmp_path / "model", half_life=0)


def test_formats_without_a_place_for_it_say_so(config: ModelConfig, tmp_path: Path) -> None:
    model = rwkvx.init_weights(Model(config))
    with pytest.raises(InputError, match="no place for sum blocks"):
        pth.write(Checkpoint.of(model), tmp_path / "model.pth")


def test_it_is_added_to_a_model(config: ModelConfig) -> None:
    plain = ModelConfig.from_dict({**HYBRID.to_dict(), "pattern": ("rwkv7",) * 4})
    source = Checkpoint.of(rwkvx.init_weights(Model(plain)))
    hybrid = expand(source, 2, kind="sum")
    assert hybrid.config.pattern == ("rwkv7", "rwkv7", "sum") * 2
    ids = random_ids(20)
    with torch.no_grad():
        assert torch.equal(source.model()(ids)[0], hybrid.model()(ids)[0])


def test_hugging_face_generates_with_it(config: ModelConfig) -> None:
    hf = RwkvxForCausalLM(RwkvxConfig(**config.to_dict()))
    assert hf.config.half_life == 7
    out = hf.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 7


@pytest.mark.parametrize("name", ["Sparse", "mamba", "", 3])
def test_unknown_kinds_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"pattern must be .* one of rwkv7, sparse, window"):
        ModelConfig.from_dict({**HYBRID.to_dict(), "pattern": ["rwkv7", name]})


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InputError, match="unknown model key 'half_life'"):
        ModelConfig.from_dict({**HYBRID.to_dict(), "half_life": 3})
    with pytest.raises(InputError, match="unknown option 'half_life'; known: window"):
        ModelConfig(40, 32, ("rwkv7",), 8, options={"half_life": 3}, tokenizer="bytes")


def test_states_end_with_what_the_block_puts_in() -> None:
    """`Block.forward` makes the new state of all other fields and this one."""
    assert {kind.State._fields[-1] for kind in KINDS.values()} == {"ffn_shift"}
