"""Which rise fits a network's loss, or, where that tells nothing, its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches, FloatOutputs, cloned, forward
from hq_optuna.network.containers import tensors
from hq_optuna.network.copies import copied
from hq_optuna.network.loss_weights import nothing, only_class_axis
from hq_optuna.network.losses import LossFunction, Places, is_cross_entropy, is_squared_error
from hq_optuna.rises.base import Rise, as_rise
from hq_optuna.rises.heads import Heads, parts_of
from hq_optuna.rises.places import Cosine, CrossEntropy, SquaredError

MOST_READ = 8
"""Batches at most that tell of what kind the outputs are."""

SURE = 0.6
"""Mean largest probability from which outputs look like the scores of a trained classifier."""


class Chosen(NamedTuple):
    """A rise, and a sentence that says which and why."""

    rise: Rise
    reason: str


def rise_of_loss(loss_fn: Any) -> Rise | None:
    """Return the rise of a loss, or ``None`` for a loss that is not known here."""
    if is_cross_entropy(loss_fn):
        return CrossEntropy(marks=Places.of(loss_fn))
    return SquaredError() if is_squared_error(loss_fn) else None


def rise_of_outputs(outputs: list[Any], data: Batches) -> Chosen:
    """Return a rise by the float network's outputs on the first batches of data.

    Each tensor of floating-point numbers has its own: the divergence of classes where labels tell
    them, or the numbers are probabilities, or look like the scores of a trained classifier; the
    cosine where rows have length 1; else the squared error relative to the tensor's own variance.

    Raises:
        DataError: The outputs cannot be compared, such as boxes that were selected.
    """
    batches = data[: len(outputs)]
    found = [parts_of(z, batch.n) for z, batch in zip(outputs, batches, strict=True)]
    names = list(found[0])
    if not names:
        raise DataError("The network returns no tensor of floating-point numbers to compare.")
    if any(list(part) != names for part in found):
        raise DataError(
            "The network returns other tensors for one batch than for the next. Return what it "
            "computes before it selects: see hq_optuna.rises.At."
        )
    kinds = {name: _kind([part[name] for part in found], batches) for name in names}
    for part, batch in zip(found, batches, strict=True):
        for name, (rise, _) in kinds.items():
            rise.of_samples(part[name], part[name], batch)  # rows that are no samples are refused
    if len(kinds) == 1:
        [(name, (rise, said))] = kinds.items()
        if sum(z.is_floating_point() for z in tensors(outputs[0])) > 1:  # one of them has a name
            rise = Heads({name: rise})
        return Chosen(rise, f"{said[0].upper()}{said[1:]}.")
    said = "; ".join(f"{name}: {what}" for name, (_, what) in kinds.items())
    return Chosen(Heads({n: rise for n, (rise, _) in kinds.items()}), f"The sum of {said}.")


_RELATIVE = "squared error relative to the output's own variance"


def _kind(heads: list[Tensor], batches: tuple[Batch, ...]) -> tuple[Rise, str]:
    """Return the rise of one output, and what it is, in words."""
    for z, batch in zip(heads, batches, strict=True):
        axis = only_class_axis(z, batch.labels)
        if axis is None:
            break
    else:
        return CrossEntropy(axis), f"divergence of the classes that the labels name, axis {axis}"
    rows = [_rows(z, axis) for axis in (1, -1) for z in heads[:1] if z.dim() > 1]
    for axis, z in zip((1, -1), rows, strict=False):
        if z.shape[1] < 2:
            continue
        if bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() < 1e-3).all()):
            return CrossEntropy(
                axis, probabilities=True
            ), f"divergence of probabilities, axis {axis}"
        if bool((z.logsumexp(1).abs() < 1e-3).all()):
            return CrossEntropy(axis), f"divergence of log-probabilities, axis {axis}"
        if z.shape[1] >= 8 and bool(((z.norm(dim=1) - 1).abs() < 1e-3).all()):
            return Cosine(axis), f"cosine of embeddings of length 1, axis {axis}"
    # Colours, coordinates and flows have up to four numbers a pixel.
    few = 2 if heads[0].dim() == 2 else 4
    if heads[0].dim() > 1 and heads[0].shape[1] > few and _like_classes(heads):
        said = (
            "divergence of what looks like class scores, axis 1 (say "
            "rise=hq_optuna.rises.SquaredError(relative=True) if they are none)"
        )
        return CrossEntropy(), said
    return SquaredError(relative=True), _RELATIVE


def _rows(z: Tensor, axis: int) -> Tensor:
    return z.detach().movedim(axis, -1).reshape(-1, z.shape[axis]).double()


def _like_classes(heads: list[Tensor]) -> bool:
    """Return whether numbers look like a trained classifier's: sure, and of different classes."""
    z = torch.cat([_rows(head, 1) for head in heads])
    if not bool(torch.isfinite(z).all()):
        return False
    p = torch.softmax(z, 1)
    most = torch.bincount(p.argmax(1), minlength=z.shape[1]).max()
    return float(p.amax(1).mean()) >= SURE and float(most) <= 0.9 * len(z)


