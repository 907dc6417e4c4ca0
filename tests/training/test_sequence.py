"""One sequence over 2 and 4 processes (gloo): outputs and gradients are those of one process."""

import multiprocessing
from pathlib import Path
from typing import Any

import parts_worker
import pytest
import torch
from safetensors.torch import load_file

import rwkvx
from rwkvx_kernels.chunk_select import chunk_means, select_chunks

TOKENS, CHUNK = 64, 4
# Float64 carries 2e-16; sums are of some thousand terms of size one, in another order.
ROUNDING = 1e-10
PATTERNS = [("rwkv7", "rwkv7", "sparse"), ("window", "rwkv7", "sparse")]


def config_of(pattern: tuple[str, ...], **changes: Any) -> rwkvx.ModelConfig:
    fields = {"vocab_size": 50, "width": 16, "head_size": 8, "pattern": list(pattern)}
    fields |= {"chunk_size": CHUNK, "topk": 3, "ffn_mult": 2, "tokenizer": None}
    return rwkvx.ModelConfig.from_dict({**fields, **changes})


def run_together(config: rwkvx.ModelConfig, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of the processes computes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "rwkvx"])
    arguments = (size, config.to_dict(), TOKENS, str(folder))
    workers = [
        context.Process(target=parts_worker.work, args=(rank, *arguments)) for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
    assert [worker.exitcode for worker in workers] == [0] * size
    return [load_file(folder / str(rank)) for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "pattern", "changes"),
    [
        (2, PATTERNS[0], {"key_conv": 3}),
        (4, PATTERNS[1], {"window": 37, "sparse_kv_heads": 1, "selection": "coarse_to_fine"}),
    ],
)
def test_parts_make_the_whole(
    size: int, pattern: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(pattern, **changes)
    parts = run_together(config, size, tmp_path)
    whole = parts_worker.computed(
        parts_worker.model_of(config), *parts_worker.inputs_of(config, 2, TOKENS)
    )
    close = {"rtol": ROUNDING, "atol": ROUNDING}
    torch.testing.assert_close(torch.cat([x["hidden"] for x in parts], 1), whole["hidden"], **close)
    for name in whole:
        if name.startswith("gradient."):
            total = torch.stack([x[name] for x in parts]).sum(0)
            torch.testing.assert_close(total, whole[name], **close, msg=name)
        elif name.startswith("final."):
            torch.testing.assert_close(parts[-1][name], whole[name], **close, msg=name)


def test_the_best_chunks_lie_in_other_parts() -> None:
    """The test above would not see a local choice if the global one were the same."""
    config = config_of(PATTERNS[0])
    model = parts_worker.model_of(config)
    ids, _ = parts_worker.inputs_of(config, 2, TOKENS)
    seen: dict[str, torch.Tensor] = {}
    mixer = model.blocks[2].att
    mixer.receptance.register_forward_hook(lambda _, __, y: seen.update(q=y))  # type: ignore[union-attr]
    mixer.key.register_forward_hook(lambda _, __, y: seen.update(k=y))  # type: ignore[union-attr]
    with torch.no_grad():
        model(ids, parts_worker.state_of(model, 2), keep_cache=False)
    q, k = (x.unflatten(-1, (-1, 8)) for x in (seen["q"], seen["k"]))
    chosen = select_chunks(q, chunk_means(k.transpose(1, 2), CHUNK), CHUNK, 3)
    half = TOKENS // CHUNK // 2
    late = chosen[:, TOKENS // 2 + 3 * CHUNK :]  # queries that have enough chunks of their own
    assert 0.2 < float((late < half).float().mean()) < 0.8


def test_what_cannot_be_read_in_parts(tmp_path: Path) -> None:
    model = parts_worker.model_of(config_of(PATTERNS[0]))
    model.sequence = object()  # type: ignore[assignment]
    with pytest.raises(rwkvx.InputError, match="without cu_seqlens and keep_cache"):
        model(torch.zeros(1, 8, dtype=torch.int64))
