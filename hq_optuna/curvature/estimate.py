"""What every estimator of curvature returns, and its mean per layer with a standard error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class InputCurvature:
    """Curvature in one call's input, per sample.

    ``total`` sums over samples and elements, for example of (∂ℓᵢ/∂xᵢⱼ)², ``count`` terms.
    ``per_element`` sums over samples alone, ``(elements,)``; it is ``None`` where inputs differ in
    size, have no axis of samples, or only the total is known.
    """

    total: float = 0.0
    count: int = 0
    n_samples: int = 0
    per_element: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean over samples and elements."""
        return self.total / max(self.count, 1)

    def add(self, gradient: Tensor, n: int) -> float:
        """Take in the per-sample gradients of a batch of ``n`` samples; return the mean square."""
        return self.add_curvature(gradient.detach().double().square_(), n)

    def add_curvature(self, values: Tensor, n: int) -> float:
        """Take in the curvature of each element of a batch of ``n`` samples; return the mean."""
        first = self.count == 0
        total = float(values.sum())
        self.total += total
        self.count += values.numel()
        self.n_samples += n
        rows = per_sample(values, n)
        if rows is None or (not first and self.per_element is None):
            self.per_element = None
        elif self.per_element is None:
            self.per_element = rows.sum(0)
        elif self.per_element.shape == rows.shape[1:]:
            self.per_element += rows.sum(0)
        else:
            self.per_element = None
        return total / max(values.numel(), 1)


def per_sample(x: Tensor, n: int) -> Tensor | None:
    """Return ``x`` as ``(n, elements)``, or ``None`` where its first axis is not of samples.

    A layer may see the samples' positions flattened into the first axis, as ``(n · T, D)``.
    """
    return x.reshape(n, -1) if x.dim() > 0 and x.shape[0] % n == 0 else None


@dataclass(frozen=True)
class Curvature:
    """Curvature of every layer, from ``n_samples`` samples.

    Attributes:
        weights: Layer → h, the weight's shape, loss per weight².
        inputs: Layer → one entry per call of a forward pass.
        batch_size: The factor B in h = B · v̂, where the estimate needs it.
        no_gradient: Layers whose weight got no gradient at all, or zeros alone.
        unreached: Layers of which a call got no gradient in its input (it ran without gradients,
            or what it returned was detached) → layers called before it, from which a gradient may
            have been lost there.
        errors: Layer → standard errors of the mean curvature of its weights and of its inputs,
            relative to these means, without what all layers have in common (`MeanCurvatures`).
    """

    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Sequence[InputCurvature]]
    batch_size: int
    n_samples: int
    no_gradient: tuple[str, ...]
    unreached: Mapping[str, frozenset[str]] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def with_weights(self, known: Mapping[str, Tensor]) -> Curvature:
        """Return the same with what is known of weights from elsewhere, by layer."""
        weights = {n: known[n].to(h) if n in known else h for n, h in self.weights.items()}
        gone = tuple(name for name in self.no_gradient if name not in known)
        return dataclasses.replace(self, weights=weights, no_gradient=gone)

    @property
    def unknown(self) -> frozenset[str]:
        """Layers whose curvature is not known, and not known to be zero."""
        return frozenset((*self.no_gradient, *self.unreached))

    @property
    def largest_error(self) -> float:
        """The largest of `errors`; infinite where there are none."""
        return max((e for pair in self.errors.values() for e in pair), default=float("inf"))


class MeanCurvatures:
    """Mean curvature of each layer's weights and inputs, measurement by measurement.

    A measurement is a batch, or a probe. Some see more curvature than others, in all layers alike:
    images that the network is unsure of. That scales every score by the same factor and moves no
    rank. With r the values of one measurement over their means over all measurements, the standard
    error of a value is therefore that of r − m, m being the median of r over the layers. Weights
    and inputs have an m of their own each: the two kinds are exact to different degrees.

    Example:
        >>> means = MeanCurvatures()
        >>> for scale in (1.0, 3.0):  # the layers keep their proportion
        ...     means.add({"a": (2 * scale, scale), "b": (scale, 2 * scale)})
        >>> means.errors()
        {'a': (0.0, 0.0), 'b': (0.0, 0.0)}
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, tuple[float, float]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Mapping[str, tuple[float, float]]) -> None:
        """Take in one measurement: layer → mean curvature of weights and of inputs."""
        self._rows.append(dict(row))

    def means(self) -> dict[str, tuple[float, float]]:
        """Return layer → means over the measurements."""
        return self._by_layer(self._values().mean(0))

    def errors(self) -> dict[str, tuple[float, float]]:
        """Return layer → relative standard errors; infinite below two measurements.

        A layer without curvature has an error of 0: more data will not change its rank.
        """
        values = self._values()  # (K, L, 2)
        k = len(values)
        if k < 2:
            return dict.fromkeys(self._names, (float("inf"), float("inf")))
        means = values.mean(0)
        relative = torch.where(means != 0, values / means, torch.ones_like(values))
        apart = relative - relative.quantile(0.5, 1, keepdim=True)
        return self._by_layer(apart.std(0) / k**0.5)

    def unsure(self) -> dict[str, tuple[float | None, float | None]]:
        """Return layer → standard errors of the means that are not above their own, else ``None``.

        These errors are absolute, with what all layers have in common.
        """
        values = self._values()
        means = values.mean(0)
        within = values.std(0) / len(values) ** 0.5 if len(values) > 1 else means.abs()
        return {
            name: (None if m[0] > e[0] else float(e[0]), None if m[1] > e[1] else float(e[1]))
            for name, m, e in zip(self._names, means, within, strict=True)
        }

    def settled(self, tolerance: float) -> bool:
        """Return whether no standard error is above ``tolerance``, after four measurements."""
        if len(self) < MIN_MEASUREMENTS:
            return False
        return max(e for pair in self.errors().values() for e in pair) <= tolerance

    def _by_layer(self, values: Tensor) -> dict[str, tuple[float, float]]:
        pairs = zip(self._names, values.tolist(), strict=True)
        return {name: (weights, inputs) for name, (weights, inputs) in pairs}

    @property
    def _names(self) -> list[str]:
        return list(self._rows[0]) if self._rows else []

    def _values(self) -> Tensor:
        rows = [[row[name] for name in self._names] for row in self._rows]
        values = torch.tensor(rows, dtype=torch.float64, device="cpu")
        return values.reshape(len(rows), len(self._names), 2)


MIN_MEASUREMENTS = 4
"""Below this a standard error is not known well enough to stop on it."""

TOLERANCE = 0.1
"""Standard error, relative to a layer's curvature, at which measuring stops.

One bit fewer makes a rise about four times as large, so 10 % are a fifteenth of a notch.
"""
