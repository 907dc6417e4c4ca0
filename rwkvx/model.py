"""The hybrid language model: embedding, residual blocks of several kinds, head.

Axes: B batch, T time, C width, V vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkvx.config import TOKENIZER_FILE, ModelConfig
from rwkvx.errors import InputError
from rwkvx.kinds import Mixer, kind_of
from rwkvx.layers import ChannelMix, Linear, normed
from rwkvx.ranges import check, range_of
from rwkvx.sequence import SequenceParallel
from rwkvx.state import ModelState
from rwkvx_kernels.dispatch import check_cu_seqlens, send_numbers

# Without gradients, long inputs are read in segments of at most so many tokens (over the batch):
# memory stays flat, and products stay large enough to be efficient. A GPU wants more at once, as
# every segment costs the same number of launches.
SEGMENT_TOKENS = {"cpu": 4096, "cuda": 32768}
SEGMENT_MULTIPLE = 64
LOGITS = ("all", "last", "none", "hidden")
IMPLS = ("auto", "reference", "torch", "compiled", "triton")


class Block(nn.Module):
    """x += mixer(ln1(x)); x += channel_mix(ln2(x)); the mixer is the kind's."""

    def __init__(self, config: ModelConfig, position: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.att: Mixer = kind_of(config.pattern[position])(config, position)
        self.ffn = ChannelMix(config.width, config.ffn_mult * config.width)

    def forward(
        self,
        x: Tensor,
        state: Any,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None,
        keep_cache: bool,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """x [B, T, C] -> x [B, T, C], the new state, v_first [B, T, C] (see `Mixer.forward`)."""
        read, *norm = normed(self.ln1, x, self.att)
        y, state, v_first = self.att(read, state, v_first, cu_seqlens, keep_cache, *norm)
        x = x + y
        read, *norm = normed(self.ln2, x, self.ffn)
        y, ffn_shift = self.ffn(read, state.ffn_shift, cu_seqlens, *norm)
        # torch 2.11 compiles a call of the class, and no `_replace`.
        return x + y, self.att.State(*state[:-1], ffn_shift), v_first


class Blocks(nn.ModuleList):
    """The blocks from the input to the output."""

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())


class Model(nn.Module):
    """Residual blocks between an embedding and a head, of the kinds that the config names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding would draw numbers first, which on the meta device imports torch's compiler.
        weight = torch.empty(config.vocab_size, config.width)
        self.emb = nn.Embedding.from_pretrained(weight, freeze=False)
        self.ln0 = nn.LayerNorm(config.width)
        self.blocks = Blocks(Block(config, i) for i in range(len(config.pattern)))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = Linear(config.width, config.vocab_size)
        self.gradient_checkpointing = False
        # In training, blocks with a recurrent state may read each sequence in so many pieces, every
        # piece from a state of its own (their states then have B x pieces rows); others read it
        # whole.
        self.recurrent_pieces = 1
        self._tokenizer: Any = None
        self._impl = "auto"
        self._sequence: SequenceParallel | None = None

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        logits: str = "all",
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor | None, ModelState]:
        """Read tokens.

        Args:
            ids: [B, T] int64 (or int32), T >= 1; or embeddings [B, T, C] in their place.
            state: what was read before, of the same batch; None at the start. It stays valid and
                may be continued any number of times.
            logits: "all" -> [B, T, V], "last" -> [B, 1, V], "none" -> None; "hidden" -> [B, T, C],
                of which the head makes logits.
            cu_seqlens: [sequences + 1] offsets of sequences packed along T; batch size 1, and the
                state has one row per sequence. A sequence may be empty: its state stays. Best given
                on the CPU: from a GPU they are read, which waits for it.
            keep_cache: False leaves the attention caches of the returned state empty.

        Returns:
            logits (dtype of the weights) and the state after the last token.

        Raises:
            InputError: ids of the wrong shape, dtype or range, a state of another batch size or
                model, offsets that do not describe T packed tokens.
        """
        if logits not in LOGITS:
            raise InputError(f"logits must be one of {LOGITS}, got {logits!r}")
        self.check_ids(ids)
        if self.sequence is not None and (keep_cache or cu_seqlens is not None):
            raise InputError("parts of a sequence are read without cu_seqlens and keep_cache")
        rows = ids.shape[0]
        if cu_seqlens is not None:
            rows = self._check_offsets(ids, cu_seqlens)
            cu_seqlens = send_numbers(cu_seqlens.long(), ids.device)
        whole = torch.is_grad_enabled() or cu_seqlens is not None or not keep_cache
        if state is None:
            state = self.fresh_state(rows, 0 if whole else ids.shape[1])
        else:
            self.check_state(state, rows)
        outputs = []
        for segment in [ids] if whole else ids.split(self.segment_lengths(*ids.shape[:2]), 1):
            x, state = self._read(segment, state, cu_seqlens, keep_cache)
            if logits in ("all", "hidden"):
                x = self.ln_out(x)
                outputs.append(self.head(x) if logits == "all" else x)
        if logits == "last":
            outputs = [self.head(self.ln_out(x[:, -1:]))]
        if not outputs:
            return None, state
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state

    def _read(
        self, ids: Tensor, state: ModelState, cu_seqlens: Tensor | None, keep_cache: bool
    ) -> tuple[Tensor, ModelState]:
        """One segment through all blocks: hidden [B, T, C] and the new state."""
        embedded = ids if ids.is_floating_point() else self.emb(ids)
        x, v_first, states = self.ln0(embedded), None, []
        for block, old in zip(self.blocks, state.blocks, strict=True):
            pieces = self.recurrent_pieces if block.att.recurrent else 1
            folded = x.unflatten(1, (pieces, -1)).flatten(0, 1)
            arguments = (folded, old, v_first, cu_seqlens, keep_cache)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                y, new, v_first = checkpoint(block, *arguments, use_reentrant=False)
            else:
                y, new, v_first = block(*arguments)
            x = y.view_as(x)
            states.append(new)
        return x, ModelState(tuple(states), state.length + ids.shape[1])

    def segment_lengths(self, batch: int, tokens: int) -> list[int]:
        """How T tokens of each sequence are cut where no gradient is needed: nearly equal parts."""
        most = SEGMENT_TOKENS.get(self.device.type, SEGMENT_TOKENS["cpu"])
        longest = max(SEGMENT_MULTIPLE, most // batch)
        count = max(1, -(-tokens // longest))
        step = -(-tokens // (count * SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE
        return [min(step, tokens - start) for start in range(0, tokens, max(1, step))] or [0]

    def fresh_state(self, batch: int, capacity: int = 0) -> ModelState:
        """The state before the first token.

        Args:
            batch: sequences B, at least 1.
            capacity: tokens that caches of keys and values have room for at once; they grow beyond.

        Returns:
            A state of B rows on the model's device: zeros [B, C] in the dtype of the weights for
            token shifts, zeros [B, H, N, N] in float32 (float64 beside float64 weights) for WKV7,
            and empty caches. Memory for `capacity` tokens is taken here.
        """
        weight = self.emb.weight
        blocks = (b.att.fresh_state(self._rows(b, batch), weight, capacity) for b in self.blocks)
        return ModelState(tuple(blocks), 0)

    def check_state(self, state: ModelState, batch: int) -> None:
        """Refuse a state that is not one of this model for `batch` sequences.

        Raises:
            InputError: it is of another model or of another number of sequences.
        """
        if not isinstance(state, ModelState):
            raise InputError(f"state must be a ModelState, got {type(state).__name__}")
        if len(state.blocks) != len(self.blocks):
            raise InputError(
                f"the state is of {len(state.blocks)} blocks, the model has {len(self.blocks)}"
            )
        for block, own in zip(self.blocks, state.blocks, strict=True):
            block.att.check_state(own, self._rows(block, batch), self.emb.weight)

    def _rows(self, block: Block, batch: int) -> int:
        return batch * (self.recurrent_pieces if block.att.recurrent else 1)

    def set_topk(self, topk: int) -> None:
        """Let every sparse block read other many chunks than the config says, from now on.

        Args:
            topk: chunks a query reads, its own included, from 1 to 1048576. The config, and so
                what is saved, stays.

        Raises:
            InputError: a number outside of that.
        """
        check("topk", topk, range_of(ModelConfig, "topk"))
        for module in self.modules():
            if hasattr(module, "topk"):
                setattr(module, "topk", topk)  # noqa: B010 (a plain attribute)

    def check_ids(self, ids: Tensor) -> None:
        """Raise InputError for what cannot be read: shape, dtype, and on the CPU the range."""
        if not isinstance(ids, Tensor):
            raise InputError(f"ids must be a tensor [B, T] of int64, got {type(ids).__name__}")
        if ids.is_floating_point() and ids.dim() == 3 and ids.shape[2] == self.config.width:
            return
        if ids.dim() != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"ids must be int64 [B, T] with B, T >= 1, got {list(ids.shape)} {ids.dtype}"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                last = self.config.vocab_size - 1
                raise InputError(f"token id {bad} is outside the vocabulary 0..{last}")

    @staticmethod
    def _check_offsets(ids: Tensor, cu_seqlens: Tensor) -> int:
        """The number of packed sequences."""
        if not torch.compiler.is_compiling():  # which cannot look at values
            try:
                check_cu_seqlens(cu_seqlens, *ids.shape[:2])
            except ValueError as error:
                raise InputError(str(error)) from error
        return len(cu_seqlens) - 1

    @property
    def impl(self) -> str:
        """Which implementations the model runs: one of `IMPLS` (see `rwkvx.explain`)."""
        return self._impl

    @impl.setter
    def impl(self, name: str) -> None:
        if name not in IMPLS:
            raise InputError(f"impl must be one of {', '.join(IMPLS)}, got {name!r}")
        self._impl = name
        for module in self.modules():
            if "impl" in vars(module):
                setattr(module, "impl", name)  # noqa: B010

    @property
    def sequence(self) -> SequenceParallel | None:
        """The processes that share each sequence: `forward` then reads this one's part, of which
        the returned state is that at its end. For training: nothing is cached or packed."""
        return self._sequence

    @sequence.setter
    def sequence(self, sequence: SequenceParallel | None) -> None:
        self._sequence = sequence
        for module in self.modules():
            if "sequence" in vars(module):
                setattr(module, "sequence", sequence)  # noqa: B010

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.emb.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.emb.weight.dtype

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer that the config names, with what its folder adds to it."""
        if self._tokenizer is None:
            from rwkvx.tokenizers import get_tokenizer

            self._tokenizer = get_tokenizer(self.config.tokenizer)
        return self._tokenizer

    @property
    def tokenizer_to_save(self) -> Any:
        """The tokenizer that a folder of this model must hold; None where its name says it all."""
        found = self._tokenizer
        named = self.config.tokenizer != TOKENIZER_FILE and found is not None
        return None if named and not found.is_customised else found

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Take a tokenizer that was read from a file or folder."""
        self._tokenizer = tokenizer

    def fingerprint(self) -> str:
        """SHA-256 over config and weights, hexadecimal: equal for equal functions only."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, x in sorted(self.state_dict().items()):
            digest.update(name.encode())
            data = x.detach().cpu().contiguous().view(-1)
            digest.update(memoryview(data.view(torch.uint8).numpy()))
        return digest.hexdigest()
