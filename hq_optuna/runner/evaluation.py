"""How good a network is on data the search did not read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.batches import Batches, forward

Evaluate = Callable[[nn.Module, Batches], Mapping[str, float]]


@torch.no_grad()
def accuracy(network: nn.Module, data: Batches) -> dict[str, float]:
    """Return ``{"accuracy": share of right classes}``, or nothing where there are no classes.

    Understands class scores ``(N, C, …)`` with integer labels ``(N, …)``.
    """
    right = total = 0
    for batch in data:
        outputs = forward(network, batch.inputs)
        labels = batch.labels
        if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
            return {}
        if labels.is_floating_point() or labels.dim() != outputs.dim() - 1:
            return {}
        right += int((outputs.argmax(1) == labels).sum())
        total += labels.numel()
    return {"accuracy": right / total} if total else {}


@torch.no_grad()
def mean_loss(
    network: nn.Module, data: Batches, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, float]:
    """Return ``{"loss": mean over the samples}``."""
    losses = [float(loss_fn(forward(network, b.inputs), b.labels)) * b.n for b in data]
    return {"loss": math.fsum(losses) / data.n_samples}
