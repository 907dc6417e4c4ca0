"""int8 weights: how they round, what they do to the logits, what cannot be done with them."""

from pathlib import Path

import pytest
import torch
from small import error, random_ids, random_model, variant

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.folder import save_folder
from rwkvx.layers import Linear
from rwkvx.quantize import quantize


def test_every_row_keeps_its_scale() -> None:
    model = random_model(variant("plain")).float()
    with torch.no_grad():
        model.head.weight[3] *= 1000
        model.head.weight[5] = 0
    before = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, Linear)}
    quantize(model)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            assert module.weight.dtype == torch.int8
            assert module.scale is not None
            restored = module.weight.float() * module.scale[:, None]
            step = before[name].abs().amax(dim=1, keepdim=True) / 127
            assert ((restored - before[name]).abs() <= 0.501 * step).all(), name


def test_logits_stay_close() -> None:
    ids = random_ids(60)
    exact, _ = random_model(variant("plain"))(ids)
    model = quantize(random_model(variant("plain")).float())
    logits, _ = model(ids)
    assert 1e-4 < error(logits, exact) < 0.03
    assert torch.equal(quantize(model)(ids)[0], logits)  # twice is once


def test_loading_and_not_saving(tmp_path: Path) -> None:
    model = rwkvx.load("passkey-tiny", dtype="int8")
    assert model.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.int8
    with pytest.raises(InputError, match=r"blocks.0.att.receptance.weight is int8: save the model"):
        save_folder(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
