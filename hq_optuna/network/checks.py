"""Checks before a search: a network, data or loss that cannot be searched is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.errors import DataError, HqOptunaError, NetworkError
from hq_optuna.network.batches import Batches, cloned, forward, tensors
from hq_optuna.network.copies import copied
from hq_optuna.network.losses import IGNORED_LABEL, LossFunction, ignored_label, is_cross_entropy

logger = logging.getLogger(__name__)


@contextmanager
def explain_errors(what: str, hint: str) -> Iterator[None]:
    """Raise errors of the user's own code as `DataError`: what failed, the error, what is expected.

    Errors of this package pass unchanged. ``what`` is the beginning of a sentence, ``hint`` its
    end.
    """
    try:
        yield
    except HqOptunaError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}. {hint}") from error


@torch.no_grad()
def check_forward(network: nn.Module, data: Batches, loss_fn: LossFunction) -> list[str]:
    """Refuse what would make scores wrong or unrepeatable, from two passes over the first batch.

    Calls a copy in eval mode. Returns warnings, a sentence each, about what is possible but
    doubtful.

    Raises:
        NetworkError: Two passes differ (dropout left on), outputs are NaN or infinite, or the
            network writes into its input or cannot be copied.
        DataError: Labels out of range, a loss that is not one finite number, or cross-entropy of
            outputs or labels that are no classes.
    """
    called = copied(network)
    for name, value in called.state_dict().items():
        if not isinstance(value, Tensor):
            raise NetworkError(
                f"The network's state holds {name!r}, a {type(value).__name__} and no tensor "
                "(get_extra_state), which neither a result nor a checkpoint can hold."
            )
    outputs = _repeatable_outputs(called, data)
    for output in tensors(outputs):
        if output.is_floating_point() and not bool(torch.isfinite(output).all()):
            raise NetworkError(
                "The network's outputs on the calibration data hold NaN or infinity. "
                "Check the checkpoint and the normalization of the inputs."
            )
    if is_cross_entropy(loss_fn):
        check_class_scores(outputs)
        for batch in data:
            check_labels(outputs, batch.labels, ignored_label(loss_fn))
            check_probabilities(outputs, batch.labels)
    return _check_mean(called, data, loss_fn, _finite_loss(loss_fn, outputs, data[0].labels))


def _repeatable_outputs(network: nn.Module, data: Batches) -> Any:
    """Return the outputs on the first batch, which a second pass must repeat."""
    inputs = data[0].inputs
    before = [(t, t.clone(), _version(t)) for t in tensors(inputs)]
    first = forward(network, inputs)
    _check_inputs_kept(before)
    if len(data) > 1:  # another batch may leave something behind
        with explain_errors(
            "The network fails on the last calibration batch, and not on the first",
            "Batches are to be alike in types and shapes.",
        ):
            forward(network, cloned(data[-1].inputs))
    pair = list(tensors(first)), list(tensors(forward(network, inputs)))
    if len(pair[0]) != len(pair[1]):
        raise NetworkError(
            "Two forward passes of the same images in eval mode return different numbers of "
            "tensors. Scores must be repeatable; make eval mode deterministic."
        )
    for a, b in zip(*pair, strict=True):
        if bool(torch.isnan(a).any()):  # never equal to itself, and refused later
            break
        if not torch.equal(a, b):
            raise NetworkError(
                "Two forward passes of the same images in eval mode differ: the network is random "
                "(dropout with training=True, random augmentation inside forward?), or remembers "
                "what it saw (a buffer that forward updates and uses?). "
                "Scores must be repeatable; make eval mode deterministic."
            )
    return first


def _finite_loss(loss_fn: LossFunction, outputs: Any, labels: Any) -> float:
    """Return the loss of the first batch, refused where it is not one finite number."""
    with explain_errors(
        "The loss function failed on the first calibration batch",
        "It is called with (outputs, labels).",
    ):
        loss = loss_fn(outputs, labels)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f"The loss function returns one number, the mean of a batch; got {shape}.")
    if not math.isfinite(float(loss)):
        raise DataError(
            f"The loss on the first calibration batch is {float(loss)}. Check labels and outputs."
        )
    return float(loss)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written, as far as PyTorch counts."""
    return 0 if tensor.is_inference() else tensor._version


