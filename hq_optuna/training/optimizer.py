"""The optimizer of a training: decoupled weight decay, and step sizes at a rate of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from hq_optuna.training.settings import TrainingSettings

MOMENTUM = 0.9


class DecayedSGD(SGD):
    """SGD with momentum whose weight decay is decoupled, as AdamW's (Loshchilov and Hutter, 2019).

    Args:
        params: Groups; each may have ``decoupled_decay``, a share per learning rate.
        lr: Learning rate.
        momentum: Of the gradients.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take the decay off, then step."""
        for group in self.param_groups:
            decay = group["lr"] * group.get("decoupled_decay", 0.0)
            for parameter in group["params"] if decay else ():
                if parameter.grad is not None:
                    parameter.mul_(1 - decay)
        return super().step(closure)


def build_optimizer(
    weights: Mapping[str, nn.Parameter],
    log_scales: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
) -> Optimizer:
    """Return the optimizer of a network's parameters and of its step sizes' logarithms."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights.values() if p.dim() > 1], "decays": True, "share": 1.0},
        {"params": [p for p in weights.values() if p.dim() <= 1], "decays": False, "share": 1.0},
        {"params": list(log_scales.values()), "decays": False, "share": settings.step_rate},
    ]
    groups = [group for group in groups if group["params"]]
    key = "weight_decay" if settings.optimizer == "adamw" else "decoupled_decay"
    for group in groups:
        group[key] = settings.weight_decay if group["decays"] else 0.0
    if settings.optimizer == "sgd":
        return DecayedSGD(groups, lr=settings.learning_rate, momentum=MOMENTUM)
    return AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
