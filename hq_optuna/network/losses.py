"""Which losses are known by what they are: cross-entropy and squared error, as PyTorch has them.

A function around one of them may do anything beside, so it is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
