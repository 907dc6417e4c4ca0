"""llama.cpp as a peer for RWKV-7: the weights as a GGUF file, and its Python package on that.

Layout: llama.cpp, conversion/rwkv.py (`Rwkv7Model`); names and keys by the `gguf` package.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rwkvx

# Ours -> llama.cpp's, of a block; all are called `.weight` or `.bias` at the end.
BLOCK = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.output": "time_mix_output",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
    **{f"att.{n}{i}": f"time_mix_{n}{i}" for n in "wavg" for i in "12"},
    **{f"att.{n}": f"time_mix_{n}" for n in ("w0", "a0", "v0", "k_k", "k_a", "r_k")},
}
ENDS = {
    "emb": "token_embd",
    "ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "head": "output",
}
LERPS = "rwkvag"  # the order of their fused token-shift mixes
GROUP_NORM_EPS = 64e-5  # llama.cpp knows this one only
# Never stored in fewer bits, as by llama.cpp's own converter.
ALWAYS_FLOAT32 = ("lerp_fused", "time_mix_w1", "time_mix_w2")
TOKENS = 1 << 17  # that its context has room for; a recurrent state takes no more memory for it


def lacks(config: rwkvx.ModelConfig) -> str | None:
    """What of a model llama.cpp's RWKV-7 has no place for; None: nothing."""
    if set(config.pattern) != {"rwkv7"}:
        return "other blocks than RWKV-7"
    if config.group_norm_eps != GROUP_NORM_EPS:
        return f"a group norm eps of {config.group_norm_eps:g}"
    return None


def write_gguf(model: rwkvx.Model, path: Path, dtype: str) -> None:
    """The weights of a model of RWKV-7 blocks, without a tokenizer.

    Args:
        dtype: "float32" or "bfloat16", of the matrices.
    """
    import gguf

    config, ranks = model.config, model.config.ranks
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.width)
    writer.add_block_count(len(config.pattern))
    writer.add_feed_forward_length(len(model.get_parameter("blocks.0.ffn.key.weight")))
    writer.add_head_count(0)
    writer.add_layer_norm_eps(model.ln_out.eps)
    writer.add_wkv_head_size(config.head_size)
    writer.add_decay_lora_rank(ranks["w"])
    writer.add_iclr_lora_rank(ranks["a"])
    writer.add_value_residual_mix_lora_rank(ranks["v"])
    writer.add_gate_lora_rank(ranks["g"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    stored = gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16
    for name, x in _tensors(model).items():
        full = x.ndim < 2 or any(part in name for part in ALWAYS_FLOAT32)
        kind = gguf.GGMLQuantizationType.F32 if full else stored
        writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: rwkvx.Model) -> dict[str, np.ndarray[Any, Any]]:
    """By llama.cpp's names, float32; matrices [out, in]."""
    own = {name: x.detach().float() for name, x in model.state_dict().items()}
    found = {}
    for name, x in own.items():
        stem, _, last = name.rpartition(".")
        if stem in ENDS:
            found[f"{ENDS[stem]}.{last}"] = x
            continue
        _, number, part = name.split(".", 2)
        stem, _, last = part.rpartition(".")
        if part in BLOCK:  # a parameter; a low-rank factor is [in, out]
            x = x.t() if part[-1] in "12" else x.flatten()
            found[f"blk.{number}.{BLOCK[part]}.weight"] = x
        elif stem in BLOCK:
            found[f"blk.{number}.{BLOCK[stem]}.{last}"] = x
    for block in range(len(model.blocks)):
        mixes = torch.stack([own[f"blocks.{block}.att.x_{n}"] for n in LERPS])
        found[f"blk.{block}.time_mix_lerp_fused.weight"] = mixes.view(len(LERPS), 1, 1, -1)
    for part in "012":  # the first block has no value residual, but must have its tensors
        found[f"blk.0.time_mix_v{part}.weight"] = found[f"blk.0.time_mix_a{part}.weight"]
    return {name: x.contiguous().numpy() for name, x in found.items()}


class LlamaPeer:
    """See `peers.Peer`; the state is its own."""

    tolerance, rounds = 1e-4, False

    def __init__(self, model: rwkvx.Model, dtype: str) -> None:
        from llama_cpp import Llama

        self.dtype = dtype
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory(prefix="rwkvx-bench-") as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, dtype)
            self._model = Llama(
                str(path),
                n_ctx=TOKENS,
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=False,
                verbose=False,
            )

    def prefill(self, ids: list[int]) -> tuple[Tensor, Any]:
        """Logits [V] of the last token; there is no state to be carried."""
        self._model.reset()
        return self.decode(ids, None)

    def decode(self, token: int | list[int], state: Any) -> tuple[Tensor, Any]:
        """Logits [V] after one more token, or some."""
        import llama_cpp

        self._model.eval([token] if isinstance(token, int) else token)
        logits = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        shape = (self._model.n_vocab(),)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape).copy()), None
