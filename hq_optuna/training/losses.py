"""What training makes small: the loss in labels, the distance to the float network, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hq_optuna.errors import DataError
from hq_optuna.network.evaluation import Accuracy
from hq_optuna.network.loss_weights import ObservedLoss, class_axes, nothing, observe_loss, watched
from hq_optuna.network.losses import LossFunction, is_cross_entropy


def class_axis(outputs: Any, labels: Any, loss_fn: LossFunction | None) -> int | None:
    """Return the axis of a network's outputs that holds class scores, or ``None``.

    Outputs are class scores where the loss is PyTorch's cross-entropy, or where labels are whole
    numbers, one for each place of outputs ``(N, C, …)`` or ``(N, …, C)`` with C of 2 or more. Where
    both may be, the loss says which by the scores of its one cross-entropy.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        return None
    if is_cross_entropy(loss_fn):
        return 1
    axes = class_axes(outputs, labels)
    if len(axes) > 1 and loss_fn is not None:
        with torch.no_grad():
            _, seen = watched(loss_fn, outputs, labels)
        rows = [each.scores.movedim(1, -1).flatten(0, -2) for each in seen]
        axes = [axis for axis in axes if any(_same(outputs.movedim(axis, -1), row) for row in rows)]
        return axes[0] if len(axes) == 1 else None
    return axes[0] if axes else None


def _same(outputs: Tensor, rows: Tensor) -> bool:
    return torch.equal(outputs.flatten(0, -2), rows)


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
        found = observe_loss(loss_fn, outputs, labels)
        if found.call is not None and not found.weight:  # the mean over no label is NaN
            found = ObservedLoss(nothing(outputs), None)
        parts.append(label_weight * found.loss)
    if targets is not None and label_weight < 1:
        axis = class_axis(targets, labels, loss_fn)
        parts.append((1 - label_weight) * distillation(outputs, targets, temperature, axis))
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


@torch.no_grad()
def right_and_counted(outputs: Any, labels: Any, loss_fn: LossFunction | None) -> tuple[int, int]:
    """Return how many classes are right, and of how many; ``(0, 0)`` where there are none.

    As `hq_optuna.network.evaluation.Accuracy` counts them.
    """
    if loss_fn is None:  # distillation alone
        loss_fn = functional.cross_entropy
    right = Accuracy(loss_fn).right(outputs, labels)
    return (0, 0) if right is None else (int(right.sum()), right.numel())