def _check_inputs_kept(before: list[tuple[Tensor, Tensor, int]]) -> None:
    """Refuse a network that writes into its input, and put the input back.

    Writing counts even where it leaves this batch's values the same (clamping what is clamped).
    ``before`` holds each input tensor, a copy, and its version before the pass.
    """
    written = [tensor for tensor, _, version in before if _version(tensor) > version]
    for tensor, values, _ in before:
        if not torch.equal(tensor, values):
            tensor.copy_(values)
            written.append(tensor)
    if written:
        raise NetworkError(
            "The network writes into its input (an in-place operation such as `x.sub_(mean)` or "
            "ReLU(inplace=True) on it), so a second pass would see other data. Make its first "
            "operation work on a copy."
        )


_ANOTHER_LOSS = (
    "The loss is cross-entropy, which is for classes: give loss, for example "
    "torch.nn.functional.mse_loss where numbers are predicted."
)


def check_class_scores(outputs: Any) -> None:
    """Refuse outputs that are no class scores, of which cross-entropy fails or is always 0."""
    if isinstance(outputs, Tensor) and (outputs.dim() < 2 or outputs.shape[1] == 1):
        raise DataError(
            f"The network's outputs have shape {tuple(outputs.shape)}, one number a sample, and "
            f"class scores have shape (samples, classes, …). {_ANOTHER_LOSS}"
        )


def check_probabilities(outputs: Any, labels: Any) -> None:
    """Refuse floating-point labels that are no class probabilities; cross-entropy takes any."""
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
        return
    if not labels.is_floating_point():
        return
    positive = labels.dim() == outputs.dim() and bool((labels >= 0).all())
    # Labels in half precision, one for each of many classes, do not sum to 1 exactly.
    if positive and bool((labels.double().sum(1) - 1).abs().max() < 1e-2):
        return
    raise DataError(
        "The labels are no classes: they are neither whole numbers nor, for each sample, "
        f"probabilities that sum to 1. {_ANOTHER_LOSS}"
    )


@torch.no_grad()
def check_rise(network: nn.Module, data: Batches, output_rise: Callable[..., Any]) -> None:
    """Refuse an ``output_rise`` that fails, or is not finite, on outputs that did not move."""
    outputs = forward(copied(network), data[0].inputs)
    with explain_errors(
        "output_rise failed on the first calibration batch",
        "It is called with (outputs, moved) and returns one number, summed over the samples.",
    ):
        found = float(output_rise(outputs, cloned(outputs)))
    if not math.isfinite(found):
        raise DataError(f"output_rise of outputs that did not move is {found}; it should be 0.")


def check_labels(
    outputs: Any, labels: Any, ignored: int = IGNORED_LABEL, what: str = "calibration"
) -> None:
    """Refuse class labels that the network has no output for; ``what`` names the data.

    Looks only at the common case of class scores ``(N, C, …)`` of any batch and integer labels
    ``(N, …)``.
    """
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
        return
    if labels.is_floating_point() or outputs.dim() < 2 or labels.dim() != outputs.dim() - 1:
        return
    used = labels[labels != ignored]
    n_classes = outputs.shape[1]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= n_classes):
        raise DataError(
            f"{what.capitalize()} labels run from {int(used.min())} to {int(used.max())}, but the "
            f"network has {n_classes} outputs (labels 0 to {n_classes - 1})."
        )


def _check_mean(network: nn.Module, data: Batches, loss_fn: LossFunction, loss: float) -> list[str]:
    """Warn if the loss looks like a sum over the batch rather than its mean."""
    batch = data[0]
    if not isinstance(batch.inputs, Tensor) or not isinstance(batch.labels, Tensor) or batch.n < 2:
        return []
    half = batch.n // 2
    cut = half * (len(batch.labels) // batch.n)  # a sample may have several labels
    try:
        a = float(loss_fn(forward(network, batch.inputs[:half]), batch.labels[:cut]))
        b = float(loss_fn(forward(network, batch.inputs[half:]), batch.labels[cut:]))
    except Exception as error:  # a network or loss that is made for one batch size
        logger.debug("Half a batch could not be tried: %s", error)
        return []
    mean = (a * half + b * (batch.n - half)) / batch.n
    if abs(a + b - loss) < 1e-4 * abs(loss) and abs(mean - loss) > 1e-2 * abs(loss):
        return [
            "The loss function seems to sum over the batch; scores assume its mean "
            "(reduction='mean'), so their size depends on the batch size here."
        ]
    return []
