"""AdamW with RWKV-7's parameter groups, and learning-rate schedules.

BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, configure_optimizers.
"""

import math

import torch
from torch import nn

from rwkvx.model import Model
from rwkvx.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """att.w0 learns twice as fast; weight decay on matrices named `weight` only."""
    groups: dict[str, list[nn.Parameter]] = {"double": [], "decay": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("att.w0"):
            groups["double"].append(parameter)
        elif parameter.dim() >= 2 and name.endswith(".weight"):
            groups["decay"].append(parameter)
        else:
            groups["plain"].append(parameter)
    return [
        {"params": groups["plain"], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": groups["double"], "weight_decay": 0.0, "lr_scale": 2.0},
        {"params": groups["decay"], "weight_decay": config.weight_decay, "lr_scale": 1.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`."""
    groups = [g for g in parameter_groups(model, config) if g["params"]]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
    )


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Rate of step number `step` (from 0) of `total`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    if config.schedule == "wsd":
        share = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
    else:
        share = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final + (1 - config.final) * share)


def learning_weights(model: Model, which: str) -> None:
    """Let "all" weights learn, or those of blocks of one kind only."""
    for parameter in model.parameters():
        parameter.requires_grad_(which == "all")
    for block, kind in zip(model.blocks, model.config.pattern, strict=True):
        if which in ("all", kind):
            block.requires_grad_(True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
