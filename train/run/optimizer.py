"""AdamW's parameter groups and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from kinoflow.train.run.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step (from 0) of a run of steps: linear warm-up, then constant, cosine or linear decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    progress = min(progress, 1.0)
    remaining = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * remaining)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and gains (one dimension) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if len(whole_shape(p)) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole: a parameter that ZeRO-3 has cut is flat here and keeps its shape beside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel over the trained parameters of the module."""
    groups = parameter_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
