"""Measure a network on data the search did not read, by accuracy or by the field's own metric.

Two networks that were measured on the same samples are compared sample by sample. Where a metric
is a mean, the interval of the difference is Student's, of the paired differences. Where it is not
(average precision, mean intersection over union, a rank correlation), samples are drawn anew with
replacement, the same ones for both networks, and the middle 95 % of the differences are the
interval (Efron 1979, the percentile bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches, FloatOutputs, forward
from hq_optuna.network.checks import check_batch_loss, check_labels, explain_errors
from hq_optuna.network.copies import copied
from hq_optuna.network.loss_weights import batch_loss, only_class_axis, watched
from hq_optuna.network.losses import LossFunction, ignored_label, is_cross_entropy

Evaluate = Callable[[nn.Module, Batches], Mapping[str, float]]


@dataclass(frozen=True)
class Accuracy:
    """Measures ``{"accuracy": share of right classes}``, or nothing where there are no classes.

    Which scores belong to which labels, and which labels are ignored, is what the loss itself
    compares: its one cross-entropy, whatever it flattens, transposes or shifts before. Of a loss
    that computes none only plain classes are understood: outputs ``(N, C, …)`` or ``(N, …, C)``
    with labels ``(N, …)`` from 0 to C − 1, where only one axis can be that of the classes.
    """

    loss_fn: LossFunction = functional.cross_entropy

    @torch.no_grad()
    def __call__(self, network: nn.Module, data: Batches) -> dict[str, float]:
        """Measure a network on data; ignored labels do not count."""
        n_right = total = 0
        for batch in data:
            right = self.right(forward(network, batch.inputs), batch.labels)
            if right is None:
                return {}
            n_right += int(right.sum())
            total += right.numel()
        return {"accuracy": n_right / total} if total else {}

    @torch.no_grad()
    def of_samples(self, network: nn.Module, data: Batches) -> Tensor | None:
        """Return for each sample that counts whether its class is right, shape ``(N,)``.

        ``None`` unless there is one class a sample (classes of pixels are not independent).
        """
        found = []
        for batch in data:
            classes = self._classes(forward(network, batch.inputs), batch.labels)
            if classes is None or classes[1].shape != (batch.n,):
                return None
            found.append(_right(*classes).cpu())
        return torch.cat(found) if found and sum(map(len, found)) else None

    def right(self, outputs: Any, labels: Any) -> Tensor | None:
        """Return whether each class that counts is right, ``None`` where there are no classes."""
        classes = self._classes(outputs, labels)
        return None if classes is None else _right(*classes)

    def _classes(self, outputs: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return scores with their classes along axis 1, labels, and which of them count."""
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        _, seen = watched(self.loss_fn, outputs, labels)
        if len(seen) == 1:
            scores, told, counts = seen[0].scores, seen[0].labels, seen[0].counts
        else:
            axis = only_class_axis(outputs, labels)
            if axis is None or bool(((labels < 0) | (labels >= outputs.shape[axis])).any()):
                return None
            scores, told, counts = outputs.movedim(axis, 1), labels, torch.ones_like(labels) > 0
        return None if scores.shape[1] == 1 else (scores, told, counts)  # the argmax of one is 0


CONFIDENCE = 0.95
RESAMPLES = 200
"""Draws of the bootstrap: the ends of its interval are known to a tenth of its width."""


