"""The lm-evaluation-harness model class, registered as `rwkvx`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx_evals.files import code_fingerprint, digest
from rwkvx_evals.interface import Advance, StateTools, device_of
from rwkvx_evals.journal import Journal
from rwkvx_evals.lm.answers import Score, Text
from rwkvx_evals.lm.chat import Chat
from rwkvx_evals.lm.encoding import Pair, encode_pair, from_start
from rwkvx_evals.lm.generation import Generator, Prompt
from rwkvx_evals.lm.load import open_model
from rwkvx_evals.lm.options import read_options
from rwkvx_evals.lm.requests import Ids, Request, truncate
from rwkvx_evals.lm.scoring import Scorer

TRUNCATIONS = ("left", "middle")
# Rows read together. On a CPU more rows win no speed and cost padding: LAMBADA and PIQA in bytes
# are 2.24 M tokens, fed as 2.31 M in batches of 16 and as 2.76 M in batches of 64.
DEFAULT_BATCH = {"cpu": 16, "cuda": 64}

logger = logging.getLogger("lm_eval.rwkvx")  # shown as lm-eval's own remarks are


@register_model("rwkvx")
class RwkvxLM(TemplateLM):
    """Log-likelihoods and generation for lm-eval.

    There is no maximum length unless `max_length` is given. A longer request is then refused,
    unless `truncate` says which part of its context to drop.

    Attributes:
        asked: requests by task. failures: by task, how many were "invalid" (logits that are no
            numbers) and "oom" (out of memory).
        counts: how many requests were "truncated", had a continuation "merged" with its context
            into one token, or an "empty" one, which is certain.
        decoding: by task, how texts were generated, in words.
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
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        *,
        origin: str | None = None,
        journal: Journal | None = None,
        tools: StateTools | None = None,
        quiet: bool = False,
        strict: bool = True,
        **overrides: Any,
    ) -> None:
        """pretrained: a name or path for `rwkvx.load`, or a loaded model.

        origin: where a loaded model came from, to find its chat template there.
        chat_template: a file with a Jinja template; default: the model's own, where it has one.
        trust_remote_code: for lm-eval's option of that name; no code is loaded.
        strict: a request without an answer raises InputError. Otherwise its log-probability is
            not-a-number, its text empty, and whoever asks must look at `failures`.
        overrides: for `rwkvx.load`.
        """
        super().__init__()
        if truncate is not None and truncate not in TRUNCATIONS:
            raise InputError(f"truncate {truncate!r} is not one of: left, middle")
        if max_length is not None and int(max_length) < 1:
            raise InputError(f"maximum length {max_length}: at least one token is needed")
        self.model = open_model(pretrained, device, dtype, overrides)
        self.tokenizer = self.model.tokenizer
        self.max_length = None if max_length is None else int(max_length)
        self.truncate, self.strict = truncate, strict
        self.asked: dict[str, int] = {}
        self.failures: dict[str, dict[str, int]] = {}
        self.counts: Counter[str] = Counter()
        self.decoding: dict[str, set[str]] = {}
        self._chat = Chat(self.tokenizer, origin or pretrained, chat_template)
        self._device, self._quiet = str(device_of(self.model)), quiet
        self._scorer = Scorer(
            self.model,
            self.model.config.vocab_size,
            batch=_batch(batch_size, max_batch_size, device_of(self.model).type),
            tools=tools or StateTools(),
            journal=journal,
            identity=digest([self.model.fingerprint(), code_fingerprint(), str(dtype)]),
            progress=self._progress("log-likelihoods"),
        )

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
        return f"rwkvx-{self.model.config.tokenizer}-{self._chat.name}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses; raises InputError where there is none."""
        return self._chat.select(chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """One prompt from the turns of a conversation."""
        return self._chat.apply(chat_history, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; none are added, and special tokens are read from templates only."""
        return self._chat.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each continuation after its context."""
        pairs = [
            encode_pair(self.tok_encode, self.eot_token_id, *request.args[:2])
            for request in requests
        ]
        return [(_number(s), s.greedy) for s in self._score(pairs, _names(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        start = (self.eot_token_id,)
        pairs = [Pair(tuple(context) or start, tuple(ids)) for _, context, ids in requests]
        return [(_number(s), s.greedy) for s in self._score(pairs, ["requests"] * len(pairs))]

    def _score(self, pairs: Sequence[Pair], names: Sequence[str]) -> list[Score]:
        """Scores after the length check; of an empty continuation, 0."""
        self.counts["merged"] += sum(pair.merged for pair in pairs)
        self.counts["empty"] += sum(not pair.continuation for pair in pairs)
        wanted = [Request(pair.context, pair.continuation) for pair in pairs if pair.continuation]
        found = iter(self._scorer.score(self._fit(wanted)))
        scores = [next(found) if pair.continuation else Score(0.0, True) for pair in pairs]
        self._count(names, scores)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text after one end-of-document token."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            found = self._windows(self.tok_encode(request.args[0]))
            windows += found
            owners += [number] * len(found)
        names = _names(requests)
        totals = [0.0] * len(requests)
        scores = self._score(windows, [names[owner] for owner in owners])
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += _number(score)
        return totals

    def _windows(self, tokens: list[int]) -> list[Pair]:
        """Contexts and continuations that together predict every token of a text once."""
        whole = from_start(tokens, self.eot_token_id)
        if not whole.continuation or self.max_length is None:
            return [whole]
        body = list(whole.continuation)
        pairs = get_rolling_token_windows(body, self.eot_token_id, self.max_length, 1)
        found = [make_disjoint_window(pair) for pair in pairs]
        return [Pair(tuple(context), tuple(continuation)) for context, continuation in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to a stop string: greedy, or drawn where a task asks."""
        names = _names(requests)
        prompts: list[Prompt] = []
        seen: Counter[Prompt] = Counter()
        for name, request in zip(names, requests, strict=True):
            context, given = request.args[:2]
            options = read_options(given)
            self.decoding.setdefault(name, set()).add(options.words())
            ids = tuple(self.tok_encode(context)) or (self.eot_token_id,)
            prompt = Prompt(ids, options)
            draw = seen[prompt] if options.temperature else 0
            seen[prompt] += 1
            prompts.append(Prompt(ids, options, draw))
        # A prompt must leave room for its answer.
        room = [Request(p.context, (0,) * (p.options.limit + 1)) for p in prompts]
        fitted = [request.context for request in self._fit(room)]
        prompts = [Prompt(c, p.options, p.draw) for c, p in zip(fitted, prompts, strict=True)]
        self._scorer.progress = self._progress("generation")
        # lm-eval sets torch's seed, by --seed.
        texts = Generator(self._scorer, torch.initial_seed()).generate(prompts)
        self._scorer.progress = self._progress("log-likelihoods")
        self._count(names, texts)
        return [text.text for text in texts]

    def _fit(self, requests: Sequence[Request]) -> list[Request]:
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
        self.counts["truncated"] += over
        logger.warning("%d requests were truncated to %d tokens", over, limit)
        return [self._shorten(request, limit) for request in requests]

    def _shorten(self, request: Request, limit: int) -> Request:
        room = limit - len(request.continuation) + 1
        if room < 1:
            raise InputError(
                f"a continuation of {len(request.continuation)} tokens does not fit into {limit}"
            )
        assert self.truncate is not None
        context: Ids = truncate(request.context, room, self.truncate)
        return Request(context, request.continuation)

    def _count(self, names: Sequence[str], answers: Sequence[Score | Text]) -> None:
        """Counts requests and failures by task; raises InputError for failures when strict."""
        failed: Counter[str] = Counter()
        for name, answer in zip(names, answers, strict=True):
            self.asked[name] = self.asked.get(name, 0) + 1
            if answer.status != "ok":
                failed[answer.status] += 1
                found = self.failures.setdefault(name, {"oom": 0, "invalid": 0})
                found[answer.status] += 1
        if failed and self.strict:
            raise InputError(
                f"{failed.total()} of {len(answers)} requests have no answer ({failed['invalid']} "
                f"with not-a-number logits, {failed['oom']} out of memory): no score would be right"
            )

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
    """Rows read together; None, "auto" and "auto:N" mean the default of the device."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return int(max_batch_size or DEFAULT_BATCH.get(device, 64))
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise InputError(f"batch size {batch_size!r} is neither a number from 1 on nor auto")
    return size
