"""An OpenAI-compatible endpoint: prompts go out as text, answers come back, or a reason why not.

The official `openai` client brings the protocol, pooled connections and retries with back-off that
honour what the server asks for (429, 5xx, broken connections).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rwkvx.errors import InputError
from rwkvx_evals.files import digest
from rwkvx_evals.generate import Limit, cut_at
from rwkvx_evals.interface import Tokenizer

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 4
TIMEOUT = 600.0
# Seconds beyond the time limit that retries and their back-off may take.
GRACE = 60.0
# The protocol takes no more; the others are cut here.
STOPS = 4
_CUT_SHORT = ("content_filter", "error", "abort")


class EndpointError(Exception):
    """Why one prompt has no answer, in one line."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    logprob: mean log-probability of its tokens, None where the server tells none. prompt_tokens:
    as the server counted them, None where it did not.
    """

    text: str
    tokens: int | None = None
    logprob: float | None = None
    prompt_tokens: int | None = None


@dataclass
class Endpoint:
    """Where to ask, and how.

    Attributes:
        url: up to and with /v1. name: of the model there. chat: prompts are messages of a user.
        timeout: seconds that one prompt may take; GRACE more with all retries.
        max_length: tokens, as the server tells; None where it does not.
    """

    url: str
    name: str
    tokenizer: Tokenizer
    chat: bool = False
    timeout: float = TIMEOUT
    max_length: int | None = None
    _logprobs: bool = field(default=True, repr=False)

    def fingerprint(self) -> str:
        """Of the address and the name: what the weights are, only the server knows."""
        return digest(["endpoint", self.url, self.name])

    def client(self) -> AsyncOpenAI:
        """A client for one event loop; a key, where the server wants one, is OPENAI_API_KEY."""
        openai = _openai()
        client: AsyncOpenAI = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=RETRIES,
            timeout=self.timeout,
        )
        return client

    async def complete(self, client: AsyncOpenAI, text: str, limit: Limit) -> Completion:
        """The greedy answer to a prompt. Raises EndpointError with the reason for none."""
        openai = _openai()
        try:
            async with asyncio.timeout(self.timeout + GRACE):
                return await self._ask(client, text, limit)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise EndpointError(f"no answer within {self.timeout:.0f} s") from error
        except openai.APIStatusError as error:
            said = " ".join(str(error).split())[:300]
            raise EndpointError(f"status {error.status_code}: {said}") from error
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise EndpointError(
                f"connection broke: {str(reason) or type(reason).__name__}"
            ) from error
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            raise EndpointError(f"not an answer of this protocol: {said}") from error

    async def _ask(self, client: AsyncOpenAI, text: str, limit: Limit) -> Completion:
        if self._logprobs:
            try:
                return await self._send(client, text, limit, True)
            except _openai().BadRequestError:
                # Perhaps because of the log-probabilities, perhaps not: the second try will tell.
                found = await self._send(client, text, limit, False)
                self._logprobs = False
                return found
        return await self._send(client, text, limit, False)

    async def _send(
        self, client: AsyncOpenAI, text: str, limit: Limit, logprobs: bool
    ) -> Completion:
        body: dict[str, Any] = {"model": self.name, "temperature": 0, "max_tokens": limit.tokens}
        if limit.stop:
            body["stop"] = list(limit.stop[:STOPS])
        if logprobs:
            body["logprobs"] = True if self.chat else 1
        if self.chat:
            messages = [{"role": "user", "content": text}]
            answer = await client.chat.completions.create(messages=messages, **body)
        else:
            answer = await client.completions.create(prompt=text, **body)
        return self._read(answer, limit)

    def _read(self, answer: Any, limit: Limit) -> Completion:
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or len(choices) != 1:
            raise EndpointError(f"not an answer of this protocol: {str(answer)[:120]!r}")
        choice = choices[0]
        text = choice.message.content if self.chat else choice.text
        if not isinstance(text, str):
            raise EndpointError("the answer holds no text")
        if not choice.finish_reason or choice.finish_reason in _CUT_SHORT:
            raise EndpointError(f"the answer was cut short ({choice.finish_reason})")
        usage = getattr(answer, "usage", None)
        return Completion(
            cut_at(text, limit.stop)[0],
            getattr(usage, "completion_tokens", None),
            _mean_logprob(choice, self.chat),
            getattr(usage, "prompt_tokens", None),
        )


def _mean_logprob(choice: Any, chat: bool) -> float | None:
    told = getattr(choice, "logprobs", None)
    if told is None:
        return None
    if chat:
        values = [token.logprob for token in getattr(told, "content", None) or []]
    else:
        values = list(getattr(told, "token_logprobs", None) or [])
    numbers = [float(v) for v in values if v is not None]
    return round(sum(numbers) / len(numbers), 6) if numbers else None


def open_endpoint(
    url: str,
    name: str | None,
    tokenizer: Tokenizer,
    *,
    chat: bool = False,
    timeout: float = TIMEOUT,
    max_length: int | None = None,
) -> Endpoint:
    """Asks the server what it has, before anything is computed.

    Raises InputError: nobody there, no such model, several and none is named.
    """
    found = Endpoint(url.rstrip("/"), name or "", tokenizer, chat, timeout, max_length)
    entries = asyncio.run(_models(found))
    names = [entry.id for entry in entries]
    if name is None:
        if len(names) != 1:
            listed = ", ".join(names[:8]) or "none is told"
            raise InputError(f"--model-name: {url} has {len(names)} models ({listed}): name one")
        found.name = names[0]
    elif names and name not in names:
        raise InputError(f"{url} has no model {name!r}; it has {', '.join(names[:8])}")
    if max_length is None:
        told = [getattr(e, "max_model_len", None) for e in entries if e.id == found.name]
        found.max_length = next((int(n) for n in told if isinstance(n, int) and n > 0), None)
    return found


async def _models(endpoint: Endpoint) -> Sequence[Any]:
    """What the server lists; nothing where it does not answer that question."""
    openai = _openai()
    short = min(endpoint.timeout, 30.0)
    try:
        async with endpoint.client() as client, asyncio.timeout(short):
            listed = await client.with_options(max_retries=1, timeout=short).models.list()
            entries = getattr(listed, "data", None)
            return (
                [e for e in entries if isinstance(getattr(e, "id", None), str)] if entries else []
            )
    except (openai.APIConnectionError, TimeoutError) as error:
        reason = str(error.__cause__ or error) or "it does not answer"
        raise InputError(f"cannot reach {endpoint.url}: {reason}") from error
    except openai.AuthenticationError as error:
        raise InputError(f"{endpoint.url} wants a key: set OPENAI_API_KEY") from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError):
        return []


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise InputError(
            "an endpoint needs the package openai: pip install 'rwkvx[eval]'"
        ) from error
    return openai
