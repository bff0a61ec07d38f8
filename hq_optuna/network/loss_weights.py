"""How much each batch counts in the mean loss over all data, and the loss of a batch as it counts.

The loss of a batch is its mean over what counts there. Where a cross-entropy ignores labels, or
weighs classes, batches of as many samples count unequally, and one may count for nothing: its mean
is then 0 / 0. A cross-entropy is seen also where a function of the user's calls it, on outputs that
it picks or reshapes; the loss is its mean where the function returns what that call returned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches, cloned, forward
from hq_optuna.network.containers import tensors
from hq_optuna.network.copies import copied
from hq_optuna.network.losses import LossFunction, Places, is_cross_entropy, is_squared_error

logger = logging.getLogger(__name__)

_CLASSES = {f: signature(f) for f in (functional.cross_entropy, functional.nll_loss)}


class ClassLoss(NamedTuple):
    """One cross-entropy that a loss computed: scores ``(M, C, …)``, whole labels ``(M, …)``."""

    scores: Tensor
    labels: Tensor
    places: Places
    result: Tensor
    is_mean: bool

    @property
    def counts(self) -> Tensor:
        """Which labels are not ignored, of their shape."""
        return self.labels.long() != self.places.ignored


class _Watch(TorchFunctionMode):
    """Notes each cross-entropy of whole labels that the body computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[ClassLoss] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CLASSES:
            bound = _CLASSES[func].bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            given = bound.arguments
            if not given["target"].is_floating_point() and given["input"].dim() > 1:
                places = Places(given["ignore_index"], given["weight"])
                plain = given["size_average"] is None and given["reduce"] is None
                is_mean = plain and given["reduction"] == "mean"
                self.seen.append(
                    ClassLoss(given["input"], given["target"], places, result, is_mean)
                )
        return result


def watched(loss_fn: LossFunction, outputs: Any, labels: Any) -> tuple[Any, list[ClassLoss]]:
    """Return a loss, and the cross-entropies that it computed on the way.

    The loss gets copies of outputs and labels, as it may write into them.
    """
    with _Watch() as watch:
        loss = loss_fn(cloned(outputs), cloned(labels))
    return loss, watch.seen


def class_axes(outputs: Any, labels: Any) -> list[int]:
    """Return the axes of outputs, 1 and −1 at most, that whole labels may be the classes along.

    Outputs are ``(N, C, …)`` or ``(N, …, C)`` with C of 2 or more, and labels ``(N, …)``.
    """
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)) or outputs.dim() < 2:
        return []
    if labels.is_floating_point():
        return []
    axes = (1, -1) if outputs.dim() > 2 else (1,)
    shapes = {axis: outputs.movedim(axis, 1).shape for axis in axes}
    return [axis for axis, (n, c, *rest) in shapes.items() if c > 1 and labels.shape == (n, *rest)]


def only_class_axis(outputs: Any, labels: Any) -> int | None:
    """Return the axis of `class_axes` where there is one alone."""
    axes = class_axes(outputs, labels)
    return axes[0] if len(axes) == 1 else None


class ObservedLoss(NamedTuple):
    """The loss of a batch, and the cross-entropy that it is, if it is one's mean."""

    loss: Any
    call: ClassLoss | None

    @property
    def weight(self) -> float:
        """Return the sum of the weights of what the mean is over."""
        assert self.call is not None
        return _weight(self.call.places, self.call.labels)


def observe_loss(loss_fn: LossFunction, outputs: Any, labels: Any) -> ObservedLoss:
    """Return the loss of a batch and how much it is the mean over."""
    loss, seen = watched(loss_fn, outputs, labels)
    is_mean = len(seen) == 1 and seen[0].result is loss and seen[0].is_mean
    return ObservedLoss(loss, seen[0] if is_mean else None)


@torch.no_grad()
def observed_losses(
    network: nn.Module, data: Batches, loss_fn: LossFunction
) -> Iterator[ObservedLoss]:
    """Yield the losses of a copy of the network on the batches, each when it is asked for."""
    called = copied(network)
    for batch in data:
        yield observe_loss(loss_fn, forward(called, batch.inputs), batch.labels)


def _weight(places: Places, labels: Tensor) -> float:
    return float(places.weights(labels).sum())


