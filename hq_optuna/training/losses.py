"""What training makes small: the loss in labels, the distance to the float network, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hq_optuna.curvature import LossFunction
from hq_optuna.errors import DataError


def distillation(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """Return T² · KL(teacher ‖ student), mean over samples and places (Hinton et al., 2015).

    T² keeps the size of its gradient when T changes.

    Args:
        outputs: The trained network's class scores ``(N, C, …)``.
        targets: The teacher's.
        temperature: T, above 0.

    Raises:
        DataError: Outputs that are no class scores.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        what = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"Distillation compares class scores (N, C, …); the network returns {what}. "
            "Train on labels (label_weight=1)."
        )
    student = functional.log_softmax(outputs.float() / temperature, 1)
    teacher = functional.log_softmax(targets.float() / temperature, 1)
    places = outputs.numel() // outputs.shape[1]
    divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence * (temperature**2 / places)


def training_loss(
    outputs: Any,
    labels: Any,
    targets: Any | None,
    loss_fn: LossFunction | None,
    label_weight: float,
    temperature: float,
) -> Tensor:
    """Return ``label_weight`` of the loss in labels, and the rest of distillation."""
    parts: list[Tensor] = []
    if label_weight:
        assert loss_fn is not None
        parts.append(label_weight * loss_fn(outputs, labels))
    if targets is not None and label_weight < 1:
        parts.append((1 - label_weight) * distillation(outputs, targets, temperature))
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def right_and_counted(outputs: Any, labels: Any) -> tuple[int, int]:
    """Return how many classes are right, and of how many; ``(0, 0)`` where there are none."""
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
        return 0, 0
    if labels.is_floating_point() or labels.dim() != outputs.dim() - 1:
        return 0, 0
    return int((outputs.detach().argmax(1) == labels).sum()), labels.numel()
