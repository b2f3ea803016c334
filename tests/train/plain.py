"""What training means: one process, torch alone, the whole batch at once."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from kinoflow.train.run.ema import decay_at
from kinoflow.train.run.optimizer import learning_rate, parameter_groups


@dataclass
class Trained:
    model: nn.Module
    average: dict
    losses: list
    norms: list


def plain(task, config):
    """Train the task's model, and its adversary where there is one, to config.steps.

    A step whose gradient is no number is left out.
    """
    model, critic = task.model, task.discriminator
    modules = [model] if critic is None else [model, critic]
    choice = config.optimizer
    optimizers = [
        torch.optim.AdamW(parameter_groups(module, choice.weight_decay), betas=choice.betas, eps=choice.eps)
        for module in modules
    ]
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses, norms = [], []
    kept, weights = 0.0, 0.0  # of the norms as they were clipped, and their weights
    for step in range(config.steps):
        batch = task.batch(step, 0, 1)
        loss = task.loss(model, batch, step)
        loss.total.backward()
        if critic is not None:
            critic.zero_grad()
        bound = choice.grad_clip
        if choice.adaptive_clip and weights:
            bound = min(bound, choice.adaptive_clip * kept / weights)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), bound).item())
        kept, weights = 0.98 * kept + min(norms[-1], bound), 0.98 * weights + 1
        against = task.discriminator_loss(critic, batch, loss.output, step) if critic is not None else None
        if critic is not None and against is not None:
            against.total.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), choice.grad_clip)
        if not math.isfinite(norms[-1]):
            for module in modules:
                module.zero_grad()
            continue
        for optimizer in optimizers if against is not None else optimizers[:1]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(choice, step, config.steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.total.item())
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay_at(config.ema_decay, step))
    return Trained(model=model, average=average, losses=losses, norms=norms)