class Metric:
    """What a network is worth, measured on validation and test data; given as ``evaluate``.

    Args:
        figure: With ``per_sample`` the number from a list of records, one of each sample; ``None``:
            their mean. Without it the number from (network, batches).
        name: For people and for the record: ``"PSNR"``.
        unit: Shown behind values, ``"dB"``, ``"%"``; values are shown as they are.
        higher_is_better: The direction.
        per_sample: From (network, batches) a record of each sample: a number, or whatever
            ``figure`` reads. With it differences have intervals.

    Example:
        >>> metric = Metric(name="error", higher_is_better=False, per_sample=lambda net, data: [])
        >>> metric.of([1.0, 3.0])
        2.0
    """

    def __init__(
        self,
        figure: Callable[..., float] | None = None,
        *,
        name: str,
        unit: str = "",
        higher_is_better: bool = True,
        per_sample: Callable[[nn.Module, Batches], Sequence[Any]] | None = None,
    ) -> None:
        if figure is None and per_sample is None:
            raise ValueError("A metric needs figure, per_sample, or both; got neither.")
        if not name or name == "loss" or name.endswith(("_before", "_after")):
            raise ValueError(f"name is that of the metric, and not that of a fact; got {name!r}.")
        self.figure, self.per_sample = figure, per_sample
        self.name, self.unit, self.higher_is_better = name, unit, higher_is_better

    def said(self) -> dict[str, Any]:
        """Return name, unit and direction as JSON data."""
        return {"name": self.name, "unit": self.unit, "higher_is_better": self.higher_is_better}

    def records(self, network: nn.Module, data: Batches) -> list[Any] | None:
        """Return a record of each sample; ``None`` where the metric has none.

        Raises `DataError` where there are more or fewer than samples.
        """
        if self.per_sample is None:
            return None
        found = self.per_sample(network, data)
        records = found.tolist() if isinstance(found, Tensor) else list(found)
        if len(records) != data.n_samples:
            raise DataError(
                f"per_sample of the metric {self.name!r} returns {len(records)} records of "
                f"{data.n_samples} samples. Return one of each, in their order."
            )
        return records

    def of(self, records: Sequence[Any]) -> float:
        """Return the number from records."""
        if self.figure is not None:
            return float(self.figure(records))
        return math.fsum(float(record) for record in records) / len(records)

    def __call__(self, network: nn.Module, data: Batches) -> dict[str, float]:
        """Return ``{name: number}``."""
        records = self.records(network, data)
        if records is None:
            assert self.figure is not None
            return {self.name: float(self.figure(network, data))}
        return {self.name: self.of(records)}

    def difference(self, first: Sequence[Any], second: Sequence[Any]) -> dict[str, float]:
        """Return second − first with the ends of its interval, from records of the same samples."""
        low, high = self._interval(first, second)
        return {"value": self.of(second) - self.of(first), "low": low, "high": high}

    def _interval(self, first: Sequence[Any], second: Sequence[Any]) -> tuple[float, float]:
        n = len(first)
        if n < 2:
            return -math.inf, math.inf
        if self.figure is None:
            from scipy.stats import t  # takes longer to import than a metric to compute

            changes = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
            half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * changes.std(ddof=1) / math.sqrt(n))
            return float(changes.mean()) - half, float(changes.mean()) + half
        chance = np.random.default_rng(0)
        found = []
        for _ in range(RESAMPLES):
            drawn = chance.integers(0, n, n)
            found.append(self.of([second[i] for i in drawn]) - self.of([first[i] for i in drawn]))
        low, high = np.nanquantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def _right(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    return (scores.argmax(1) == labels)[counts]


@torch.no_grad()
def measured_figures(evaluate: Evaluate, network: nn.Module, data: Batches) -> dict[str, float]:
    """Return what ``evaluate`` measures, without gradients."""
    return {name: float(value) for name, value in evaluate(network, data).items()}


def is_validation_fact(fact: str) -> bool:
    """Return whether a study's fact of this name was measured on validation data."""
    ends = ("samples", "lost", "gained", "metric")
    own = fact in [f"validation_{end}" for end in ends]
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
        check_batch_loss(loss_fn, outputs, data[0].labels, 0, "validation")
    if not isinstance(evaluate, Accuracy):
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
def mean_loss(network: nn.Module, data: Batches, loss_fn: LossFunction) -> dict[str, float]:
    """Return ``{"loss": mean over all that counts}``; see `hq_optuna.network.loss_weights`.

    Nothing where the loss compares with the float network's outputs, and the data have labels.
    """
    if getattr(loss_fn, "of_float_outputs", False):
        told = (b.labels for b in data)
        if not all(isinstance(y, FloatOutputs) and y.outputs is not None for y in told):
            return {}
    outputs = (forward(network, batch.inputs) for batch in data)
    losses = [float(batch_loss(loss_fn, z, b)) * b.n for z, b in zip(outputs, data, strict=True)]
    return {"loss": math.fsum(losses) / data.n_samples}


def before_and_after(
    evaluate: Evaluate, model: nn.Module, network: nn.Module, data: Batches, what: str
) -> dict[str, Any]:
    """Measure the float and the quantized network on the same data, which ``what`` names.

    Returns ``{"<what>_samples": …, "accuracy_before": …, "accuracy_after": …}``; names of figures
    begin with ``what`` unless it is ``"validation"``. With `Accuracy` and one class a sample there
    are also ``<what>_lost`` and ``<what>_gained``: samples that only the float network, or only the
    quantized one, gets right. With a `Metric` there is ``<what>_metric``: its name, unit and
    direction, and the difference after − before with its interval, where samples have records.
    """
    facts: dict[str, Any] = {f"{what}_samples": data.n_samples}
    prefix = "" if what == "validation" else f"{what}_"
    original = copied(model)
    with _explained_on(what):
        if isinstance(evaluate, Accuracy):
            before, after = (evaluate.of_samples(net, data) for net in (original, network))
            if before is not None and after is not None:
                facts[f"{what}_samples"] = len(before)
                facts[f"{prefix}accuracy_before"] = share_correct(before)
                facts[f"{prefix}accuracy_after"] = share_correct(after)
                facts[f"{what}_lost"] = int((before & ~after).sum())
                facts[f"{what}_gained"] = int((after & ~before).sum())
                return facts
        if isinstance(evaluate, Metric):
            return facts | _of_metric(evaluate, (original, network), data, prefix, what)
        for when, measured in (("before", original), ("after", network)):
            for name, value in measured_figures(evaluate, measured, data).items():
                facts[f"{prefix}{name}_{when}"] = value
    return facts


@torch.no_grad()
def _of_metric(
    metric: Metric, pair: tuple[nn.Module, nn.Module], data: Batches, prefix: str, what: str
) -> dict[str, Any]:
    """Return the metric's facts of the float network and of the quantized one."""
    said = metric.said()
    found = [metric.records(network, data) for network in pair]
    if found[0] is None or found[1] is None:
        values = [metric(network, data)[metric.name] for network in pair]
    else:
        values = [metric.of(records) for records in found if records is not None]
        said["difference"] = metric.difference(found[0], found[1])
    names = (f"{prefix}{metric.name}_before", f"{prefix}{metric.name}_after")
    return {**dict(zip(names, values, strict=True)), f"{what}_metric": said}


def share_correct(correct: Tensor) -> float:
    """Return the accuracy from `Accuracy.of_samples`."""
    return int(correct.sum()) / len(correct)
