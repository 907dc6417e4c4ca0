"""Any Hugging Face causal language model, read through its own cache.

Axes: B batch rows, T tokens, V vocabulary, C width.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvx.errors import InputError
from rwkvx_evals.interface import Tokenizer
from rwkvx_evals.models.frames import frame_of
from rwkvx_evals.models.reader import ROWS, Frame, State, Step, slices_by_reading

# How the argument, and the field of the output, is called that carries what was read. The first
# is transformers' own from 5.24 on, the others older ones'.
CACHES = ("cache", "past_key_values", "cache_params")
LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
SEGMENT = 4096
LOGITS_BYTES = 256_000_000
UNLIMITED = 1 << 40
PROBE_TOKENS = 64
# Rounding of a whole network, in parts of its largest logit; not going on from what was read
# shows in the first of them.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


class HuggingFaceModel:
    """A loaded causal language model as a `Reader`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        weights: str = "",
        chat: bool = False,
        max_length: int | None = None,
    ) -> None:
        """weights: hash of the weights. max_length: in place of the config's.

        Raises InputError: no cache, no chat template, a cache that loses what was read.
        """
        self.model, self.name, self._weights = model.eval(), name, weights
        self.tokenizer: Tokenizer = tokenizer
        self.frame: Frame = frame_of(tokenizer, chat)
        parameters = inspect.signature(model.forward).parameters
        self._cache = next((n for n in CACHES if n in parameters), "")
        if not self._cache:
            raise InputError(f"model {name} takes none of {', '.join(CACHES)}: it cannot go on")
        self._keeps = "logits_to_keep" in parameters
        config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        limits = (getattr(config, n, None) for n in LIMITS)
        self.max_length: int | None = max_length or next((int(n) for n in limits if n), None)
        self.segment = SEGMENT
        if not self._keeps:
            self.segment = max(1, min(SEGMENT, LOGITS_BYTES // (4 * self.vocab_size)))
        self.rows = ROWS
        self._head_is_all = False
        self.joins = False
        self.continues = self._probe()

    @property
    def device(self) -> torch.device:
        """Where token ids go; the other layers may lie elsewhere."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    @property
    def end_ids(self) -> frozenset[int]:
        """Of the generation config, the config and the tokenizer."""
        found: set[int] = set()
        generation = getattr(self.model, "generation_config", None)
        for owner in (generation, self.model.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        return frozenset(found)

    def fingerprint(self) -> str:
        return self._weights

    def decode(self, ids: Sequence[int]) -> str:
        decoder: Any = self.tokenizer
        return str(decoder.decode(list(ids), clean_up_tokenization_spaces=False))

    def start(self, rows: int, room: int) -> State:
        return None

    def read(self, ids_BT: Tensor, state: State, logits: str) -> tuple[Tensor | None, State]:
        if state is None or self.continues or ids_BT.shape[1] == 1:
            return self._forward(ids_BT, state, logits)
        found: list[Tensor] = []
        for ids_B1 in ids_BT.split(1, dim=1):
            out, state = self._forward(ids_B1, state, logits)
            if out is not None:
                found = [*found, out] if logits == "all" else [out]
        return (torch.cat(found, dim=1) if found else None), state

    def _forward(self, ids_BT: Tensor, state: State, logits: str) -> tuple[Tensor | None, State]:
        keep = {"logits_to_keep": 0 if logits == "all" else 1} if self._keeps else {}
        out = self.model(input_ids=ids_BT, use_cache=True, **{self._cache: state}, **keep)
        after = next((x for n in CACHES if (x := getattr(out, n, None)) is not None), None)
        if logits == "none":
            return None, after
        return (out.logits if logits == "all" else out.logits[:, -1:]), after

    def logits_in_slices(self, ids_BT: Tensor, first: int, width: int) -> Iterator[Tensor]:
        if self.continues:
            yield from slices_by_reading(self, ids_BT, first, width)
            return
        # In one call, of which only hidden states are kept if their head makes the logits.
        if not self._head_is_all:
            logits, _ = self._forward(ids_BT, None, "all")
            assert logits is not None
            yield from logits[:, first:].split(width, dim=1)
            return
        hidden_BTC = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        for part in hidden_BTC[:, first:].split(width, dim=1):
            yield head(part)

    @contextmanager
    def branch(self, state: State, rows: int, *, keep: bool = False) -> Iterator[State]:
        """Lends the cache itself where it can be cropped afterwards, else a copy."""
        if rows == 1 and not keep and _can_crop(state):
            length = state.get_seq_length()
            try:
                yield state
            finally:
                # Layer by layer: a call that ran out of memory has filled some of them.
                for layer in state.layers:
                    layer.crop(length - layer.get_seq_length())
            return
        copied = copy.deepcopy(state)
        if rows > 1:
            if not hasattr(copied, "reorder_cache"):
                raise InputError(f"the cache of {self.name} has one row only: use --batch 1")
            copied.reorder_cache(torch.zeros(rows, dtype=torch.int64, device=self.device))
        yield copied

    def join(self, states: Sequence[State]) -> State:
        """One cache of all rows: of each layer, what has a row for each sequence."""
        joined = states[0]
        for number, layer in enumerate(joined.layers):
            layers = [state.layers[number] for state in states]
            for name, value in vars(layer).items():
                if isinstance(value, dict):  # the states of linear attention, by number
                    for key in value:
                        value[key] = _side_by_side([vars(x)[name][key] for x in layers])
                else:
                    setattr(layer, name, _side_by_side([vars(x)[name] for x in layers]))
        return joined

    def steps(self, state: State, tokens: int) -> Step:
        def step(ids_B1: Tensor) -> Tensor:
            nonlocal state
            logits, state = self._forward(ids_B1, state, "last")
            assert logits is not None
            return logits

        return step

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Whether reading in two calls gives what one call gives: some caches start anew."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (1, PROBE_TOKENS), generator=draw).to(self.device)
        whole, after = self._forward(ids, None, "all")
        assert whole is not None
        self.joins = bool(getattr(after, "layers", None))
        compared = torch.isfinite(whole)  # unused tokens may be masked by -inf
        if not compared.any():
            return True  # its answers will be invalid, and say so

        largest = whole.float()[compared].abs().max()

        def same(found: Tensor, start: int) -> bool:
            error = (found.float() - whole[:, start:].float())[compared[:, start:]].abs()
            return bool((error <= TOLERANCE[whole.dtype] * largest).all())

        def agrees(cut: int) -> bool:
            _, state = self._forward(ids[:, :cut], None, "none")
            rest, _ = self._forward(ids[:, cut:], state, "all")
            return rest is not None and same(rest, cut)

        if not agrees(PROBE_TOKENS - 1):
            raise InputError(f"{self.name}: one token after a text gives another answer than both")
        continues = agrees(PROBE_TOKENS // 2)
        if not continues:
            hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]
            self._head_is_all = same(self.model.get_output_embeddings()(hidden), 0)
        return continues


def _side_by_side(values: Sequence[Any]) -> Any:
    """Tensors with rows as one; anything else as it is in the first."""
    first = values[0]
    return torch.cat(list(values)) if isinstance(first, Tensor) and first.dim() > 1 else first


def _can_crop(cache: Any) -> bool:
    """Whether taking tokens off its end leaves the cache as it was before them."""
    croppable = getattr(cache, "is_croppable", False) and hasattr(cache, "layers")
    return bool(croppable and len(cache.layers) > 0 and not any(cache.is_sliding))


def hash_of_folder(folder: Path) -> str:
    """SHA-256 (hexadecimal) over config.json and the files with weights."""
    sha = hashlib.sha256()
    weights = sorted(p for end in ("safetensors", "bin") for p in folder.glob(f"*.{end}"))
    for file in (folder / "config.json", *weights):
        sha.update(f"\n{file.name}\n".encode())
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


def load_hugging_face(
    folder: Path,
    *,
    device: str,
    dtype: str,
    device_map: str | None = None,
    tokenizer: Any = None,
    chat: bool = False,
    trust: bool = False,
    max_length: int | None = None,
) -> HuggingFaceModel:
    """Loads a folder that its config.json describes; nothing is asked of the hub.

    Raises InputError: what transformers cannot load, in its own words.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "int8":
        raise InputError("dtype int8 is for rwkvx's own models; a folder says by itself how its "
                         "weights are quantized")  # fmt: skip
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust}
    try:
        words = tokenizer or AutoTokenizer.from_pretrained(folder, **common)
        words.model_max_length = UNLIMITED  # it would warn of every book
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map=device_map, **common
        )
    except Exception as error:  # what its readers of many formats raise when a file is damaged
        said = " ".join(str(error).split())[:200]
        raise InputError(f"transformers cannot load {folder}: {said}") from error
    if device_map is None:
        model = model.to(device)
    return HuggingFaceModel(
        model, words, folder.name, weights=hash_of_folder(folder), chat=chat, max_length=max_length
    )
