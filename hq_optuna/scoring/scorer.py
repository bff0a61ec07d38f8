"""Scoring a candidate: its predicted loss rise, and one forward pass for its measured loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from hq_optuna.assignment import LayerBits
from hq_optuna.batches import Batches, forward
from hq_optuna.curvature.adam import LossFunction
from hq_optuna.errors import ScoreError
from hq_optuna.quantization.prepare import set_bits
from hq_optuna.scoring.sensitivity import Sensitivity


class Score(NamedTuple):
    """What is recorded of a candidate.

    Attributes:
        total: Weights' and activations' part together: what candidates are ranked by, nats.
        weights: The weights' part, nats.
        activations: The activations' part, nats.
        calibration_loss: Measured mean loss on the calibration set.
    """

    total: float
    weights: float
    activations: float
    calibration_loss: float


class Scorer:
    """Scores assignments of one prepared network.

    Args:
        prepared: The prepared network; scoring sets its bits.
        sensitivity: Predicted loss rises of the space's layers and bits.
        data: Calibration batches on the network's device.
        loss_fn: Mean loss of a batch from outputs and labels.
    """

    def __init__(
        self,
        prepared: nn.Module,
        sensitivity: Sensitivity,
        data: Batches,
        loss_fn: LossFunction,
    ) -> None:
        self.prepared = prepared
        self.sensitivity = sensitivity
        self.data = data
        self.loss_fn = loss_fn

    def score(self, config: Mapping[str, LayerBits]) -> Score:
        """Score an assignment with one forward pass over the calibration set. Nothing is trained.

        Raises:
            ScoreError: The predicted rise is NaN or infinite.
        """
        weights, activations = self.sensitivity.score(config)
        total = weights + activations
        if not math.isfinite(total):
            raise ScoreError(f"The score of an assignment is {total}; candidates cannot be ranked.")
        return Score(total, weights, activations, self.calibration_loss(config))

    @torch.no_grad()
    def calibration_loss(self, config: Mapping[str, LayerBits]) -> float:
        """Return the mean loss over the calibration set with these bits."""
        set_bits(self.prepared, config)
        losses = [
            float(self.loss_fn(forward(self.prepared, batch.inputs), batch.labels)) * batch.n
            for batch in self.data
        ]
        return math.fsum(losses) / self.data.n_samples
