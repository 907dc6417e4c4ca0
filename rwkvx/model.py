"""The hybrid language model: embedding, residual blocks of two kinds, head.

Axes: B batch, T time, C width, V vocabulary.
"""

import hashlib
import json
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkvx.channel_mix import ChannelMix
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx.linear import Linear
from rwkvx.one_token import OneTokenReader
from rwkvx.sparse_attention import SparseAttention
from rwkvx.state import BlockState, CachedRows, ModelState, Rwkv7State, SparseState
from rwkvx.time_mix import TimeMix
from rwkvx_kernels.chunk_attention import KeyValueCache
from rwkvx_kernels.dispatch import check_cu_seqlens

# Without gradients, long inputs are read in segments of at most so many tokens (over the batch):
# memory stays flat, and products stay large enough to be efficient.
SEGMENT_TOKENS = 4096
SEGMENT_MULTIPLE = 64
LOGITS = ("all", "last", "none", "hidden")


class Block(nn.Module):
    """x += mixer(ln1(x)); x += channel_mix(ln2(x)), with one of two mixers."""

    def __init__(self, config: ModelConfig, kind: str, first: bool) -> None:
        super().__init__()
        self.kind, self.config = kind, config
        self.ln1, self.ln2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.att: nn.Module = TimeMix(config, first) if kind == "rwkv7" else SparseAttention(config)
        self.ffn = ChannelMix(config)

    def fresh_state(self, batch: int, like: Tensor, capacity: int = 0) -> BlockState:
        """The state before the first token, with room for `capacity` tokens; as `like`."""
        zeros = like.new_zeros(batch, self.config.width)
        if self.kind == "rwkv7":
            heads, size = self.config.heads, self.config.head_size
            wide = torch.promote_types(like.dtype, torch.float32)
            wkv = like.new_zeros(batch, heads, size, size, dtype=wide)
            return Rwkv7State(zeros, wkv, zeros)
        kv_width = self.config.kv_heads * self.config.head_size
        taps = self.config.key_conv - 1
        conv = like.new_zeros(batch, taps, kv_width) if self.config.key_conv else None
        if not capacity:
            return SparseState((), conv, zeros)
        # At once: growing step by step would hold old and new together.
        heads, size = self.config.kv_heads, self.config.head_size
        cache = KeyValueCache(batch, heads, size, self.config.chunk_size, like, capacity)
        return SparseState((CachedRows(cache, 0),), conv, zeros)

    def forward(
        self,
        x: Tensor,
        state: BlockState,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None,
        keep_cache: bool,
    ) -> tuple[Tensor, BlockState, Tensor | None]:
        """x [B, T, C] -> x [B, T, C], the new state, v_first [B, T, C]."""
        if isinstance(state, Rwkv7State):
            y, shift, wkv, v_first = self.att(
                self.ln1(x), state.shift, state.wkv, v_first, cu_seqlens
            )
            x = x + y
            y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, cu_seqlens)
            return x + y, Rwkv7State(shift, wkv, ffn_shift), v_first
        y, cached, conv = self.att(self.ln1(x), state.cached, state.conv, cu_seqlens, keep_cache)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, cu_seqlens)
        return x + y, SparseState(cached, conv, ffn_shift), v_first


