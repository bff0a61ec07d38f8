"""Fisher information: curvature from one backward sweep, stopped when the ranking is stable.

`output_curvature` is the diagonal of the Gauss-Newton matrix Jᵀ H_z J, with J the derivative of the
outputs z and H_z the Hessian of the loss in z. Labels are not needed: each sample draws a random
vector u with E[u uᵀ] = H_z, and uᵀz / n is differentiated like a mean loss. The u of different
samples are independent with mean 0, so the squared gradient of a batch of n, times n, has exactly
the expectation of the mean over samples of each sample's own: mini-batches cost no accuracy.

For cross-entropy H_z = diag(p) − p pᵀ = L Lᵀ with L = (1 − p 1ᵀ) diag(√p), and u = L r with random
signs r. Drawing labels from p instead has the same expectation, but where the network is sure
almost every draw is nearly 0, and a few are large: three times as many samples for the same
standard error on ResNet-20. As in `hq_optuna.rises` p is softened (T = 3), and one factor
scales the result back to the mean curvature of the unsoftened outputs, so that it is in nats.

In a network that is piecewise linear in each layer's weights and inputs (ReLU, batch-norm in eval
mode, max-pooling) the Gauss-Newton matrix of one layer *is* its Hessian, so at T = 1 this is what
`hutchinson` estimates, at the cost of a gradient.

Sources: Schraudolph 2002 (Gauss-Newton); Martens 2020 (Fisher = Gauss-Newton here); random signs
as in Hutchinson 1989.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hq_optuna.curvature.estimate import TOLERANCE, Curvature
from hq_optuna.curvature.sweep import SquaredGradients, differentiable
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.losses import Places, is_cross_entropy, is_squared_error
from hq_optuna.quantization.quantizers.base import in_single
from hq_optuna.rises.base import signs
from hq_optuna.space.layers import LayerSpec

TEMPERATURE = 3.0


class OutputProbe(Protocol):
    """Random vectors whose covariance is the Hessian of the loss in the outputs."""

    def draw(
        self, outputs: Tensor, generator: torch.Generator, labels: Any = None, share: float = 1.0
    ) -> Tensor:
        """Return u of the outputs' shape with E[u uᵀ] = H_z for each sample.

        Labels tell which places count, and ``share`` what a sample does (`Batch`).
        """

    def scale(self) -> float:
        """Return the factor that brings the curvature of all outputs seen to nats."""


@dataclass(eq=False)
class CrossEntropyProbe:
    """Draws u = L r for cross-entropy; further axes (pixels) count by their mean."""

    temperature: float = TEMPERATURE
    places: Places = field(default_factory=Places)
    _seen: list[tuple[float, float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0; got {self.temperature}.")

    def draw(
        self, outputs: Tensor, generator: torch.Generator, labels: Any = None, share: float = 1.0
    ) -> Tensor:
        """Return u for class scores ``(N, C, …)``."""
        z, n = outputs.detach().double(), len(outputs)
        soft, own = (self.places.curvature(z, labels, t) for t in (self.temperature, 1.0))
        self._seen.append((n, n * share, n * share * soft, n * share * own))
        p = torch.softmax(z / self.temperature, 1)
        root = p.sqrt() * signs(z, generator)
        u = root - p * root.sum(1, keepdim=True)
        counted = self.places.counted(z, labels)
        if counted is not None:
            u = torch.where(counted.unsqueeze(1) != 0, u * counted.sqrt().unsqueeze(1), 0.0)
        return (u * math.sqrt(share / z[0, 0].numel())).to(outputs.dtype)

    def scale(self) -> float:
        """Return the mean curvature of the unsoftened outputs over that of the softened ones.

        Both of what was seen: where that is not all data, their shares are not 1 on average.
        """
        if not self._seen:
            return 1.0
        n, counted, softened, own = (math.fsum(column) for column in zip(*self._seen, strict=True))
        # A network sure of every image has no curvature of its own to scale to.
        return (own / softened if own > 0 and softened > 0 else 1.0) * n / (counted or n)


class SquaredErrorProbe:
    """Draws u for the mean squared error: H_z = 2/d, with d the elements of a sample's output."""

    def draw(
        self, outputs: Tensor, generator: torch.Generator, labels: Any = None, share: float = 1.0
    ) -> Tensor:
        """Return random signs times √(2/d)."""
        return signs(outputs.detach(), generator) * math.sqrt(2 / outputs[0].numel())

    def scale(self) -> float:
        """Return 1: nothing was softened."""
        return 1.0


def probe_of(loss_fn: Any) -> OutputProbe | None:
    """Return the probe of a loss, or ``None`` for a loss that is not known here."""
    if is_cross_entropy(loss_fn):
        return CrossEntropyProbe(places=Places.of(loss_fn))
    if is_squared_error(loss_fn):
        return SquaredErrorProbe()
    return None


def output_curvature(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    probe: OutputProbe,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curvature:
    """Return the Gauss-Newton diagonal in weights and inputs, from as many batches as it takes.

    Batches are taken in a random order until no layer's relative standard error is above the
    tolerance (`MeanCurvatures`); the order is always the same, so the same data give the same stop
    and the same numbers. A tolerance of 0 reads all data. The network's output is one tensor
    ``(N, …)``; labels tell only which places count. ``progress`` is called with (batches done,
    batches); the last call may come early.
    """
    generator = torch.Generator().manual_seed(seed)

    def objective(outputs: Any, batch: Batch) -> Tensor:
        u = probe.draw(outputs, generator, batch.labels, batch.share)
        if len(outputs) != batch.n:  # several rows of outputs a sample, such as its tokens
            u = u * math.sqrt(batch.n / len(outputs))
        # Where u is 0 outputs may be −inf, the score of a masked class.
        loss: Tensor = (u * torch.where(u != 0, outputs, 0.0)).sum() / batch.n
        return loss

    found = squared_gradients(network, layers, data, objective, tolerance, progress)
    scale = probe.scale()
    for h in found.weights.values():
        h *= scale
    for entry in (entry for calls in found.inputs.values() for entry in calls):
        entry.total *= scale
        if entry.per_element is not None:
            entry.per_element *= scale
    return found


def squared_gradients(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    objective: Callable[[Any, Batch], Tensor],
    tolerance: float,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curvature:
    """Return the mean over batches of n times the squared gradient of each batch's objective."""
    sweep, seen = SquaredGradients(layers), 0
    with differentiable(network, layers, sweep.see) as (copied, weights):
        sums = {name: torch.zeros_like(in_single(weight)) for name, weight in weights.items()}
        for index, batch in enumerate(data.in_random_order()):
            sweep.run(copied, weights, batch, objective)
            seen += batch.n
            for name, weight in weights.items():
                if weight.grad is not None:
                    square = in_single(weight.grad).square()
                    sums[name] += square * batch.n**2  # n · ḡ², and weighted by n
            settled = tolerance > 0 and sweep.means.settled(tolerance)
            progress(len(data) if settled else index + 1, len(data))
            if settled:
                break
    means = {name: (total / seen).detach() for name, total in sums.items()}
    return sweep.curvature(means, data[0].n, seen)
