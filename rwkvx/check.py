"""Whether everything that can run a model on this machine computes the published equations.

Axes: T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx.decoding import start
from rwkvx.equations import Equations
from rwkvx.model import IMPLS, Model

# A route may err so many times as much as the reference does in the same dtype: sums in another
# order, exponentials of another library.
FACTOR = 4.0
# In float64 the equations themselves round.
LEAST = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = {"reference": torch.float64, "torch": torch.float64}  # others: float32


class Row(NamedTuple):
    """One route.

    Attributes:
        reading: "whole", "in parts" or "token by token" (with the name of the decoder).
        error: root mean square of the difference of all logits over that of the expected ones;
            None where the route is not there, `why` says the reason.
    """

    impl: str
    dtype: str
    reading: str
    error: float | None
    allowed: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Within what is allowed, or not there."""
        return self.error is None or self.error <= self.allowed


def check(model: Model, tokens: int = 96, seed: int = 0) -> Iterator[Row]:
    """Compare every implementation, whole, in parts and token by token, with `Equations`.

    Args:
        model: its weights in any dtype; they are not changed. Slow for large models: the equations
            read token by token in numpy.
        tokens: of one random sequence, at least 2: enough to fill several chunks of the model.
        seed: of that sequence.

    Returns:
        A `Row` for each implementation ("reference" and "torch" in float64 and float32, others in
        float32) and way of reading, as soon as it is measured: `error`, the root mean square of
        the difference of all logits [1, T, V] over that of the expected ones; `allowed`, four
        times that of "reference" in the same dtype, and at least what float64 equations round;
        `passed`; `why`, where an implementation is not there.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    parameters = {name: x.detach().double().cpu().numpy() for name, x in model.named_parameters()}
    expected = torch.from_numpy(Equations(model.config, parameters).logits(ids[0].tolist()))
    own = {torch.float64: 0.0}
    for impl in IMPLS[1:]:
        for dtype in dict.fromkeys((DTYPES.get(impl, torch.float32), torch.float32)):
            copy = _copy(model, dtype, impl)
            if dtype not in own:  # the reference comes first
                own[dtype] = _error(_whole(copy, ids), expected)
            allowed = max(FACTOR * own[dtype], LEAST[dtype])
            yield from _routes(copy, ids, expected, allowed)


def _routes(model: Model, ids: Tensor, expected: Tensor, allowed: float) -> Iterator[Row]:
    """All ways of reading with one implementation."""
    decoder = type(start(model, model.fresh_state(1), ids.shape[1])).__name__
    readings: dict[str, Callable[[Model, Tensor], Tensor]] = {
        "whole": _whole,
        "in parts": _in_parts,
        f"token by token ({decoder})": _token_by_token,
    }
    dtype = str(model.dtype).removeprefix("torch.")
    for reading, read in readings.items():
        try:
            error = _error(read(model, ids), expected)
        except (NotImplementedError, ValueError, ModuleNotFoundError) as problem:
            yield Row(model.impl, dtype, reading, None, allowed, str(problem))
            return
        yield Row(model.impl, dtype, reading, error, allowed)


def _copy(model: Model, dtype: torch.dtype, impl: str) -> Model:
    with torch.device("meta"):
        copy = Model(model.config)
    tensors = {name: x.detach().to(dtype) for name, x in model.state_dict().items()}
    copy.load_state_dict(tensors, assign=True)
    copy.impl = impl
    return copy.eval()


@torch.no_grad()
def _whole(model: Model, ids: Tensor) -> Tensor:
    logits, _ = model(ids.to(model.device))
    assert logits is not None
    return logits


@torch.no_grad()
def _in_parts(model: Model, ids: Tensor) -> Tensor:
    parts, state = [], None
    third = max(1, ids.shape[1] // 3)
    for part in ids.to(model.device).split([third, 1, ids.shape[1] - third - 1], dim=1):
        logits, state = model(part, state)
        parts.append(logits)
    return torch.cat(parts, dim=1)


def _token_by_token(model: Model, ids: Tensor) -> Tensor:
    decoder = start(model, model.fresh_state(1), ids.shape[1])
    return torch.cat([decoder.step(x) for x in ids.to(model.device).split(1, dim=1)], dim=1)


def _error(logits_1TV: Tensor, expected_TV: Tensor) -> float:
    difference = logits_1TV[0].double().cpu() - expected_TV
    return float(difference.norm() / expected_TV.norm())
