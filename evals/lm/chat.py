"""Prompts as conversations: a model's chat template, and reading the tokens that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from rwkvx.checkpoint.load import find_model
from rwkvx.errors import InputError

# Where Hugging Face keeps templates beside a model.
_FILES = ("chat_template.jinja", "tokenizer_config.json")


class Chat:
    """The chat template of one model, looked for when it is asked for.

    Until a template is applied, a text that spells the name of a special token is only text; after
    that such names are read as the tokens, as the template means them.
    """

    def __init__(self, tokenizer: Any, model: Any, file: str | None) -> None:
        """model: the name or path that it was loaded from, or anything else. file: a template to
        use in place of the model's own."""
        self._tokenizer, self._model, self._file = tokenizer, model, file
        self._template: str | None = None

    @property
    def name(self) -> str:
        """The template's text, or "none"; for caches."""
        return self._template or "none"

    def select(self, name: bool | str) -> str:
        """The template: the model's one, or of several the one called `name`.

        Raises InputError where there is none of that name, or none at all.
        """
        found = self._find()
        if isinstance(found, dict):
            wanted = name if isinstance(name, str) else "default"
            if wanted not in found:
                raise InputError(
                    f"the model has no chat template {wanted!r}: choose from {', '.join(found)}"
                )
            found = found[wanted]
        if not found:
            raise InputError(
                "the model has no chat template: put chat_template.jinja into its folder, or name "
                "a file of one (chat_template=FILE)"
            )
        self._template = str(found)
        return self._template

    def _find(self) -> Any:
        if self._file is not None:
            try:
                return Path(self._file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise InputError(f"cannot read chat template {self._file!r}: {reason}") from error
        if isinstance(self._model, str):
            folder = find_model(self._model)
            if any((folder / file).is_file() for file in _FILES):
                try:
                    return type(self._tokenizer).from_pretrained(str(folder)).chat_template
                except (OSError, ValueError) as error:
                    raise InputError(f"cannot read the tokenizer of {folder}: {error}") from error
        return getattr(self._tokenizer, "chat_template", None)

    def apply(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The turns of a conversation as one text; the last one is continued, or answered."""
        template = self._template or self.select(True)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    history,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except (jinja2.TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(f"the chat template refuses a conversation: {reason}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids; none are added."""
        more = {} if self._template is None else {"split_special_tokens": False}
        return list(self._tokenizer.encode(text, add_special_tokens=False, **more))
