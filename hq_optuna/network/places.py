"""Which places of class scores a cross-entropy counts, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""`torch.nn.functional.cross_entropy` ignores this label."""


@dataclass(frozen=True, eq=False)
class Places:
    """What a cross-entropy's mean is over: places ``(N, …)`` of class scores ``(N, C, …)``.

    Args:
        ignored: Places with this label do not count.
        weight: What places count by their label, ``(C,)``; ``None``: all alike.
    """

    ignored: int = IGNORED_LABEL
    weight: Tensor | None = None

    @classmethod
    def of(cls, loss_fn: Any) -> Places:
        """Return those of PyTorch's cross-entropy, function or module."""
        return cls(
            getattr(loss_fn, "ignore_index", IGNORED_LABEL), getattr(loss_fn, "weight", None)
        )

    def counted(self, outputs: Tensor, labels: Any) -> Tensor | None:
        """Return what each place counts, 1 on average, or ``None`` where all count alike.

        Args:
            outputs: Class scores ``(N, C, …)``.
            labels: Classes ``(N, …)``; of other labels, such as probabilities, all count alike.

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