class Model(nn.Module):
    """RWKV-7 blocks interleaved with top-k sparse attention blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding would draw numbers first, which on the meta device imports torch's compiler.
        weight = torch.empty(config.vocab_size, config.width)
        self.emb = nn.Embedding.from_pretrained(weight, freeze=False)
        self.ln0 = nn.LayerNorm(config.width)
        first = config.pattern.index("rwkv7") if "rwkv7" in config.pattern else -1
        self.blocks = nn.ModuleList(
            Block(config, kind, i == first) for i, kind in enumerate(config.pattern)
        )
        self.ln_out = nn.LayerNorm(config.width)
        self.head = Linear(config.width, config.vocab_size)
        self.gradient_checkpointing = False
        # In training, RWKV-7 blocks may read each sequence in so many pieces, every piece from a
        # state of its own (their states then have B x pieces rows); sparse blocks read it whole.
        self.recurrent_pieces = 1
        self._tokenizer: Any = None
        self._one_token = OneTokenReader()

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
                state has one row per sequence. A sequence may be empty: its state stays.
            keep_cache: False leaves the attention caches of the returned state empty.

        Returns:
            logits (dtype of the weights) and the state after the last token.

        Raises:
            InputError: ids of the wrong shape, dtype or range, a state of another batch size or
                model, offsets that do not describe T packed tokens.
        """
        self._check(ids, logits)
        if state is not None or cu_seqlens is not None:
            self._check_rows(ids, state, cu_seqlens)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(ids.device, torch.int64)
        whole = torch.is_grad_enabled() or cu_seqlens is not None or not keep_cache
        if state is None:
            sequences = ids.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            state = self.fresh_state(sequences, 0 if whole else ids.shape[1])
        outputs = []
        for part in [ids] if whole else ids.split(self.segment_lengths(*ids.shape[:2]), 1):
            x, state = self._read(part, state, cu_seqlens, keep_cache)
            if logits in ("all", "hidden"):
                outputs.append(self.ln_out(x))
                if logits == "all":
                    outputs[-1] = self.head(outputs[-1])
        if logits == "last":
            outputs = [self.head(self.ln_out(x[:, -1:]))]
        if not outputs:
            return None, state
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state

    def set_topk(self, topk: int) -> None:
        """Let every sparse block read `topk` chunks, in place of the config's number."""
        for block in self.blocks:
            if isinstance(block.att, SparseAttention):
                block.att.topk = topk

    def segment_lengths(self, batch: int, tokens: int) -> list[int]:
        """How T tokens of each sequence are cut where no gradient is needed: nearly equal parts."""
        longest = max(SEGMENT_MULTIPLE, SEGMENT_TOKENS // batch)
        parts = -(-tokens // longest)
        step = -(-tokens // (parts * SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE
        return [min(step, tokens - start) for start in range(0, tokens, step)]

    def fresh_state(self, batch: int, capacity: int = 0) -> ModelState:
        """Before the first token of `batch` sequences, with room for `capacity` tokens."""
        weight, blocks = self.emb.weight, [cast(Block, block) for block in self.blocks]
        rows = {"rwkv7": batch * self.recurrent_pieces, "sparse": batch}
        return ModelState(tuple(b.fresh_state(rows[b.kind], weight, capacity) for b in blocks), 0)

    def _read(
        self, ids: Tensor, state: ModelState, cu_seqlens: Tensor | None, keep_cache: bool
    ) -> tuple[Tensor, ModelState]:
        """One segment through all blocks: hidden [B, T, C] and the new state."""
        embedded = ids if ids.is_floating_point() else self.emb(ids)
        x, v_first, states = self.ln0(embedded), None, []
        alone = cu_seqlens is None and not torch.compiler.is_compiling()
        if alone and self._one_token.can_read(self, x, state):
            return self._one_token.read(self, x, state, keep_cache)
        for block, old in zip(self.blocks, state.blocks, strict=True):
            pieces = self.recurrent_pieces if isinstance(old, Rwkv7State) else 1
            folded = x.unflatten(1, (pieces, -1)).flatten(0, 1)
            arguments = (folded, old, v_first, cu_seqlens, keep_cache)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                y, new, v_first = checkpoint(block, *arguments, use_reentrant=False)
            else:
                y, new, v_first = block(*arguments)
            x = y.view_as(x)
            states.append(new)
        return x, ModelState(tuple(states), state.length + ids.shape[1])

    def _check(self, ids: Tensor, logits: str) -> None:
        if logits not in LOGITS:
            raise InputError(f"logits must be one of {LOGITS}, got {logits!r}")
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

    def _check_rows(self, ids: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> None:
        """Check that the state has one row for each sequence, and that `cu_seqlens` fits."""
        rows = ids.shape[0]
        if cu_seqlens is not None:
            if not torch.compiler.is_compiling():  # which cannot look at values
                try:
                    check_cu_seqlens(cu_seqlens, *ids.shape[:2])
                except ValueError as error:
                    raise InputError(str(error)) from None
            rows = len(cu_seqlens) - 1
        if state is None:
            return
        kinds = tuple("rwkv7" if isinstance(b, Rwkv7State) else "sparse" for b in state.blocks)
        if kinds != self.config.pattern:
            raise InputError(
                f"the state is of blocks {kinds}, the model's are {self.config.pattern}"
            )
        shape = tuple(state.blocks[0].ffn_shift.shape)
        if kinds[0] == "rwkv7":
            rows *= self.recurrent_pieces
        if shape != (rows, self.config.width):
            raise InputError(
                f"the state is of {shape[0]} sequences of width {shape[1]}, the model reads "
                f"{rows} of width {self.config.width}"
            )

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
        """The Hugging Face tokenizer that the config names."""
        if self._tokenizer is None:
            from rwkvx.tokenizers import get_tokenizer

            self._tokenizer = get_tokenizer(self.config.tokenizer)
        return self._tokenizer

    def fingerprint(self) -> str:
        """SHA-256 over config and weights, hexadecimal: equal for equal functions only."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, x in sorted(self.state_dict().items()):
            digest.update(name.encode())
            data = x.detach().cpu().contiguous().view(-1)
            digest.update(memoryview(data.view(torch.uint8).numpy()))
        return digest.hexdigest()
