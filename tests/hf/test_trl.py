"""TRL's SFTTrainer on the adapter: a prompt is masked, what is asked for is learned and saved."""

from pathlib import Path

import pytest
import torch
from adapters import adapter

import rwkvx
from rwkvx.hf import ByteTokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")


def test_sft_learns_the_answers_alone(tmp_path: Path) -> None:
    """The loss of the answers falls, and the folder it saves is a model of ours."""
    rows = [{"prompt": f"Say {word}: ", "completion": word} for word in ("yes", "no")] * 4
    torch.manual_seed(0)
    hf = adapter(torch.float32)
    arguments = trl.SFTConfig(
        str(tmp_path / "run"), max_steps=12, per_device_train_batch_size=4, learning_rate=5e-3,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, seed=1,
        save_strategy="no", max_length=64, completion_only_loss=True, warmup_steps=2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        hf,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=ByteTokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = batch["labels"] != -100
    assert 0 < int(learned.sum()) < batch["labels"].numel() / 2
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(str(tmp_path / "model"))
    assert rwkvx.load(tmp_path / "model", verify=True).fingerprint() == hf.model.fingerprint()
