"""The losses this package knows: PyTorch's cross-entropy and mean squared error themselves.

A function that wraps one of them may do anything else too, so it is not known; what cross-entropies
it computes is seen by `hq_optuna.network.loss_weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.layer_types import runs_forward_of

LossFunction = Callable[[Any, Any], Tensor]
"""Mean loss of a batch, a scalar, from outputs and labels."""


def own_loss(loss_fn: LossFunction) -> LossFunction:
    """Return a copy of a loss that is a module, whose buffers calls may change; or it itself."""
    if not isinstance(loss_fn, nn.Module):
        return loss_fn
    try:
        return copy.deepcopy(loss_fn)
    except Exception:  # of what the user's module holds
        return loss_fn


IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` ignores."""


def is_cross_entropy(loss_fn: Any) -> bool:
    """Return whether a loss is PyTorch's mean cross-entropy: function, `partial` of it, or module.

    A module with a forward of its own, or with hooks, is a loss of its own.

    Example:
        >>> is_cross_entropy(nn.CrossEntropyLoss()), is_cross_entropy(functional.nll_loss)
        (True, False)
        >>> is_cross_entropy(partial(functional.cross_entropy, ignore_index=255))
        True
    """
    return _cross_entropy(loss_fn) is not None


def is_squared_error(loss_fn: Any) -> bool:
    """Return whether a loss is PyTorch's mean squared error: function, `partial`, or module."""
    return _settings(loss_fn, functional.mse_loss, nn.MSELoss, {"reduction"}) is not None


def ignored_label(loss_fn: Any) -> int:
    """Return the label that a loss ignores, if it is PyTorch's cross-entropy."""
    return int((_cross_entropy(loss_fn) or {}).get("ignore_index", IGNORED_LABEL))


def _cross_entropy(loss_fn: Any) -> dict[str, Any] | None:
    names = {"weight", "ignore_index", "label_smoothing", "reduction"}
    return _settings(loss_fn, functional.cross_entropy, nn.CrossEntropyLoss, names)


def _settings(
    loss_fn: Any, function: LossFunction, module: type[nn.Module], names: set[str]
) -> dict[str, Any] | None:
    """Return how PyTorch's own loss is set, by name; ``None`` for any other loss, or a sum."""
    if isinstance(loss_fn, nn.Module):
        if not runs_forward_of(loss_fn, module) or _hooked(loss_fn):
            return None
        given = {name: getattr(loss_fn, name) for name in names}
    elif type(loss_fn) is partial:
        given = loss_fn.keywords
        if loss_fn.func is not function or loss_fn.args or not names.issuperset(given):
            return None
    elif loss_fn is function:
        return {}
    else:
        return None
    return given if given.get("reduction", "mean") == "mean" else None


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for kind in kinds)


@dataclass(frozen=True, eq=False)
class Places:
    """The places ``(N, …)`` of class scores ``(N, C, …)`` that a cross-entropy is the mean over.

    Places with the label ``ignored`` do not count; ``weight`` is that of a place by its label,
    ``(C,)``, or ``None`` where all count alike. ``smoothing`` is that of the labels.
    """

    ignored: int = IGNORED_LABEL
    weight: Tensor | None = None
    smoothing: float = 0.0

    @classmethod
    def of(cls, loss_fn: Any) -> Places:
        """Return those of PyTorch's cross-entropy, function, `partial` of it, or module."""
        given = _cross_entropy(loss_fn) or {}
        smoothing = float(given.get("label_smoothing", 0.0))
        return cls(ignored_label(loss_fn), given.get("weight"), smoothing)

    def weights(self, labels: Tensor) -> Tensor:
        """Return how much each place counts in the mean, of the labels' shape, in float64."""
        counts = labels.long() != self.ignored  # bytes would wrap around
        if self.weight is None:
            return counts.double()
        by_class = self.weight.double().to(labels.device)
        return counts * by_class[torch.where(counts, labels, 0).long()]

    def counted(self, outputs: Tensor, labels: Any) -> Tensor | None:
        """Return the weight of each place's curvature, ``None`` where all count alike.

        It is 1 on average over the places, or near 1 where labels are smoothed or probabilities and
        classes have weights.

        Example:
            >>> Places().counted(torch.zeros(4, 3), torch.tensor([0, 1, -100, -100]))
            tensor([2., 2., 0., 0.], dtype=torch.float64)
        """
        if not isinstance(labels, Tensor):
            return None
        if labels.is_floating_point():
            if self.weight is None or labels.shape != outputs.shape:
                return None
            by_class = self.weight.double().to(labels.device)
            told = (labels.double().movedim(1, -1) * by_class).sum(-1)
            return (1 - self.smoothing) * told + self.smoothing * by_class.mean()
        if labels.shape != outputs.shape[:1] + outputs.shape[2:]:
            return None
        values = self.weights(labels)
        if self.weight is None and bool(values.all()):
            return None
        total = values.sum()
        if self.weight is not None and self.smoothing:
            told = (1 - self.smoothing) * values + self.smoothing * self.weight.double().mean()
            values = told * (labels.long() != self.ignored)
        return values * (values.numel() / total) if float(total) > 0 else values

    def curvature(self, outputs: Tensor, labels: Any, temperature: float = 1.0) -> float:
        """Return the trace of cross-entropy's Hessian in class scores, a mean over what counts.

        Scores are softened by the temperature, which is above 0.
        """
        per_place = 1 - torch.softmax(outputs.double() / temperature, 1).square().sum(1)
        return float(self.applied(per_place, outputs, labels).mean())

    def applied(self, per_place: Tensor, outputs: Tensor, labels: Any) -> Tensor:
        """Return values of places weighed by `counted`; those that do not count may be NaN."""
        counted = self.counted(outputs, labels)
        if counted is None:
            return per_place
        return torch.where(counted != 0, per_place * counted, 0.0)
