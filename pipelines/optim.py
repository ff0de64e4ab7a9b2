"""The optimizer of a run and its learning rate at each step."""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from pipelines.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = True) -> AdamW:
    """AdamW that decays matrices only.

    Biases, norms, alphas and the position table are left alone, as in the ViT recipes: pulling
    them to zero regularises nothing.
    """
    members: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        # The biases of experts are stacked: two axes, and still biases.
        decayed = parameter.ndim >= 2 and "position" not in name and "bias" not in name
        # Torch updates no split and whole weights in one go.
        members[decayed, isinstance(parameter, DTensor)].append(parameter)
    groups = [
        {"params": members[kind], "weight_decay": config.weight_decay if kind[0] else 0.0}
        for kind in sorted(members, reverse=True)
    ]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of the update that follows `step` finished ones: warm-up, then cosine to zero.

    Args:
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        config: Peak rate and length of the warm-up.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