@dataclass(frozen=True, eq=False)
class RiseLoss:
    """A loss for data without labels: the mean rise over the float network's own outputs, nats.

    It is 0 where the rise reads modules, which the outputs do not tell, and of labelled data, on
    which a metric of the user's own is measured.
    """

    rise: Rise
    of_float_outputs = True

    def __call__(self, outputs: Any, labels: Any) -> Tensor:
        """Return the mean over the samples of a batch whose labels are `FloatOutputs`."""
        if not isinstance(labels, FloatOutputs) or labels.outputs is None:
            return nothing(outputs)
        found = self.rise.of_samples(labels.outputs, outputs, Batch((), None, labels.n))
        return found.sum() / labels.n


class Decided(NamedTuple):
    """What a search computes with.

    ``rise`` is ``None`` where neither loss nor outputs tell one, ``reason`` is empty where the loss
    itself tells it, or the user gave it.
    """

    data: Batches
    loss_fn: LossFunction
    rise: Rise | None
    reason: str


@torch.no_grad()
def decide(
    network: nn.Module,
    data: Batches,
    loss_fn: LossFunction | None,
    rise: Rise | Callable[[Any, Any], Any] | None = None,
) -> Decided:
    """Return rise and loss of a search; a copy of the network runs where outputs must tell.

    Without a loss it is cross-entropy where there are labels, else the rise itself, and the float
    network's outputs stand for the labels.

    Raises:
        DataError: A loss was given, and the data have no labels; or nothing tells a rise for them.
    """
    labelled = all(batch.labels is not None for batch in data)
    own = as_rise(rise)
    if isinstance(loss_fn, RiseLoss):  # decided before
        return Decided(data, loss_fn, own or loss_fn.rise, "")
    if labelled:
        loss = functional.cross_entropy if loss_fn is None else loss_fn
        found, reason = own or rise_of_loss(loss), ""
        if found is None:
            found, reason = _by_outputs(network, data)
        return Decided(data, loss, found, reason)
    if loss_fn is not None:
        raise DataError(
            "The calibration data have no labels, and a loss was given that needs them. Give "
            "(inputs, labels), or leave the loss out: then the rise of the outputs counts."
        )
    called = copied(network)
    outputs = [forward(called, cloned(batch.inputs)) for batch in data]
    why = "The data have no labels, so that rises are told by how far outputs move from the float"
    if own is None:
        own, said = rise_of_outputs(outputs[:MOST_READ], data)
        reason = f"{why} network's. {said} Choose another with rise=."
    else:
        reason = ""
    return _without_labels(network, data, outputs, own, reason)


def _without_labels(
    network: nn.Module, data: Batches, outputs: list[Any], rise: Rise, reason: str
) -> Decided:
    """Return data whose labels are the outputs."""
    told = outputs if rise.reads_outputs else [None] * len(data)
    loss = RiseLoss(rise.fitted(outputs, data) if rise.reads_outputs else rise)
    batches = [
        replace(batch, labels=FloatOutputs(z, batch.n)) for z, batch in zip(told, data, strict=True)
    ]
    return Decided(Batches(batches), loss, rise, reason)


def without_labels(network: nn.Module, data: Batches, rise: Rise) -> Batches:
    """Return data, the float network's outputs on which stand for labels where there are none."""
    if all(batch.labels is not None for batch in data):
        return data
    called = copied(network)
    with torch.no_grad():
        outputs = [forward(called, cloned(batch.inputs)) for batch in data]
    return _without_labels(network, data, outputs, rise, "").data


def _by_outputs(network: nn.Module, data: Batches) -> tuple[Rise | None, str]:
    """Return the rise that the outputs on the first batches tell, and why."""
    called = copied(network)
    outputs = [forward(called, cloned(batch.inputs)) for batch in data[:MOST_READ]]
    try:
        found, said = rise_of_outputs(outputs, data)
    except DataError as error:
        return None, (
            "Nothing is known of this loss, and the outputs do not tell a rise either, so that the "
            f"scorer is 'diagonal', which ranks worse. {error}"
        )
    return found, (
        "Nothing is known of this loss, so that rises are told by how far outputs move from the "
        f"float network's. {said} If the loss is cross-entropy or squared error, give "
        "torch.nn.functional.cross_entropy or mse_loss itself and no function around it; else "
        "choose another rise with rise=."
    )
