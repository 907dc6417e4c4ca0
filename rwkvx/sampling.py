"""Drawing tokens from a model, one at a time, through ``model(ids, state)`` alone.

Axis suffixes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkvx.decode_graph import one_token_steps
from rwkvx.errors import InputError

__all__ = ["generate", "pick_token"]


def pick_token(
    logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> int:
    """Draw one token id.

    Args:
        logits_V: any float dtype, any device; the draw happens in float32 on the CPU, so that a
            seed means the same on every device.
        temperature: 0 takes the largest logit; otherwise logits are divided by it.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum.
        generator: a CPU generator; None uses torch's own.
    """
    logits_V = logits_V.detach().float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, order_V = torch.softmax(logits_V / temperature, dim=-1).sort(descending=True)
    # A token stays while the sum *before* it is short of top_p: at least one always does.
    probs_V[probs_V.cumsum(-1) - probs_V >= top_p] = 0
    return int(order_V[torch.multinomial(probs_V, 1, generator=generator)])


def generate(
    model: Any,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] = (0,),
    device: str = "cpu",
    state: Any = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids that continue `ids`; stops before an id of `stop_ids`.

    Args:
        model: `rwkvx.Model`, or anything called as ``model(ids_BT, state, logits="last")`` that
            returns logits [B, 1, V] and the next state.
        ids: the prompt; empty means the start of a document (id 0 is read).
        seed: for the same continuation again on the same machine.
        device: where the model reads its ids.
        state: what the model has read before `ids`; None at the start.

    Raises:
        InputError: a negative temperature, `top_p` outside (0, 1], `max_tokens` below 0.
    """
    if not (temperature >= 0 and temperature != float("inf")):
        raise InputError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top-p must be above 0 and at most 1, got {top_p}")
    if max_tokens < 0:
        raise InputError(f"max-tokens must be 0 or more, got {max_tokens}")

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def pick(logits_V: Tensor) -> int:
        return pick_token(logits_V, temperature, top_p, generator)

    return _steps(model, list(ids) or [0], max_tokens, set(stop_ids), device, pick, state)


@torch.no_grad()
def _steps(
    model: Any,
    ids: list[int],
    max_tokens: int,
    stop_ids: set[int],
    device: str,
    pick: Callable[[Tensor], int],
    state: Any,
) -> Iterator[int]:
    if max_tokens == 0:
        return
    logits_BTV, state = model(torch.tensor([ids], device=device), state, logits="last")
    step = one_token_steps(model, state, max_tokens - 1)
    for left in reversed(range(max_tokens)):
        token = pick(logits_BTV[0, -1])
        if token in stop_ids:
            return
        yield token
        if left:
            logits_BTV = step(torch.tensor([[token]], device=device))
