"""Texts as token ids: where a continuation starts, and what stands before a text without tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rwkvx_evals.lm.requests import Ids

Encode = Callable[[str], list[int]]


class Pair(NamedTuple):
    """A context and the continuation to score after it.

    continuation: empty for an empty text only. merged: its first token also holds the end of the
    context's text.
    """

    context: Ids
    continuation: Ids
    merged: bool = False


def from_start(tokens: list[int], start: int) -> Pair:
    """A text with nothing before it, to be scored after one end-of-document token `start`.

    A text that begins with that token gains no second one, unless it holds nothing else: something
    must be left to predict.
    """
    own = tokens[0] == start and len(tokens) > 1 if tokens else False
    return Pair((start,), tuple(tokens[1:] if own else tokens))


def encode_pair(encode: Encode, start: int, context: str, continuation: str) -> Pair:
    """Splits `context + continuation`, encoded as one text, where the context's own tokens end.

    As `_encode_pair` of lm-eval, spaces at the end of a context count as the continuation's. Where
    the two merge, "4" and "2" to one token "42", the context's tokens are no start of the whole:
    what is scored then begins with the first token that differs, so that all of the continuation
    is scored and none of it is certain for free (lm-eval takes as many tokens as the context has,
    which leaves part of a continuation out, or all of it).
    """
    if not continuation:
        return Pair(tuple(encode(context)) or (start,), ())
    kept = context.rstrip()
    if not kept:
        return from_start(encode(context + continuation), start)
    head, whole = encode(kept), encode(context + continuation)
    most = min(len(head), len(whole) - 1)
    shared = next((i for i in range(most) if head[i] != whole[i]), most)
    pair = Pair(tuple(whole[:shared]) or (start,), tuple(whole[shared:]), shared < len(head))
    assert head[0] == start or pair.context[0] != start or shared == 0, "a second document start"
    return pair
