"""Gauss-Newton scores: the loss rise told by how much a candidate moves the network's outputs.

With outputs z of the float network and Δz of a candidate, ½ Δzᵀ H_z Δz is the loss rise to second
order, H_z being the Hessian of the loss in the outputs. One forward pass gives Δz with everything
in it that sums over layers leave out: how errors of several layers add up or cancel, and how later
layers damp them.

For cross-entropy H_z = diag(p) − p pᵀ, with the probabilities p of the float network. A network
that is sure of almost every calibration image has p near 0 or 1 there and so no curvature at all,
and the score would hang on a handful of images. The probabilities are therefore softened,
p = softmax(z / T), as in distillation (Hinton et al., 2015), and the result is scaled back by one
factor for all candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hq_optuna.network.batches import Batch
from hq_optuna.network.losses import Places, is_cross_entropy, is_squared_error

TEMPERATURE = 3.0
"""The one of 1, 2, 3 and 4 whose scores rank unseen images best (docs/results/scores.md)."""

UNKNOWN_LOSS = (
    "The scorer is 'diagonal', a sum over layers, because nothing is known of this loss; "
    "'gauss_newton', which ranks better, knows cross-entropy and squared error. If it is one of "
    "them, give torch.nn.functional.cross_entropy or mse_loss itself as the loss and no function "
    "around it (in a study file: loss = torch.nn.functional.cross_entropy); else give output_rise, "
    "or say scorer 'diagonal'."
)
"""Said where the scorer was not chosen and the loss is none that `output_rise_of` knows."""

OutputRise = Callable[[Any, Any], Tensor]
"""From outputs of the float network and of a candidate to the loss rise, summed over samples."""


@dataclass(frozen=True, eq=False)
class CrossEntropyRise:
    """½ Δzᵀ (diag(p) − p pᵀ) Δz summed over samples, nats, with p = softmax(z / T).

    Where there are further axes (pixels), their mean counts, as in cross-entropy's own mean. The
    result is multiplied by ``scale``, see `calibrated`.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> CrossEntropyRise()(z, z + torch.tensor([[0.2, 0.0]]))  # ½ · ¼ · 0.2²
        tensor(0.0050, dtype=torch.float64)
    """

    temperature: float = TEMPERATURE
    scale: float = 1.0
    places: Places = field(default_factory=Places)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0; got {self.temperature}.")

    def __call__(self, outputs: Tensor, moved: Tensor, labels: Any = None) -> Tensor:
        """Return the rise from class scores ``(N, C, …)`` of the float network and a candidate."""
        p = torch.softmax(outputs.double() / self.temperature, 1)
        # A class that is masked by −inf has no probability, wherever it moves.
        change = torch.where(p > 0, moved.double() - outputs.double(), 0.0)
        centred = change - (p * change).sum(1, keepdim=True)
        per_place = 0.5 * (p * centred.square()).sum(1)  # (N, …)
        per_place = self.places.applied(per_place, outputs, labels)
        return self.scale * per_place.reshape(len(per_place), -1).mean(1).sum()

    def calibrated(
        self, outputs: Sequence[Tensor], batches: Sequence[Batch] | None = None
    ) -> CrossEntropyRise:
        """Return the rise with the mean curvature that the unsoftened network has.

        Softening raises curvature everywhere. One factor, the same for all candidates, takes that
        back, so that rises are in nats and ranks stay as they are. Without the ``batches`` whose
        outputs these are, all counts alike.
        """
        told = [(None, 1.0)] * len(outputs)
        if batches is not None:
            told = [(batch.labels, batch.share) for batch in batches]

        def curvature(temperature: float) -> float:
            return math.fsum(
                len(z) * share * self.places.curvature(z, labels, temperature)
                for z, (labels, share) in zip(outputs, told, strict=True)
                if share
            )

        softened = curvature(self.temperature)
        scale = curvature(1.0) / softened if softened > 0 else 1.0
        # A network sure of every image has no curvature of its own to scale to.
        return CrossEntropyRise(self.temperature, scale if scale > 0 else 1.0, self.places)


def squared_error_rise(outputs: Tensor, moved: Tensor) -> Tensor:
    """Return the mean of Δz² over a sample's elements, summed over samples.

    The Hessian of the mean squared error is constant, so this is exact in second order.
    """
    change = (moved.double() - outputs.double()).square()
    return change.reshape(len(change), -1).mean(1).sum()


def output_rise_of(loss_fn: Any) -> OutputRise | None:
    """Return the Gauss-Newton rise of a loss, or ``None`` for a loss that is not known here."""
    if is_cross_entropy(loss_fn):
        return CrossEntropyRise(places=Places.of(loss_fn))
    if is_squared_error(loss_fn):
        return squared_error_rise
    return None
