"""H̄, the mean over samples of the loss's Hessian in the outputs, and random vectors of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hq_optuna.curvature.sweep import signs
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.losses import LossFunction, Places, is_cross_entropy
from hq_optuna.scoring.outputs import TEMPERATURE


@dataclass(frozen=True, eq=False)
class OutputHessian:
    """A factor F of H̄ = F Fᵀ; ``None`` for the mean squared error, whose Hessian is constant.

    ``factor`` is ``(C, C)`` along axis 1 of the outputs, whose further axes count by their mean.
    """

    factor: Tensor | None
    places: Places = field(default_factory=Places)

    @classmethod
    def of(cls, loss_fn: LossFunction, outputs: Sequence[Tensor], data: Batches) -> OutputHessian:
        """Return that of a known loss, over the outputs of all batches.

        For cross-entropy of softened scores, scaled to the mean curvature of the unsoftened ones.
        """
        if not is_cross_entropy(loss_fn):
            return cls(None)
        places = Places.of(loss_fn)
        c = outputs[0].shape[1]
        diagonal = outputs[0].new_zeros(c, dtype=torch.float64)
        outer = outputs[0].new_zeros(c, c, dtype=torch.float64)
        total = own = 0.0
        for z, batch in zip(outputs, data, strict=True):
            weight = places.counted(z, batch.labels)
            p = (z.double() / TEMPERATURE).softmax(1).movedim(1, -1)
            w = torch.ones(p.shape[:-1]).to(p) if weight is None else weight.to(p)
            # Each sample counts by its share, however many places it has.
            w = (w * (batch.share * len(z) / w.numel())).reshape(-1)
            p = torch.where(w[:, None] > 0, p.reshape(-1, c), 0.0)
            diagonal += (w[:, None] * p).sum(0)
            outer += (p * w[:, None]).mT @ p
            total += len(z)
            own += len(z) * batch.share * places.curvature(z, batch.labels)
        mean = (torch.diag(diagonal) - outer) / total
        softened = float(mean.diagonal().sum())
        values, vectors = torch.linalg.eigh(mean)
        scale = own / total / softened if own > 0 and softened > 0 else 1.0
        return cls(vectors * (values.clamp_min(0) * scale).sqrt(), places)

    def draw(self, z: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return u of the outputs' shape, whose covariance is H̄ for each sample."""
        r = signs(z, generator)
        if self.factor is None:
            return r * math.sqrt(2 / z[0].numel())
        u = (r.movedim(1, -1).double() @ self.factor.mT).movedim(-1, 1)
        counted = self.places.counted(z, batch.labels)
        if counted is not None:
            u = torch.where(counted.unsqueeze(1) != 0, u * counted.sqrt().unsqueeze(1), 0.0)
        return (u * math.sqrt(batch.share / z[0, 0].numel())).to(z.dtype)

    def rises(self, z: Tensor, moved: Tensor, batch: Batch) -> Tensor:
        """Return ½ Δzᵀ H̄ Δz of each sample, ``(n,)`` float64, from outputs before and after."""
        change = moved.double() - z.double()
        if self.factor is None:
            # A sample may have several rows of outputs, such as its tokens.
            return change.square().reshape(batch.n, -1).mean(1)
        change = torch.where(z.isfinite() & moved.isfinite(), change, 0.0)
        per_place = 0.5 * (change.movedim(1, -1) @ self.factor).square().sum(-1)
        counted = self.places.counted(z, batch.labels)
        if counted is not None:
            per_place = torch.where(counted != 0, per_place * counted, 0.0)
        return batch.share * per_place.reshape(batch.n, -1).mean(1)
