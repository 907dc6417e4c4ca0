"""Published packages on the very weights of our model."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import rwkvx
from rwkvx.checkpoint import pth
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx_evals.bench import llama

HYBRID, RWKV7, LLAMA = "rwkv-x", "rwkv", "llama.cpp"
NAMES = (HYBRID, RWKV7, LLAMA)
# Which of them is asked, where none is named: by the layout that holds the model.
BY_LAYOUT = {pth.RWKVX: HYBRID, pth.BLINKDL: RWKV7}
# What must be installed: distribution -> module, the one to be named first.
MODULES = {
    HYBRID: {"rwkv-x": "rwkv_x"},
    RWKV7: {"rwkv": "rwkv"},
    LLAMA: {"llama-cpp-python": "llama_cpp", "gguf": "gguf"},
}
STRATEGIES = {"float32": "cpu fp32", "bfloat16": "cpu bf16"}
HEAD_SIZE = 64  # that rwkv and rwkv-x know


class Peer(Protocol):
    """A package on the CPU.

    Attributes:
        dtype: "float32" or "bfloat16".
        tolerance: largest difference of its float32 logits to ours, relative to the largest.
        rounds: whether activations are of that dtype too (llama.cpp's are float32 always).
    """

    dtype: str
    rounds: bool
    tolerance: float

    def prefill(self, ids: list[int]) -> tuple[Tensor, Any]:
        """Logits [V] of the last token and a state; `ids` of two tokens or more."""
        ...

    def decode(self, token: int, state: Any) -> tuple[Tensor, Any]:
        """Logits [V] after one more token; the state is changed."""
        ...


class TorchPeer:
    """`rwkv-x` for hybrid models, `rwkv` for RWKV-7 alone."""

    tolerance, rounds = 2e-5, True

    def __init__(self, package: str, model: rwkvx.Model, dtype: str) -> None:
        self.dtype, strategy = dtype, STRATEGIES[dtype]
        with tempfile.TemporaryDirectory(prefix="rwkvx-bench-") as folder:
            path = Path(folder) / "model.pth"
            pth.write(Checkpoint.of(model), path)
            with contextlib.redirect_stdout(io.StringIO()):
                if package == HYBRID:
                    from rwkv_x.model import RWKV_X

                    self._model = RWKV_X(str(path), strategy)
                else:
                    os.environ["RWKV_V7_ON"] = "1"
                    from rwkv.model import RWKV

                    self._model = RWKV(str(path.with_suffix("")), strategy)

    def prefill(self, ids: list[int]) -> tuple[Tensor, Any]:
        """See `Peer.prefill`."""
        logits, state = self._model.forward(ids, None)
        return logits, state

    def decode(self, token: int, state: Any) -> tuple[Tensor, Any]:
        """See `Peer.decode`."""
        logits, state = self._model.forward(token, state)
        return logits, state


def open_peer(model: rwkvx.Model, dtype: str, name: str) -> tuple[Peer | None, str]:
    """The peer on the very same weights, through a temporary file in its own layout.

    name: one of `NAMES`, "auto" or "none".

    None where there is none; beside it the words that say which, or why not.
    """
    layout = pth.layout_of(model.config)
    found = name if name in NAMES else BY_LAYOUT.get(layout, HYBRID)
    reason = "not asked for" if name == "none" else _why_not(found, model.config)
    if reason is not None:
        return None, f"{found}: {reason}"
    version = metadata.version(next(iter(MODULES[found])))
    if found == LLAMA:
        return llama.LlamaPeer(model, dtype), f"{found} (llama-cpp-python {version}), {dtype}"
    return TorchPeer(found, model, dtype), f"{found} {version}, {dtype}"


def _why_not(name: str, config: rwkvx.ModelConfig) -> str | None:
    if any(find_spec(module) is None for module in MODULES[name].values()):
        extra = "llama" if name == LLAMA else "peers"
        return f"not installed (pip install 'rwkvx[{extra}]')"
    if name == LLAMA:
        lacks = llama.lacks(config)
        return None if lacks is None else f"cannot hold {lacks}"
    layout = pth.RWKVX if name == HYBRID else pth.BLINKDL
    if lacks := layout.no_place(config):
        return f"cannot hold {lacks}"
    if config.head_size != HEAD_SIZE:
        return f"knows heads of {HEAD_SIZE} only, not of {config.head_size}"
    return None
