"""The lm-evaluation-harness model class, registered as `rwkvx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import rwkvx
from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx_evals.files import code_fingerprint, digest
from rwkvx_evals.interface import Advance, StateTools, device_of
from rwkvx_evals.journal import Journal
from rwkvx_evals.lm.generation import Generator, Prompt
from rwkvx_evals.lm.requests import Ids, Request, truncate
from rwkvx_evals.lm.scoring import Score, Scorer

TRUNCATIONS = ("left", "middle")
# Rows read together. On a CPU more rows win no speed and cost padding: LAMBADA and PIQA in bytes
# are 2.24 M tokens, fed as 2.31 M in batches of 16 and as 2.76 M in batches of 64.
DEFAULT_BATCH = {"cpu": 16, "cuda": 64}
DEFAULT_NEW_TOKENS = 256


@register_model("rwkvx")
class RwkvxLM(TemplateLM):
    """Log-likelihoods and greedy generation for lm-eval.

    There is no maximum length unless `max_length` is given. A longer request is then refused,
    unless `truncate` says which part of its context to drop; `truncated` counts those.
    A request whose logits are not numbers, or that does not fit into memory, answers
    not-a-number; `failed` and `failures` say how many, in all and by task.
    """

    def __init__(
        self,
        pretrained: Any = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        truncate: str | None = None,
        *,
        journal: Journal | None = None,
        tools: StateTools | None = None,
        quiet: bool = False,
    ) -> None:
        """pretrained: a name or path for `rwkvx.load`, or a loaded model."""
        super().__init__()
        if pretrained is None:
            raise InputError("lm-eval model rwkvx needs pretrained=NAME or a path")
        if truncate is not None and truncate not in TRUNCATIONS:
            raise InputError(f"truncate {truncate!r} is not one of: left, middle")
        if max_length is not None and int(max_length) < 1:
            raise InputError(f"maximum length {max_length}: at least one token is needed")
        model = pretrained
        if isinstance(pretrained, str):
            model = rwkvx.load(pretrained, device=device, dtype=dtype)
        self.model, self.tokenizer = model, model.tokenizer
        self.max_length = None if max_length is None else int(max_length)
        self.truncate, self.truncated = truncate, 0
        self.failures: dict[str, dict[str, int]] = {}
        self.asked: dict[str, int] = {}
        self._device, self._quiet = device, quiet
        identity = digest([model.fingerprint(), code_fingerprint(), str(dtype)])
        self._scorer = Scorer(
            model,
            model.config.vocab_size,
            batch=_batch(batch_size, max_batch_size, device_of(model).type),
            tools=tools or StateTools(),
            journal=journal,
            identity=identity,
            progress=self._progress("log-likelihoods"),
        )
        self._names: Sequence[str] = ()

    @property
    def failed(self) -> int:
        """Requests without an answer."""
        return sum(sum(found.values()) for found in self.failures.values())

    @property
    def eot_token_id(self) -> int:
        """The end of document, which also starts one."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request caches."""
        return f"rwkvx-{self.model.config.tokenizer}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; special tokens are never added here."""
        return list(self.tokenizer.encode(string, add_special_tokens=False))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each continuation after its context."""
        self._names = _names(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self._names = ()
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored: list[Request] = []
        for (context, _), context_ids, continuation in requests:
            self._check_start(context, context_ids)
            scored.append(Request(tuple(context_ids), tuple(continuation)))
        return [(_number(s), s.greedy) for s in self._score(scored, self._names)]

    def _score(self, requests: Sequence[Request], names: Sequence[str]) -> list[Score]:
        """Scores after the length check; a request without any target has log-probability 0."""
        fitted = self._fit_all(requests)
        scored = iter(self._scorer.score([r for r in fitted if r.continuation]))
        scores = [next(scored) if r.continuation else Score(0.0, True) for r in fitted]
        self._count(names or ["requests"] * len(scores), scores)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text after one end-of-document token."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for context, continuation in self._windows(self.tok_encode(request.args[0])):
                windows.append(Request(context, continuation))
                owners.append(number)
        names = _names(requests)
        totals = [0.0] * len(requests)
        scores = self._score(windows, [names[owner] for owner in owners])
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += _number(score)
        return totals

    def _windows(self, tokens: list[int]) -> list[tuple[Ids, Ids]]:
        """(context, continuation) pairs that together predict every token of a text once."""
        if not tokens:
            return []
        start = self.eot_token_id
        if self.max_length is None:
            body = tokens[1:] if tokens[0] == start else tokens
            return [((start,), tuple(body))] if body else []
        pairs = get_rolling_token_windows(tokens, start, self.max_length, 1)
        found = [make_disjoint_window(pair) for pair in pairs]
        return [(tuple(context), tuple(continuation)) for context, continuation in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to a stop string."""
        prompts = []
        for request in requests:
            context, options = request.args
            ids = self.tok_encode(context) or [self.eot_token_id]
            self._check_start(context, ids)
            until, limit = _generation_options(options)
            prompts.append(self._fit_prompt(Prompt(tuple(ids), until, limit)))
        self._scorer.progress = self._progress("generation")
        texts = Generator(self._scorer).generate(prompts)
        self._scorer.progress = self._progress("log-likelihoods")
        self._count(_names(requests), texts)
        return [text.text for text in texts]

    def _check_start(self, context: str, ids: list[int]) -> None:
        """An empty context is exactly one end-of-document token; no other gains one."""
        start = self.eot_token_id
        if context == "":
            assert list(ids) == [start], f"an empty context became {ids}"
        elif ids[0] == start:
            assert self.tok_encode(context)[:1] == [start], "a document start was added"

    def _fit_all(self, requests: Sequence[Request]) -> list[Request]:
        """Requests within the maximum length; raises InputError unless truncation was asked for."""
        limit = self.max_length
        # The last token is predicted and never fed.
        sizes = [len(r.context) + len(r.continuation) - 1 for r in requests]
        over = sum(limit is not None and size > limit for size in sizes)
        if limit is None or over == 0:
            return list(requests)
        if self.truncate is None:
            raise InputError(
                f"{over} of {len(requests)} requests are longer than {limit} tokens (the longest "
                f"has {max(sizes)}): raise the maximum length, or give --truncate left or middle"
            )
        self.truncated += over
        return [self._shorten(request, limit) for request in requests]

    def _shorten(self, request: Request, limit: int) -> Request:
        room = limit - len(request.continuation) + 1
        if room < 1:
            raise InputError(
                f"a continuation of {len(request.continuation)} tokens does not fit into {limit}"
            )
        assert self.truncate is not None
        context = truncate(request.context, room, self.truncate)
        return Request(context, request.continuation)

    def _fit_prompt(self, prompt: Prompt) -> Prompt:
        placeholder = Request(prompt.context, (0,) * (prompt.limit + 1))
        return Prompt(self._fit_all([placeholder])[0].context, prompt.until, prompt.limit)

    def _count(self, names: Sequence[str], answers: Sequence[Any]) -> None:
        for name, answer in zip(names, answers, strict=True):
            self.asked[name] = self.asked.get(name, 0) + 1
            if answer.status != "ok":
                found = self.failures.setdefault(name, {"oom": 0, "invalid": 0})
                found[answer.status] += 1

    def _progress(self, what: str) -> Callable[[int], Advance]:
        def start(total: int) -> Advance:
            bar = progress(total, what, quiet=self._quiet or total == 0)

            def advance(tokens: int) -> None:
                bar.update(tokens)
                if bar.n >= total:
                    bar.close()

            return advance

        return start


def _names(requests: Sequence[Instance]) -> list[str]:
    return [str(request.task_name) for request in requests]


def _number(score: Score) -> float:
    return float("nan") if score.logprob is None else score.logprob


def _batch(batch_size: int | str | None, max_batch_size: int | None, device: str) -> int:
    """Rows read together; None and "auto" mean the default of the device."""
    if batch_size in (None, "auto"):
        return int(max_batch_size or DEFAULT_BATCH.get(device, 64))
    size = int(str(batch_size).removeprefix("auto:"))
    if size < 1:
        raise InputError(f"batch size {batch_size}: at least one is needed")
    return size


def _generation_options(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and the token limit; raises InputError for sampling."""
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") and temperature > 0.0:
        raise InputError("the task asks for sampling; only greedy generation is supported here")
    until = options.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    limit = options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    return stops, int(limit)