def batch_loss(loss_fn: LossFunction, outputs: Any, batch: Batch) -> Tensor:
    """Return the loss of a batch times its `share`: the mean over all samples is that of all data.

    A batch of which nothing counts has a loss of 0, whatever the loss function makes of it.
    """
    if batch.share == 0:
        return nothing(outputs)
    return batch.share * loss_fn(cloned(outputs), cloned(batch.labels))


def nothing(outputs: Any) -> Tensor:
    """Return a loss of 0 that outputs have a gradient of: 0 too."""
    empty = [z.flatten()[:0].sum() for z in tensors(outputs) if z.is_floating_point()]
    return torch.stack([z.float() for z in empty]).sum() if empty else torch.zeros((), device="cpu")


@torch.no_grad()
def weighed(
    data: Batches,
    loss_fn: LossFunction,
    observed: Iterable[ObservedLoss],
    what: str = "calibration",
) -> Batches:
    """Return the data, each batch with its share in the mean loss.

    ``observed`` are the losses of the batches, read as far as need be: of PyTorch's own
    cross-entropy the labels tell all. Raises `DataError` where no label counts at all.
    """
    if is_cross_entropy(loss_fn):
        labels = [batch.labels for batch in data]
        if not all(isinstance(y, Tensor) and not y.is_floating_point() for y in labels):
            return data
        places = Places.of(loss_fn)
        return _shared(data, [(y.numel(), _weight(places, y)) for y in labels], what)
    found = list[tuple[int, float]]()
    for batch, loss in zip(data, observed, strict=False):
        if loss.call is None:
            return data
        told = batch.labels if isinstance(batch.labels, Tensor) else loss.call.labels
        found.append((told.numel(), loss.weight))
    return _shared(data, found, what)


def _shared(data: Batches, weights: Sequence[tuple[int, float]], what: str) -> Batches:
    """Return the data with shares by weight, unless all labels of all batches count alike."""
    if all(weight == places for places, weight in weights):
        return data
    total = math.fsum(weight for _, weight in weights)
    if total <= 0:
        raise DataError(
            f"The loss ignores all labels of the {what} data, so there is no loss. Check the "
            "labels, and the label that the loss ignores (ignore_index)."
        )
    shares = [w * data.n_samples / (b.n * total) for b, (_, w) in zip(data, weights, strict=True)]
    return Batches([replace(b, share=share) for b, share in zip(data, shares, strict=True)])


def counting(part: Batches) -> Batches:
    """Return the batches of which something counts, with shares that are 1 on average over them."""
    if all(batch.share == 1 for batch in part):
        return part
    kept = [batch for batch in part if batch.share]
    mean = math.fsum(b.n * b.share for b in kept) / sum(b.n for b in kept)
    return Batches([replace(b, share=b.share / mean) for b in kept])


SUMMED = (
    "The loss function sums over the batch (reduction='sum'); it is divided by the number of "
    "samples here, as scores are means. Give one that returns the mean (reduction='mean')."
)


@dataclass(frozen=True)
class MeanOf:
    """The mean over samples of a loss that sums, where a sample has so many rows of labels."""

    summed: LossFunction
    rows: int

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self.summed(outputs, labels) * (self.rows / len(labels))


@torch.no_grad()
def as_mean(
    network: nn.Module, data: Batches, loss_fn: LossFunction
) -> tuple[LossFunction, list[str]]:
    """Return a mean loss, and a warning where the given one is a sum and was divided.

    A sum is told by a batch of several samples, whose loss is that of its halves together.
    """
    batch = next((b for b in data if b.n > 1), data[0])
    inputs, labels, half = batch.inputs, batch.labels, batch.n // 2
    known = is_cross_entropy(loss_fn) or is_squared_error(loss_fn)
    if known or not half or not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
        return loss_fn, []
    rows, called = len(labels) // batch.n, copied(network)  # a sample may have several labels
    cut = half * rows
    try:
        parts = (inputs, labels), (inputs[:half], labels[:cut]), (inputs[half:], labels[cut:])
        loss, a, b = (float(loss_fn(forward(called, x), cloned(y))) for x, y in parts)
    except Exception as error:  # a network or loss that is made for one batch size
        logger.debug("Half a batch could not be tried: %s", error)
        return loss_fn, []
    mean = (a * half + b * (batch.n - half)) / batch.n
    sums = abs(a + b - loss) < 1e-4 * abs(loss) and abs(mean - loss) > 1e-2 * abs(loss)
    return (MeanOf(loss_fn, rows), [SUMMED]) if sums else (loss_fn, [])
