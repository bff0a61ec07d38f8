"""The losses this package knows: PyTorch's cross-entropy and mean squared error themselves.

A function that wraps one of them may do anything else too, so it is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LossFunction = Callable[[Any, Any], Tensor]
"""Mean loss of a batch, a scalar, from outputs and labels."""


def is_cross_entropy(loss_fn: Any) -> bool:
    """Return whether a loss is PyTorch's cross-entropy, function or module.

    Example:
        >>> is_cross_entropy(nn.CrossEntropyLoss()), is_cross_entropy(functional.nll_loss)
        (True, False)
    """
    return loss_fn is functional.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)


def is_squared_error(loss_fn: Any) -> bool:
    """Return whether a loss is PyTorch's mean squared error, function or module."""
    return loss_fn is functional.mse_loss or isinstance(loss_fn, nn.MSELoss)


IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` ignores."""


def ignored_label(loss_fn: Any) -> int:
    """Return the label that a cross-entropy ignores."""
    return int(getattr(loss_fn, "ignore_index", IGNORED_LABEL))


@dataclass(frozen=True, eq=False)
class Places:
    """The places ``(N, …)`` of class scores ``(N, C, …)`` that a cross-entropy is the mean over.

    Places with the label ``ignored`` do not count; ``weight`` is that of a place by its label,
    ``(C,)``, or ``None`` where all count alike.
    """

    ignored: int = IGNORED_LABEL
    weight: Tensor | None = None

    @classmethod
    def of(cls, loss_fn: Any) -> Places:
        """Return those of PyTorch's cross-entropy, function or module."""
        return cls(ignored_label(loss_fn), getattr(loss_fn, "weight", None))

    def counted(self, outputs: Tensor, labels: Any) -> Tensor | None:
        """Return the weight of each place, 1 on average, or ``None`` where all count alike.

        Labels that are not classes ``(N, …)``, such as probabilities, all count alike.

        Example:
            >>> Places().counted(torch.zeros(4, 3), torch.tensor([0, 1, -100, -100]))
            tensor([2., 2., 0., 0.], dtype=torch.float64)
        """
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        if labels.shape != outputs.shape[:1] + outputs.shape[2:]:
            return None
        counts = labels != self.ignored
        if self.weight is None and bool(counts.all()):
            return None
        values = counts.double()
        if self.weight is not None:
            values = values * self.weight.to(values)[torch.where(counts, labels, 0)]
        total = values.sum()
        return values * (values.numel() / total) if float(total) > 0 else values

    def curvature(self, outputs: Tensor, labels: Any, temperature: float = 1.0) -> float:
        """Return the trace of cross-entropy's Hessian in class scores, over the places that count.

        Scores are softened by the temperature, which is above 0.
        """
        per_place = 1 - torch.softmax(outputs.double() / temperature, 1).square().sum(1)
        counted = self.counted(outputs, labels)
        return float((per_place if counted is None else per_place * counted).sum())
