"""What a Hugging Face tokenizer puts around a prompt: a document's start, a chat template."""

from __future__ import annotations

from typing import Any

from rwkvx.errors import InputError
from rwkvx_evals.models.reader import Frame

# Stands for the prompt while a template is rendered; no template holds it.
_PROMPT = "\u2407prompt\u2407"


def frame_of(tokenizer: Any, chat: bool = False) -> Frame:
    """Ids before and after every prompt; a document starts once, whoever puts its start there.

    Raises InputError: a chat template is wanted and there is none, or it changes the prompt.
    """
    document = _start_of_document(tokenizer)
    if not chat:
        return Frame(document, start=len(document))
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat-template: this tokenizer has no chat template")
    messages = [{"role": "user", "content": _PROMPT}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, found, after = text.partition(_PROMPT)
    if not found or _PROMPT in after:
        raise InputError("--chat-template: the template does not hold the prompt exactly once")
    start, end = (
        tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after)
    )
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and start.count(bos) > 1:
        raise InputError(f"--chat-template: the template starts {start.count(bos)} documents")
    shared = len(document) if start[: len(document)] == document else 0
    return Frame(start, end, shared)


def _start_of_document(tokenizer: Any) -> tuple[int, ...]:
    """The special ids that the tokenizer itself puts before a text."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    places = range(len(full) - len(plain) + 1)
    found = next((i for i in places if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:found])
