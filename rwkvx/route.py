"""Which implementations run for a model, and why."""

from typing import NamedTuple

from rwkvx.decoding import choose as choose_decoder
from rwkvx.errors import InputError
from rwkvx.layers import PRODUCTS
from rwkvx.model import Model
from rwkvx_kernels.channel_mix.api import choose as choose_squared_relu
from rwkvx_kernels.dispatch import Choice, Facts
from rwkvx_kernels.linear.api import choose as choose_linear
from rwkvx_kernels.token_shift.api import choose as choose_token_shift


class Step(NamedTuple):
    """One operation of a forward, in the order of a block.

    Attributes:
        where: the kind of block, "every block", "model" or "decoding".
        impl: what runs: an implementation, or the name of a decoder.
    """

    where: str
    operation: str
    impl: str
    why: str


def explain(model: Model, batch: int = 1, tokens: int = 1, training: bool = False) -> list[Step]:
    """What runs when a model reads so many tokens of so many rows, and why.

    Nothing is computed: the choices are those that the operations make themselves.

    Args:
        batch, tokens: of one call; longer inputs are read in segments (`Model.segment_lengths`).
        training: whether gradients are wanted.

    Raises:
        InputError: fewer than one row or token.
        UnsupportedError: `model.impl` asks for what is not there.
    """
    if min(batch, tokens) < 1:
        raise InputError(f"batch and tokens must be 1 or more, got {batch} and {tokens}")
    if not training:
        tokens = max(model.segment_lengths(batch, tokens))
    facts = Facts(model.device, model.dtype, training)
    rows, impl = batch * tokens, model.impl
    steps = []

    def add(where: str, operation: str, choice: Choice) -> None:
        steps.append(Step(where, operation, *choice))

    for kind in dict.fromkeys(model.config.pattern):
        mixer = list(model.blocks)[model.config.pattern.index(kind)].att
        for operation, choice in mixer.route(facts, rows, tokens).items():
            add(kind, operation, choice)
    products = choose_linear(facts, rows, PRODUCTS.get(impl, impl))
    add("every block", "token shift", choose_token_shift(facts, impl))
    add("every block", "products", products)
    add("every block", "squared ReLU", choose_squared_relu(facts, impl))
    add("model", "head", products)
    if tokens == 1 and not training:
        add("decoding", "decoder", choose_decoder(model, batch, 1 << 20))
    return steps
