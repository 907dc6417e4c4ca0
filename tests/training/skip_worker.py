"""One of two processes that train with steps that are not finite: says which steps moved anything.

torchrun ... skip_worker.py CONFIG
"""

import sys
from typing import Any

import torch
from torch import Tensor

from rwkvx.training.config import read_config
from rwkvx.training.distributed import joined, whole
from rwkvx.training.trainer import Trainer

INFINITE = (1, 2)


def everything(trainer: Trainer) -> list[Tensor]:
    """Weights, averaged weights and moments."""
    models = (trainer.model, trainer.result.model)
    found = [x.detach() for model in models for x in model.parameters()]
    found += [x for state in trainer.optimizer.state.values() for x in state.values()]
    return [whole(x).clone() for x in found]


def main(path: str) -> None:
    """Five steps, read one step late."""
    with joined("cpu") as (world, device):
        trainer = Trainer(read_config(path), world=world, device=device)
        trainer.late = 1
        moved = []
        for step in range(5):

            def spoil(_: Any, __: Any, y: Tensor, step: int = step) -> Tensor:
                return y * torch.inf if step in INFINITE else y

            before = everything(trainer)
            hook = trainer.model.ln_out.register_forward_hook(spoil)
            trainer.train_step()
            hook.remove()
            after = everything(trainer)
            if len(after) != len(before) or not all(map(torch.equal, before, after)):
                moved.append(step)
        trainer.settle()
        if world.first:
            print("moved", moved, "skipped", trainer.progress.skipped)


if __name__ == "__main__":
    main(sys.argv[1])
