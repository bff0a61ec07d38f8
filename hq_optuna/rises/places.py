"""Rises of one tensor: places, each with its classes or features, count by their mean.

A leaf knows what one place costs, a row ``(C,)`` of numbers that belong together: classes, the
elements of an embedding, or one number alone. Samples lie along axis 0 of the tensor, what belongs
together along ``axis``, and all other axes are places of a sample. Costs are means over places.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from hq_optuna.network.batches import Batch
from hq_optuna.network.losses import Places
from hq_optuna.rises.base import Probe, Rise, Sums, only_tensor, root_of_mean, rows_of, signs

TEMPERATURE = 3.0
"""The one of 1, 2, 3 and 4 whose scores rank unseen images best (docs/results/scores.md)."""

MOST_CLASSES = 2048
"""Up to so many classes their mean Hessian is held as a matrix."""

TINY = 1e-6
"""Probabilities below this count as this: what a network in single precision can still tell."""


@dataclass(frozen=True, eq=False)
class OfPlaces(Rise):
    """A rise of one tensor, from what a place costs.

    Attributes:
        axis: Along which numbers belong together; ``None``: each stands for itself.
    """

    axis: int | None = None

    def view(self, outputs: Any) -> Tensor:
        """Return what is compared, made of the outputs in a way that has a gradient."""
        return only_tensor(outputs)

    def counted(self, z: Tensor, labels: Any) -> Tensor | None:
        """Return how much each place ``(N, …)`` counts, 1 on average; ``None``: all alike."""
        return None

    def sums(self, outputs: Any, batch: Batch, weights: Tensor | None = None) -> Sums:
        """Return nothing: most rises need to know nothing of all outputs."""
        return ()

    @abstractmethod
    def costs(self, z: Tensor, moved: Tensor) -> Tensor:
        """Return the cost of places, ``(M,)``, from rows ``(M, C)`` in float64."""

    @abstractmethod
    def draws(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return random u of rows ``(M, C)`` in float64, with the covariance of places' H̄."""

    def places(self, z: Tensor) -> Tensor:
        """Return a tensor as rows ``(places, C)``, those of a sample together."""
        if self.axis is None:
            return z.reshape(-1, 1)
        return z.movedim(self._axis(z), -1).reshape(-1, z.shape[self._axis(z)])

    def _axis(self, z: Tensor) -> int:
        assert self.axis is not None
        if not -z.dim() < self.axis < z.dim() or self.axis == 0:
            raise ValueError(
                f"The rise's axis {self.axis} is none of an output of shape {tuple(z.shape)}; "
                "axis 0 is that of samples."
            )
        return self.axis % z.dim()

    def _back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape of the tensor they were made of."""
        if self.axis is None:
            return rows.reshape(like.shape)
        axis = self._axis(like)
        shape = like.movedim(axis, -1).shape
        return rows.reshape(shape).movedim(-1, axis)

    def _weights(self, z: Tensor, labels: Any, weights: Tensor | None) -> Tensor | None:
        counted = self.counted(z, labels)
        flat = None if counted is None else counted.reshape(-1).double()
        if weights is None or flat is None:
            return weights if flat is None else flat
        return weights * flat

    def of_samples(
        self, outputs: Any, moved: Any, batch: Batch, weights: Tensor | None = None
    ) -> Tensor:
        """Return the mean cost of each sample's places, which ``weights`` weigh further."""
        z, other = self.view(outputs), self.view(moved)
        rows_of(z, batch.n)
        if z.shape != other.shape:
            raise ValueError(
                f"An output has the shape {tuple(z.shape)} in float and {tuple(other.shape)} "
                "rounded, so they cannot be compared. Return what the network computes before it "
                "selects: see hq_optuna.rises.At."
            )
        costs = self.costs(self.places(z.double()), self.places(other.double()))
        counts = self._weights(z, batch.labels, weights)
        if counts is not None:
            costs = torch.where(counts != 0, costs * counts, 0.0)
        return costs.reshape(batch.n, -1).mean(1)

    def draw(
        self,
        outputs: Any,
        batch: Batch,
        generator: torch.Generator,
        weights: Tensor | None = None,
    ) -> list[Probe]:
        """Return the tensor that is compared, with its random u."""
        view = self.view(outputs)
        rows_of(view, batch.n)
        z = self.places(view.detach().double())
        u = self.draws(z, generator)
        counts = self._weights(view.detach(), batch.labels, weights)
        share = torch.full((len(z),), batch.share, dtype=torch.float64, device=z.device)
        root = root_of_mean(share if counts is None else counts * batch.share, batch.n)
        u = torch.where(root[:, None] > 0, u * root[:, None], 0.0)
        return [Probe(view, self._back(u, view).to(view.dtype))]


