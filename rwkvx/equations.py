"""The whole model in one sitting: token by token in numpy, from the published equations.

RWKV-7: arXiv 2503.14456; top-k attention: arXiv 2502.13189 (MoBA); windows: arXiv 2004.05150.
Shares nothing with the rest of the package but the names of the parameters; `rwkvx check`
compares all else with it. One sequence at a time; v is a vector, S a matrix [value, key].
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Read = Callable[[Any, Array, list[Array]], list[int]]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


class Equations:
    """`logits(ids)` of a whole sequence; `p` maps parameter names to arrays."""

    def __init__(self, config: Any, parameters: dict[str, Array]) -> None:
        self.config, self.p = config, parameters

    def logits(self, ids: list[int]) -> Array:
        p = self.p
        hidden = [layer_norm(p["emb.weight"][i], p["ln0.weight"], p["ln0.bias"]) for i in ids]
        v_first: list[Array] | None = None
        for number, kind in enumerate(self.config.pattern):
            name = f"blocks.{number}"
            normed = [self.norm(x, f"{name}.ln1") for x in hidden]
            if kind == "rwkv7":
                mixed, values = self.time_mix(normed, f"{name}.att", v_first)
                v_first = v_first or values
            else:
                mixed = self.attention(normed, f"{name}.att", READ[kind])
            hidden = [x + y for x, y in zip(hidden, mixed, strict=True)]
            normed = [self.norm(x, f"{name}.ln2") for x in hidden]
            mixed = self.channel_mix(normed, f"{name}.ffn")
            hidden = [x + y for x, y in zip(hidden, mixed, strict=True)]
        return np.stack([p["head.weight"] @ self.norm(x, "ln_out") for x in hidden])

    def norm(self, x: Array, name: str) -> Array:
        return layer_norm(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def time_mix(
        self, xs: list[Array], name: str, v_first: list[Array] | None
    ) -> tuple[list[Array], list[Array]]:
        p = {k.removeprefix(f"{name}."): x for k, x in self.p.items() if k.startswith(f"{name}.")}
        size, heads = self.config.head_size, self.config.width // self.config.head_size
        eps = self.config.group_norm_eps
        states = np.zeros((heads, size, size))
        last, outputs, values = np.zeros_like(xs[0]), [], []
        for t, x in enumerate(xs):
            mix = {m: x + (last - x) * p[f"x_{m}"] for m in "rwkvag"}
            last = x
            r, k, v = (p[f"{n}.weight"] @ mix[n[0]] for n in ("receptance", "key", "value"))
            decay = np.exp(-np.exp(-0.5) * sigmoid(p["w0"] + np.tanh(mix["w"] @ p["w1"]) @ p["w2"]))
            a = sigmoid(p["a0"] + mix["a"] @ p["a1"] @ p["a2"])
            g = sigmoid(mix["g"] @ p["g1"]) @ p["g2"]
            if v_first is not None:
                v = v + (v_first[t] - v) * sigmoid(p["v0"] + mix["v"] @ p["v1"] @ p["v2"])
            values.append(v)
            kk = k * p["k_k"]
            k = k * (1 + (a - 1) * p["k_a"])
            y = np.zeros_like(x)
            for h in range(heads):
                s = slice(h * size, (h + 1) * size)
                unit = kk[s] / np.sqrt((kk[s] ** 2).sum())
                state = states[h]
                state = (
                    state @ np.diag(decay[s])
                    + np.outer(state @ -unit, unit * a[s])
                    + np.outer(v[s], k[s])
                )
                states[h] = state
                out = state @ r[s]
                out = layer_norm(out, p["ln_x.weight"][s], p["ln_x.bias"][s], eps)
                y[s] = out + (r[s] * k[s] * p["r_k"][h]).sum() * v[s]
            outputs.append(p["output.weight"] @ (y * g))
        return outputs, values

    def attention(self, xs: list[Array], name: str, read: Read) -> list[Array]:
        c, p = self.config, self.p
        size, heads = c.head_size, c.width // c.head_size
        q, k, v = (
            [p[f"{name}.{n}.weight"] @ x for x in xs] for n in ("receptance", "key", "value")
        )
        if f"{name}.key_conv" in p:
            taps, before = p[f"{name}.key_conv"], [np.zeros_like(k[0])] * (c.key_conv - 1)
            padded = before + k
            k = [sum(taps[i] * padded[t + i] for i in range(len(taps))) for t in range(len(xs))]
        group = heads // (c.sparse_kv_heads or heads)
        outputs = []
        for t in range(len(xs)):
            row = []
            for h in range(heads):
                s = slice(h * size, (h + 1) * size)
                g = slice(h // group * size, (h // group + 1) * size)
                keys = [x[g] for x in k[: t + 1]]
                seen = read(c, q[t][s], keys)
                weights = np.exp([q[t][s] @ keys[i] / np.sqrt(size) for i in seen])
                row.append(weights @ np.stack([v[i][g] for i in seen]) / weights.sum())
            outputs.append(p[f"{name}.output.weight"] @ np.concatenate(row))
        return outputs

    def channel_mix(self, xs: list[Array], name: str) -> list[Array]:
        p, last, outputs = self.p, np.zeros_like(xs[0]), []
        for x in xs:
            key = p[f"{name}.key.weight"] @ (x + (last - x) * p[f"{name}.x_k"])
            outputs.append(p[f"{name}.value.weight"] @ np.maximum(key, 0) ** 2)
            last = x
        return outputs


def chunks_read(config: Any, query: Array, keys: list[Array]) -> list[int]:
    """The own chunk up to the query, the last of the keys, and the best completed chunks."""
    size, t = config.chunk_size, len(keys) - 1
    chunks = [range(j * size, (j + 1) * size) for j in range(t // size)]
    score = [query @ np.mean([keys[i] for i in chunk], axis=0) for chunk in chunks]
    best = sorted(range(len(chunks)), key=lambda j: -score[j])[: config.topk - 1]
    return [i for j in best for i in chunks[j]] + list(range(t // size * size, t + 1))


def window_read(config: Any, query: Array, keys: list[Array]) -> list[int]:
    """The last keys."""
    return list(range(max(0, len(keys) - config.option("window")), len(keys)))


# Which keys a query attends to, by kind of block.
READ: dict[str, Read] = {"sparse": chunks_read, "window": window_read}
