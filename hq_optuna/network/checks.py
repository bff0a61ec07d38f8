"""Checks before a search: a network, data or loss that cannot be searched is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.errors import DataError, HqOptunaError, NetworkError
from hq_optuna.network.batches import Batches, cloned, forward
from hq_optuna.network.containers import clone, same, strided, tensors
from hq_optuna.network.copies import check_copy, copied, outputs_of_copy, preserve_network
from hq_optuna.network.devices import device_of, preserve_rng_state
from hq_optuna.network.loss_weights import ObservedLoss, observe_loss, weighed
from hq_optuna.network.losses import IGNORED_LABEL, LossFunction, ignored_label, is_cross_entropy


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
def check_forward(
    network: nn.Module, data: Batches, loss_fn: LossFunction, layers: Sequence[str] = ()
) -> list[str]:
    """Refuse what would make scores wrong or unrepeatable, from three passes of one batch.

    Calls a copy in eval mode, and proves that the weights of ``layers`` act there. Returns
    warnings, a sentence each, about what is possible but doubtful.

    Raises:
        NetworkError: Two passes differ (dropout left on), outputs are NaN or infinite, or the
            network writes into its input or cannot be copied, or not so that the copy computes
            with its own weights.
        DataError: As `LookOver.see`, of the first batch.
    """
    with preserve_rng_state({device_of(network)}):
        return _checked(network, data, loss_fn, layers)


def _checked(
    network: nn.Module, data: Batches, loss_fn: LossFunction, layers: Sequence[str]
) -> list[str]:
    called = copied(network)
    for name, value in called.state_dict().items():
        if not isinstance(value, Tensor):
            raise NetworkError(
                f"The network's state holds {name!r}, a {type(value).__name__} and no tensor "
                "(get_extra_state), which neither a result nor a checkpoint can hold."
            )
    outputs, warnings = _repeatable_outputs(network, called, layers, data)
    LookOver(data, loss_fn).see(0, outputs)
    return warnings


class LookOver:
    """Checks the outputs and losses of all batches, and learns how much each batch counts."""

    def __init__(self, data: Batches, loss_fn: LossFunction) -> None:
        self.data, self.loss_fn = data, loss_fn
        self._observed: list[ObservedLoss] = []

    @torch.no_grad()
    def see(self, index: int, outputs: Any) -> None:
        """Take in the float network's outputs on a batch.

        Raises:
            NetworkError: They hold NaN, or an infinity that counts.
            DataError: Labels out of range, a loss that is not one finite number or is another each
                time, or cross-entropy of outputs or labels that are no classes.
        """
        labels = self.data[index].labels
        if is_cross_entropy(self.loss_fn):
            check_class_scores(outputs)
            check_labels(outputs, labels, ignored_label(self.loss_fn))
            check_probabilities(outputs, labels)
        self._observed.append(check_batch_loss(self.loss_fn, outputs, labels, index))

    def weighed(self) -> Batches:
        """Return the data, all of which were seen, each batch with its share in the mean loss."""
        return Batches(weighed(self.data, self.loss_fn, self._observed), is_looked_over=True)


@torch.no_grad()
def look_over(network: nn.Module, data: Batches, loss_fn: LossFunction) -> Batches:
    """Return the data with shares, after a pass of a copy over all of them; see `LookOver`."""
    look, called = LookOver(data, loss_fn), copied(network)
    for index, batch in enumerate(data):
        kept = preserve_rng_state({device_of(network)})
        said = explain_errors(
            f"The network fails on calibration batch {index}, and not on the first",
            "Batches are to be alike in types and shapes.",
        )
        with kept, said:
            outputs = forward(called, cloned(batch.inputs))
        look.see(index, outputs)
    return look.weighed()


def _repeatable_outputs(
    original: nn.Module, network: nn.Module, layers: Sequence[str], data: Batches
) -> tuple[Any, list[str]]:
    """Return a copy's outputs on the first batch, and warnings of the copy.

    A second pass must repeat them after another batch, which may have left something behind.
    """
    inputs = data[0].inputs
    before = [(t, clone(t), _version(t)) for t in tensors(inputs)]
    first = outputs_of_copy(original, network, inputs)
    _check_inputs_kept(before)
    with explain_errors(
        "The network fails on the last calibration batch, and not on the first",
        "Batches are to be alike in types and shapes.",
    ):
        others = [batch.inputs for batch in reversed(data[-MOST_TRIED:])]
        warnings = check_copy(original, network, layers, others)
    pair = list(tensors(first)), list(tensors(forward(network, inputs)))
    if len(pair[0]) != len(pair[1]):
        raise NetworkError(
            "Two forward passes of the same images in eval mode return different numbers of "
            "tensors. Scores must be repeatable; make eval mode deterministic."
        )
    for a, b in zip(*pair, strict=True):
        if not same(a, b):
            raise NetworkError(
                "Two forward passes of the same images in eval mode differ: the network is random "
                "(dropout with training=True, random augmentation inside forward?), or remembers "
                "what it saw (a buffer that forward updates and uses?). "
                "Scores must be repeatable; make eval mode deterministic."
            )
    return first, warnings


MOST_TRIED = 8
"""Batches that are run at most until each layer was called once."""


def check_batch_loss(
    loss_fn: LossFunction, outputs: Any, labels: Any, index: int, what: str = "calibration"
) -> ObservedLoss:
    """Return the loss of a batch; refuse one that is not one finite number, the same each time.

    A batch of which nothing counts, as its labels are all ignored, passes where that is seen. An
    infinity in the outputs, such as the score of a masked class, is refused where the loss is then
    not finite, and NaN always.

    Args:
        loss_fn: The loss.
        outputs: Those of the network on the batch, in float.
        labels: The batch's labels.
        index: The batch's place among all, from 0.
        what: Which data these are.

    Raises:
        NetworkError: The outputs hold NaN, or an infinity that counts.
        DataError: Anything else.
    """
    where = f"{what} batch {index}" if index else f"the first {what} batch"
    bad = _first_of(outputs, torch.isnan)
    if bad is None:
        first, again = _computed_twice(loss_fn, outputs, labels, where)
        if first.call is not None and not first.weight:
            return first
        loss = float(first.loss)
        if not math.isfinite(loss):
            bad = _first_of(outputs, lambda x: ~torch.isfinite(x))
    if bad is not None:
        raise NetworkError(
            f"The network's outputs on the {what} data hold NaN or infinity (batch {index}{bad}). "
            "Check the checkpoint and the normalization of the inputs."
        )
    if not math.isfinite(loss):
        raise DataError(
            f"The loss on {where} is {loss}. Check labels and outputs. A mean over no label at "
            "all, where all are ignored, is NaN: leave such a batch out, or return 0 for it."
        )
    rough = 1e-5 if first.loss.is_cuda else 0.0  # some sums on GPUs have no fixed order
    if not math.isclose(loss, float(again.loss), rel_tol=rough):
        raise DataError(
            f"The loss on {where} differs when computed twice: {loss!r}, then "
            f"{float(again.loss)!r}. The loss function draws random numbers, or remembers what it "
            "saw. Scores must be repeatable: give it a fixed seed, or eval mode (loss.eval())."
        )
    return first


def _computed_twice(
    loss_fn: LossFunction, outputs: Any, labels: Any, where: str
) -> tuple[ObservedLoss, ObservedLoss]:
    """Return a batch's loss from two calls, which leave nothing behind."""
    owner = preserve_network(loss_fn) if isinstance(loss_fn, nn.Module) else nullcontext()
    devices = {tensor.device for tensor in tensors(outputs)}
    hint = "It is called with (outputs, labels)."
    said = explain_errors(f"The loss function failed on {where}", hint)
    with said, owner, preserve_rng_state(devices), torch.no_grad():
        first, again = (observe_loss(loss_fn, outputs, labels) for _ in range(2))
    loss = first.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f"The loss function returns one number, the mean of a batch; got {shape}.")
    return first, again


def _first_of(tree: Any, bad: Callable[[Tensor], Tensor]) -> str | None:
    """Return which of a tree's tensors is bad somewhere, in words; ``None``: none."""
    all_of = list(tensors(tree))
    for place, tensor in enumerate(all_of, 1):
        if any(part.is_floating_point() and bool(bad(part).any()) for part in strided(tensor)):
            return f", tensor {place} of {len(all_of)}" if len(all_of) > 1 else ""
    return None


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
        if not same(tensor, values):
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
def check_rise(network: nn.Module, data: Batches, rise: Callable[..., Any]) -> None:
    """Refuse a rise that fails, or is not finite, on outputs that did not move."""
    with preserve_rng_state({device_of(network)}):
        outputs = forward(copied(network), data[0].inputs)
    with explain_errors(
        "rise failed on the first calibration batch",
        "It is called with (outputs, moved) and returns one number, summed over the samples.",
    ):
        found = float(rise(outputs, cloned(outputs)))
    if not math.isfinite(found):
        raise DataError(f"rise of outputs that did not move is {found}; it should be 0.")


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