@dataclass(frozen=True, eq=False)
class CrossEntropy(OfPlaces):
    """½ Δzᵀ (diag(p) − p pᵀ) Δz, nats: the KL divergence of classes to second order.

    A network that is sure of almost everything has p near 0 or 1 and so no curvature, and a score
    would hang on a handful of places. The probabilities are therefore softened, p = softmax(z / T),
    as in distillation (Hinton et al., 2015), and one factor for all candidates brings the mean
    curvature back to that of the unsoftened ones, once the rise is fitted.

    Args:
        axis: That of the classes.
        temperature: T, above 0.
        probabilities: Whether the outputs are probabilities, and not scores (logits).
        marks: Which places count, as a loss says; see `hq_optuna.network.losses.Places`.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> CrossEntropy()(z, z + torch.tensor([[0.2, 0.0]]))  # ½ · ¼ · 0.2²
        tensor(0.0050, dtype=torch.float64)
    """

    axis: int | None = 1
    temperature: float = TEMPERATURE
    probabilities: bool = False
    marks: Places = field(default_factory=Places)
    scale: float = 1.0
    factor: Tensor | None = None
    by_mean: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0; got {self.temperature}.")

    def view(self, outputs: Any) -> Tensor:
        """Return class scores; of probabilities their logarithms."""
        z = only_tensor(outputs)
        return z.clamp_min(TINY).log() if self.probabilities else z

    def counted(self, z: Tensor, labels: Any) -> Tensor | None:
        """Return the weight of places by their labels."""
        return self.marks.counted(z, labels) if self.axis == 1 else None

    def costs(self, z: Tensor, moved: Tensor) -> Tensor:
        """Return the quadratic form of each place's own Hessian, or of the mean one."""
        if self.by_mean and self.factor is not None:
            moves = torch.where(torch.isfinite(z) & torch.isfinite(moved), moved - z, 0.0)
            return 0.5 * (moves @ self.factor.to(z)).square().sum(1)
        p = torch.softmax(z / self.temperature, 1)
        # A class that is masked by −inf has no probability, wherever it moves.
        change = torch.where(p > 0, moved - z, 0.0)
        centred = change - (p * change).sum(1, keepdim=True)
        return 0.5 * self.scale * (p * centred.square()).sum(1)

    def averaged(self) -> Self:
        """Return the rise by the mean Hessian."""
        return replace(self, by_mean=True)

    def sums(self, outputs: Any, batch: Batch, weights: Tensor | None = None) -> Sums:
        """Return Σ diag(p), Σ p pᵀ, the samples, and both traces; the matrix for few classes."""
        view = self.view(outputs).detach()
        z, n = self.places(view.double()), rows_of(view, batch.n) * batch.n
        counts = self._weights(view, batch.labels, weights)
        w = z.new_ones(len(z)) if counts is None else counts.to(z)
        # Each sample counts by its share, however many places it has.
        w = w * (batch.share * n / max(len(w), 1))
        soft, own = (torch.softmax(z / t, 1) for t in (self.temperature, 1.0))
        soft, own = (torch.where(w[:, None] > 0, p, 0.0) for p in (soft, own))
        traces = [(w * (1 - p.square().sum(1))).sum() for p in (soft, own)]
        outer = z.new_zeros(0)
        if z.shape[1] <= MOST_CLASSES:
            outer = (soft * w[:, None]).mT @ soft
        return ((w[:, None] * soft).sum(0), outer, z.new_tensor(float(n)), *traces)

    def with_sums(self, sums: Sums) -> Self:
        """Return the rise with its scale, and with the factor of its mean Hessian."""
        if not sums:
            return self
        diagonal, outer, total, soft, own = sums
        # A network sure of every image has no curvature of its own to scale to.
        scale = float(own / soft) if float(own) > 0 and float(soft) > 0 else 1.0
        factor = None
        if outer.numel():
            values, vectors = torch.linalg.eigh((torch.diag(diagonal) - outer) / total)
            factor = vectors * (values.clamp_min(0) * scale).sqrt()
        return replace(self, scale=scale, factor=factor)

    def draws(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return u = F r with H̄ = F Fᵀ; of many classes each place takes another's Hessian.

        That has the same covariance, as the other place is a random one of the batch.
        """
        r = signs(z, generator)
        if self.factor is not None:
            return r @ self.factor.mT.to(r)
        order = torch.randperm(len(z), generator=generator, device="cpu").to(z.device)
        p = torch.softmax(z[order] / self.temperature, 1)
        root = p.sqrt() * r
        return (root - p * root.sum(1, keepdim=True)) * math.sqrt(self.scale)


@dataclass(frozen=True, eq=False)
class Binary(OfPlaces):
    """½ p (1 − p) Δz², nats: yes or no, each number by itself (objectness, several labels at once).

    Softened and scaled back as `CrossEntropy`.

    Args:
        probabilities: Whether the outputs are probabilities, and not scores (logits).
    """

    temperature: float = TEMPERATURE
    probabilities: bool = False
    scale: float = 1.0
    curvature: float | None = None

    def view(self, outputs: Any) -> Tensor:
        """Return scores; of probabilities their log odds."""
        z = only_tensor(outputs)
        return z.clamp(TINY, 1 - TINY).logit() if self.probabilities else z

    def _variance(self, z: Tensor, temperature: float) -> Tensor:
        p = torch.sigmoid(z / temperature)
        return p * (1 - p)

    def costs(self, z: Tensor, moved: Tensor) -> Tensor:
        """Return the quadratic form, a mean over the axis."""
        form = self._variance(z, self.temperature) * (moved - z).square()
        return 0.5 * self.scale * form.mean(1)

    def sums(self, outputs: Any, batch: Batch, weights: Tensor | None = None) -> Sums:
        """Return the sums of both variances, and how many there are; ``weights`` are not read."""
        z = self.places(self.view(outputs).detach().double())
        soft, own = (self._variance(z, t).sum() for t in (self.temperature, 1.0))
        return soft, own, z.new_tensor(float(z.numel()))

    def with_sums(self, sums: Sums) -> Self:
        """Return the rise with its scale and the mean curvature."""
        if not sums:
            return self
        soft, own, n = (float(value) for value in sums)
        scale = own / soft if own > 0 and soft > 0 else 1.0
        return replace(self, scale=scale, curvature=scale * soft / n)

    def draws(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return random signs times the root of the mean curvature."""
        h = self.curvature
        each = self.scale * self._variance(z, self.temperature) if h is None else z.new_tensor(h)
        return signs(z, generator) * (each / z.shape[1]).sqrt()


@dataclass(frozen=True, eq=False)
class SquaredError(OfPlaces):
    """The mean of Δz² over a sample's numbers, PyTorch's own mean squared error.

    With ``relative`` half of it, over the variance that the float network's output has itself: what
    fraction of the output is noise. That is the KL divergence of normal distributions, nats, and so
    it adds up over outputs of different units.

    Args:
        relative: Whether it is relative to the output's own variance.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> SquaredError()(z, z + 1)
        tensor(1., dtype=torch.float64)
        >>> rise = SquaredError(relative=True).fitted([z], [Batch((), None, 1)])
        >>> rise(z, z + 1)  # ½ · 1² / 1
        tensor(0.5000, dtype=torch.float64)
    """

    relative: bool = False
    unit: float = 1.0

    def sums(self, outputs: Any, batch: Batch, weights: Tensor | None = None) -> Sums:
        """Return Σ z, Σ z² and how many there are, weighed by place."""
        z = self.places(self.view(outputs).detach().double())
        z = torch.where(torch.isfinite(z), z, 0.0)
        w = z.new_ones(len(z), 1) if weights is None else weights[:, None].to(z)
        return (w * z).sum(), (w * z.square()).sum(), w.sum() * z.shape[1]

    def with_sums(self, sums: Sums) -> Self:
        """Return the rise with the unit that errors are measured in."""
        if not sums or not self.relative:
            return self
        total, square, n = (float(value) for value in sums)
        mean_square = square / max(n, 1)
        variance = mean_square - (total / max(n, 1)) ** 2
        # An output that is the same everywhere has no variance of its own.
        if variance <= 1e-12 * mean_square or variance <= 0:
            variance = mean_square or 1.0
        return replace(self, unit=1 / (2 * variance))

    def costs(self, z: Tensor, moved: Tensor) -> Tensor:
        """Return the mean squared change of a place."""
        return self.unit * (moved - z).square().mean(1)

    def draws(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return random signs, as the Hessian is constant."""
        return signs(z, generator) * math.sqrt(2 * self.unit / z.shape[1])


@dataclass(frozen=True, eq=False)
class Cosine(OfPlaces):
    """1 − cos(z, z + Δz): how far embeddings turn. To second order ½ ‖Δz⊥‖² / ‖z‖².

    Args:
        axis: That of the embedding's elements.
    """

    axis: int | None = 1

    def costs(self, z: Tensor, moved: Tensor) -> Tensor:
        """Return 1 − cos of each place, 0 where there is no direction."""
        a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-300) for x in (z, moved))
        # ½ ‖a − b‖² of unit vectors, which rounding leaves at 0 where nothing moves.
        turned = 0.5 * (a - b).square().sum(1)
        return torch.where((z.abs().amax(1) > 0) & (moved.abs().amax(1) > 0), turned, 0.0)

    def draws(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return random signs across each embedding's own direction, over its length."""
        length = z.norm(dim=1, keepdim=True)
        unit = z / length.clamp_min(1e-300)
        r = signs(z, generator)
        across = (r - unit * (unit * r).sum(1, keepdim=True)) / length.clamp_min(1e-300)
        return torch.where(length > 0, across, 0.0)
