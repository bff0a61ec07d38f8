"""What training makes small: the loss in labels, the distance to the float network, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hq_optuna.errors import DataError
from hq_optuna.network.losses import LossFunction, ignored_label, is_cross_entropy


def class_axis(outputs: Any, labels: Any, loss_fn: LossFunction | None) -> int | None:
    """Return the axis of a network's outputs that holds class scores, or ``None``.

    Outputs are class scores where the loss is PyTorch's cross-entropy, or where labels are whole
    numbers, one for each place of outputs ``(N, C, …)`` or ``(N, …, C)`` with C of 2 or more.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        return None
    if is_cross_entropy(loss_fn):
        return 1
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    for axis in (1, -1):
        places = [n for i, n in enumerate(outputs.shape) if i != axis % outputs.dim()]
        if outputs.shape[axis] > 1 and list(labels.shape) == places:
            return axis
    return None


def distillation(outputs: Any, targets: Any, temperature: float, axis: int | None = 1) -> Tensor:
    """Return how far a network's outputs are from ``targets``, those of its teacher.

    Of class scores along ``axis``: T² · KL(teacher ‖ student), mean over samples and places (Hinton
    et al., 2015); T² keeps the size of its gradient when T changes. Of other outputs: their mean
    squared error. Raises `DataError` for outputs that are not one tensor of floats.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        what = str(outputs.dtype) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"Distillation compares outputs that are one tensor of floats; in training mode the "
            f"network returns {what}. Train on labels (label_weight=1)."
        )
    if axis is None:
        return functional.mse_loss(outputs.float(), targets.float())
    student = functional.log_softmax(outputs.float() / temperature, axis)
    teacher = functional.log_softmax(targets.float() / temperature, axis)
    places = outputs.numel() // outputs.shape[axis]
    divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence * (temperature**2 / places)


def mean_of_views(outputs: Sequence[Any]) -> Any:
    """Return the mean of a teacher's outputs on several views of a batch; of one, the output.

    Raises `DataError` for outputs of several views that are no class scores ``(N, C)``.
    """
    if len(outputs) == 1:
        return outputs[0]
    if not all(isinstance(found, Tensor) and found.dim() == 2 for found in outputs):
        raise DataError(
            "teacher_views takes a mean of class scores (N, C), which an augmentation of the "
            "inputs does not move; this network returns something else. Give teacher_views=1."
        )
    return torch.stack([*outputs]).float().mean(0)


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
        axis = class_axis(targets, labels, loss_fn)
        parts.append((1 - label_weight) * distillation(outputs, targets, temperature, axis))
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def right_and_counted(outputs: Any, labels: Any, loss_fn: LossFunction | None) -> tuple[int, int]:
    """Return how many classes are right, and of how many; ``(0, 0)`` where there are none.

    Ignored labels do not count. Nor does anything where the axis of the classes cannot be told:
    outputs ``(N, T, C)`` with as many classes as places, and a loss that is not known.
    """
    axis = class_axis(outputs, labels, loss_fn)
    if axis is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return 0, 0
    places = [n for i, n in enumerate(outputs.shape) if i != axis % outputs.dim()]
    told = is_cross_entropy(loss_fn) or outputs.dim() == 2 or outputs.shape[1] != outputs.shape[-1]
    if not told or list(labels.shape) != places or outputs.shape[axis] < 2:
        return 0, 0
    counted = labels != ignored_label(loss_fn)
    right = (outputs.detach().argmax(axis) == labels) & counted
    return int(right.sum()), int(counted.sum())
