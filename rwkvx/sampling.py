"""Drawing tokens from a model, one at a time, through ``model(ids, state)`` alone.

Axis suffixes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkvx.decoding import start
from rwkvx.dtypes import wider
from rwkvx.errors import InputError
from rwkvx.ranges import NEW_TOKENS, SEED, TEMPERATURE, TOP_P, check

__all__ = ["check_logits", "document_start", "generate", "pick_token"]

PIECE_TOKENS = 16_384  # of a prompt, between two words on how far it has been read


def check_logits(logits: Tensor) -> Tensor:
    """The logits as they are, of any shape: what every draw of a token goes through first.

    Raises:
        InputError: NaN or infinities among them, with the dtype to try.
    """
    if not bool(torch.isfinite(logits).all()):
        name = str(logits.dtype).removeprefix("torch.")
        raise InputError(
            f"the model's logits hold NaN or infinities in {name}: try dtype {wider(name)}, and "
            "check the weights if that has them too"
        )
    return logits


def pick_token(
    logits_V: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
    top_k: int = 0,
) -> int:
    """Draw one token id.

    Args:
        logits_V: any float dtype, any device; the draw happens in float32 on the CPU, so that a
            seed means the same on every device.
        temperature: 0 takes the largest logit; otherwise logits are divided by it.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum.
        generator: a CPU generator; None uses torch's own.
        top_k: keep so many of the largest logits, and those equal to the least of them; 0: all.

    Raises:
        InputError: logits that are not finite.
    """
    logits_V = check_logits(logits_V.detach()).float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    if 0 < top_k < len(logits_V):
        least = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    # Below the largest one, so that no temperature, however small, makes infinities of it.
    scale = max(temperature, torch.finfo(torch.float32).tiny)
    probs_V = torch.softmax((logits_V - logits_V.max()) / scale, dim=-1)
    probs_V, order_V = probs_V.sort(descending=True)
    # A token stays while the sum *before* it is short of top_p: at least one always does.
    cut_V = probs_V.cumsum(-1) - probs_V >= top_p
    cut_V[0] = False  # in float32 the smallest top_p are 0
    probs_V[cut_V] = 0
    return int(order_V[torch.multinomial(probs_V, 1, generator=generator)])


def document_start(model: Any) -> int:
    """The id that ends a document, and with which one begins; 0 for a model without a tokenizer."""
    try:
        return int(model.tokenizer.eos_token_id or 0)
    except (AttributeError, InputError):
        return 0


def generate(
    model: Any,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] | None = None,
    device: str = "cpu",
    advance: Callable[[int], object] | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids that continue `ids`; stops before an id of `stop_ids`.

    Args:
        model: `rwkvx.Model`, or anything called as ``model(ids_BT, state, logits="last")`` that
            returns logits [B, 1, V] and the next state.
        ids: the prompt; empty means the start of a document.
        seed: for the same continuation again on the same machine.
        stop_ids: None for the id that ends a document.
        device: where the model reads its ids.
        advance: told how many tokens of the prompt have been read, piece by piece.

    Raises:
        InputError: a value out of its range, before anything is read; logits that are not finite.
    """
    check("temperature", temperature, TEMPERATURE)
    check("top-p", top_p, TOP_P)
    check("max-tokens", max_tokens, NEW_TOKENS)
    check("seed", 0 if seed is None else seed, SEED)

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def pick(logits_V: Tensor) -> int:
        return pick_token(logits_V, temperature, top_p, generator)

    end = document_start(model)
    stop = {end} if stop_ids is None else set(stop_ids)
    prompt = torch.tensor([list(ids) or [end]], device=device)
    return _steps(model, prompt, max_tokens, stop, pick, advance)


@torch.no_grad()
def _steps(
    model: Any,
    ids_BT: Tensor,
    max_tokens: int,
    stop_ids: set[int],
    pick: Callable[[Tensor], int],
    advance: Callable[[int], object] | None,
) -> Iterator[int]:
    if max_tokens == 0:
        return
    state: Any = None
    *parts, last = ids_BT.split(PIECE_TOKENS, dim=1)
    for part in parts:
        _, state = model(part, state, logits="none")
        if advance is not None:
            advance(part.shape[1])
    logits_BTV, state = model(last, state, logits="last")
    if advance is not None:
        advance(last.shape[1])
    decoder = start(model, state, max_tokens - 1)
    for left in reversed(range(max_tokens)):
        token = pick(logits_BTV[0, -1])
        if token in stop_ids:
            return
        yield token
        if left:
            logits_BTV = decoder.step(torch.tensor([[token]], device=ids_BT.device))
