"""Reading one token after the other, the fastest way that a model and a machine allow.

Prefill reads many tokens in one forward; decoding is that same forward one token at a time, and
costs what a call costs. A decoder does the same arithmetic in fewer calls: compiled on a CPU; on a
GPU a few launches for each block, all in one CUDA graph. Everything that decodes (sampling,
evaluations, Hugging Face's `generate`, the benchmark) starts here.
Axes: B batch rows, V vocabulary.
"""

from typing import Any, Protocol

from torch import Tensor

from rwkvx.decoding.compiled import CompiledDecoder, can_compile
from rwkvx.decoding.eager import EagerDecoder
from rwkvx.decoding.fused import form_of
from rwkvx.decoding.graph import GraphDecoder, can_capture
from rwkvx.layers import is_hooked
from rwkvx.model import Model
from rwkvx_kernels.dispatch import Choice

__all__ = ["Decoder", "choose", "start"]

# Capturing a graph costs about as much as some steps.
WORTHWHILE = 32


class Decoder(Protocol):
    """The continuation of a state, token by token; the state that it started from stays valid."""

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]: the logits [B, 1, V] after them, without gradients."""
        ...

    @property
    def room(self) -> int | None:
        """How many tokens may still be read; None: any number."""
        ...

    @property
    def state(self) -> Any:
        """After the tokens read so far; further steps leave it as it is."""
        ...


def start(model: Any, state: Any, tokens: int) -> Decoder:
    """A decoder for up to `tokens` more tokens.

    Args:
        model: `Model`, or anything called as ``model(ids, state, logits="last")``.
        state: after the prompt.

    Raises:
        InputError: the state is not one of this model.
    """
    if not isinstance(model, Model):
        return EagerDecoder(model, state)
    rows = state.rows
    model.check_state(state, rows)
    match choose(model, rows, tokens).impl:
        case "graph":
            return GraphDecoder(model, state, tokens)
        case "compiled":
            return CompiledDecoder(model, state)
    return EagerDecoder(model, state)


def choose(model: Model, rows: int, tokens: int) -> Choice:
    """How `start` decodes so many tokens of so many rows: "eager", "compiled" or "graph"."""
    if model.impl in ("reference", "torch"):
        return Choice("eager", f"impl={model.impl!r} asks for the modules")
    if model.recurrent_pieces != 1:
        return Choice("eager", "sequences are read in pieces")
    if is_hooked(model):
        return Choice("eager", "hooks on the model want to see its calls")
    if model.device.type == "cpu":
        why_not = can_compile(model, rows)
        return Choice("eager", why_not) if why_not else Choice("compiled", "one row on a CPU")
    if model.device.type == "cuda" and tokens < WORTHWHILE:
        return Choice("eager", f"fewer than {WORTHWHILE} tokens are not worth a graph")
    why_not = can_capture(model)
    if why_not:
        return Choice("eager", why_not)
    few = sum(weights is not None for weights in form_of(model).weights)
    why = f"the same launches every time, few for {few} of {len(model.blocks)} blocks"
    return Choice("graph", why)
