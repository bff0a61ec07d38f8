"""Measure a network on data the search did not read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches, cloned, forward
from hq_optuna.network.checks import check_labels, explain_errors
from hq_optuna.network.copies import copied
from hq_optuna.network.losses import LossFunction, ignored_label, is_cross_entropy

Evaluate = Callable[[nn.Module, Batches], Mapping[str, float]]


def _right_classes(outputs: Any, labels: Any) -> Tensor | None:
    """Return which classes are right, of the labels' shape; ``None`` where there are no classes."""
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
        return None
    if labels.is_floating_point() or labels.dim() != outputs.dim() - 1:
        return None
    if outputs.shape[1] == 1:  # one logit: its argmax is always 0
        return None
    return outputs.argmax(1) == labels


@torch.no_grad()
def correct_predictions(network: nn.Module, data: Batches) -> Tensor | None:
    """Return for each sample whether its class is right, shape ``(N,)``.

    ``None`` unless there is one class a sample (classes of pixels are not independent).
    """
    found = []
    for batch in data:
        classes = _right_classes(forward(network, batch.inputs), batch.labels)
        if classes is None or classes.dim() != 1:
            return None
        found.append(classes.cpu())
    return torch.cat(found) if found else None


@torch.no_grad()
def measured_figures(evaluate: Evaluate, network: nn.Module, data: Batches) -> dict[str, float]:
    """Return what ``evaluate`` measures, without gradients."""
    return {name: float(value) for name, value in evaluate(network, data).items()}


def is_validation_fact(fact: str) -> bool:
    """Return whether a study's fact of this name was measured on validation data."""
    own = fact in ("validation_samples", "validation_lost", "validation_gained")
    return own or (fact.endswith(("_before", "_after")) and not fact.startswith("test_"))


def _explained_on(what: str) -> AbstractContextManager[None]:
    """Say of an error in the user's code that it came up on these data."""
    return explain_errors(
        f"The network cannot be measured on the {what} data",
        "They are to be as the calibration data: types, shapes, and labels.",
    )


def check_validation(
    evaluate: Evaluate, model: nn.Module, data: Batches, loss_fn: LossFunction
) -> None:
    """Compute loss and figures of the validation data before a search, and check all labels."""
    with _explained_on("validation"), torch.no_grad():
        outputs = forward(copied(model), data[0].inputs)
        if is_cross_entropy(loss_fn):
            for batch in data:
                check_labels(outputs, batch.labels, ignored_label(loss_fn), "validation")
        float(loss_fn(cloned(outputs), data[0].labels))
    if evaluate is not accuracy:
        check_evaluate(evaluate, model, data)


@torch.no_grad()
def check_evaluate(evaluate: Evaluate, model: nn.Module, data: Batches) -> None:
    """Call ``evaluate`` once before a search, so that it does not fail only when that is over.

    On the first batch, and on all of them only where that one alone cannot be measured. Refuses
    what is no numbers by name, and an accuracy in percent.
    """
    network = copied(model)
    for batches in (Batches(data[:1]), data):
        try:
            found = evaluate(network, batches)
            break
        except Exception as error:  # whatever the user's own code raises
            if batches is data:
                raise DataError(
                    f"evaluate fails on the validation data: {type(error).__name__}: {error}. It "
                    "is called with (network, batches); a batch has inputs, labels and n."
                ) from error
    try:
        for value in dict(found).values():
            float(value)
    except (TypeError, ValueError):
        raise DataError(
            f'evaluate returns numbers by name, such as {{"dice": 0.91}}; got {found!r:.80}.'
        ) from None
    given = float(dict(found).get("accuracy", 0.0))
    if given < 0 or given > 1:
        raise DataError(
            f"evaluate returns an accuracy of {given:g}; expected a share from 0 to 1. Divide "
            "percentages by 100, or give what is no accuracy another name."
        )


@torch.no_grad()
def accuracy(network: nn.Module, data: Batches) -> dict[str, float]:
    """Return ``{"accuracy": share of right classes}``, or nothing where there are no classes.

    Understands class scores ``(N, C, …)`` with integer labels ``(N, …)``.
    """
    n_right = total = 0
    for batch in data:
        classes = _right_classes(forward(network, batch.inputs), batch.labels)
        if classes is None:
            return {}
        n_right += int(classes.sum())
        total += classes.numel()
    return {"accuracy": n_right / total} if total else {}


@torch.no_grad()
def mean_loss(network: nn.Module, data: Batches, loss_fn: LossFunction) -> dict[str, float]:
    """Return ``{"loss": mean over the samples}``."""
    losses = [float(loss_fn(forward(network, b.inputs), b.labels)) * b.n for b in data]
    return {"loss": math.fsum(losses) / data.n_samples}


def before_and_after(
    evaluate: Evaluate, model: nn.Module, network: nn.Module, data: Batches, what: str
) -> dict[str, float]:
    """Measure the float and the quantized network on the same data, which ``what`` names.

    Returns ``{"<what>_samples": …, "accuracy_before": …, "accuracy_after": …}``; names of figures
    begin with ``what`` unless it is ``"validation"``. With `accuracy` and one class a sample there
    are also ``<what>_lost`` and ``<what>_gained``: samples that only the float network, or only the
    quantized one, gets right.
    """
    facts: dict[str, float] = {f"{what}_samples": data.n_samples}
    prefix = "" if what == "validation" else f"{what}_"
    original = copied(model)
    with _explained_on(what):
        if evaluate is accuracy:
            before, after = correct_predictions(original, data), correct_predictions(network, data)
            if before is not None and after is not None:
                facts[f"{prefix}accuracy_before"] = share_correct(before)
                facts[f"{prefix}accuracy_after"] = share_correct(after)
                facts[f"{what}_lost"] = int((before & ~after).sum())
                facts[f"{what}_gained"] = int((after & ~before).sum())
                return facts
        for when, measured in (("before", original), ("after", network)):
            for name, value in measured_figures(evaluate, measured, data).items():
                facts[f"{prefix}{name}_{when}"] = value
    return facts


def share_correct(correct: Tensor) -> float:
    """Return the accuracy from `correct_predictions`."""
    return int(correct.sum()) / len(correct)
