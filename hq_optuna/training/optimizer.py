"""The optimizer of a training, and its second moments as curvature for the next step.

Weight decay is decoupled, and step sizes have a learning rate of their own.

Adam keeps an exponential mean of the squared gradient of the *mini-batch mean*. Near a minimum
v̂ ≈ F / B with F the diagonal of the empirical Fisher matrix and B the batch size, so h = B · v̂,
bias-corrected (`hq_optuna.curvature.adam` says more; there the same is measured without training).
AdamW's decay is decoupled and never enters its moments. There is no gradient scaling, in bfloat16
neither, so nothing has to be divided out.

What the gradient is of: the loss that was trained on, that is the distance to the teacher's outputs
where it was distillation, and of the network with its rounded weights, in training mode, along the
way the weights took in the last 1 / (1 − β₂) steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hq_optuna.curvature import Curvature
from hq_optuna.quantization.prepare import float_weight, prepared_layers
from hq_optuna.training.learned import LearnedSteps
from hq_optuna.training.settings import TrainingSettings

MOMENTUM = 0.9


class DecayedSGD(SGD):
    """SGD with momentum whose weight decay is decoupled, as AdamW's (Loshchilov and Hutter, 2019).

    Groups may have ``decoupled_decay``, a share per learning rate.
    """

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


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the gradients of a trained network's weights.

    Attributes:
        moments: Layer → v̂, bias-corrected, of the weight's shape; layers whose weight was not
            trained itself are missing. Gradients that were cut to ``clip_norm`` make all of them
            smaller by one factor.
        batch_size: Samples a step, the factor B in h = B · v̂.
        n_steps: Steps that were taken.
        clipped: Layer → how many of its weights lie beyond their grid. Where gradients of these
            stop (``out_of_range="stop"``), their moments are too small.
        no_gradient: Layers whose moments are zero throughout: unknown, not free.
    """

    moments: Mapping[str, Tensor]
    batch_size: int
    n_steps: int
    clipped: Mapping[str, int]
    no_gradient: tuple[str, ...]

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Layer → h = B · v̂, nats per weight², where it is known."""
        known = {n: v for n, v in self.moments.items() if n not in self.no_gradient}
        return {name: v * self.batch_size for name, v in known.items()}

    def curvature(self, measured: Curvature) -> Curvature:
        """Return a curvature with the weights' part from these moments, in nats per weight².

        The rest is measured at the trained network (`calibration_adam` of its `rounded_copy`): the
        inputs' part, which no optimizer has, and layers without moments.
        """
        found = measured.with_weights(self.by_layer)
        return dataclasses.replace(found, batch_size=self.batch_size, errors={})


def second_moments(
    network: nn.Module,
    optimizer: Optimizer,
    steps: LearnedSteps,
    settings: TrainingSettings,
    batch_size: int,
) -> SecondMoments | None:
    """Return the second moments an optimizer keeps; ``None`` where it keeps none."""
    moments: dict[str, Tensor] = {}
    clipped: dict[str, int] = {}
    n_steps = 0
    for name, module in prepared_layers(network).items():
        parametrizations = module.parametrizations.weight  # type: ignore[union-attr]
        if len(parametrizations) > 1:  # type: ignore[arg-type]
            continue
        weight: Any = parametrizations.original  # type: ignore[union-attr]
        state = optimizer.state.get(weight, {})
        if "exp_avg_sq" not in state:
            continue
        n_steps = max(n_steps, int(state["step"]))
        correction = 1 - settings.beta2 ** int(state["step"])
        moments[name] = state["exp_avg_sq"].detach() / correction
        if name in steps.weights:
            clipped[name] = steps.weights[name].n_clipped(float_weight(module))
    if not moments:
        return None
    return SecondMoments(
        moments=moments,
        batch_size=batch_size,
        n_steps=n_steps,
        clipped=clipped,
        no_gradient=tuple(name for name, v in moments.items() if not bool(v.any())),
    )
