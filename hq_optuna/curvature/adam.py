"""Calibration Adam: the Hessian's diagonal from Adam's second moment, without training.

Adam's second moment v̂ is a running mean of the squared gradient of the *mini-batch mean*. Near a
minimum the batch gradient is noise around zero, so v̂ ≈ F / B with F the diagonal of the empirical
Fisher matrix and B the batch size, and F approximates the Hessian's diagonal: h = B · v̂. It is the
one number kept of Adam, for a frozen copy in eval mode, so nothing is trained; in single precision
also where the network has half, whose smallest numbers are above most squared gradients.

The same backward passes give each layer's input curvature, the mean over samples of the squared
gradient (∂ℓᵢ/∂x)², through this layer alone: it is this layer's input that will be rounded, not
what a shortcut or a neighbour reads of the same tensor. Both are in units of the loss: ½ Σ h Δ² is
a loss rise.

Sources: Kingma & Ba 2015 (Adam, eqs. in Algorithm 1); patent CN112183742B; for inputs FIT
(Zandonati et al., 2022). Where a batch is smaller than the first one its gradient is scaled by
√(Bᵢ/B), so that its square has the same expectation F / B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.curvature.estimate import Curvature
from hq_optuna.curvature.sweep import SquaredGradients, differentiable
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.loss_weights import batch_loss
from hq_optuna.network.losses import LossFunction
from hq_optuna.quantization.quantizers.base import in_single
from hq_optuna.space.layers import LayerSpec

BETA2 = 0.999


def calibration_adam(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    loss_fn: LossFunction,
    *,
    beta2: float = BETA2,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curvature:
    """Return the curvature of the loss in weights and inputs, from one pass over the data.

    It never stops early: a network that is sure of most images gets nearly all of this curvature
    from a few of them (`output_curvature` does not). The window 1 / (1 − β₂) should exceed the
    number of batches. ``progress`` is called with (batches done, batches).
    """
    sweep = SquaredGradients(layers)

    def objective(outputs: Any, batch: Batch) -> Tensor:
        return batch_loss(loss_fn, outputs, batch)

    with differentiable(network, layers, sweep.see) as (copied, weights):
        moments = {name: torch.zeros_like(in_single(w.detach())) for name, w in weights.items()}
        for index, batch in enumerate(data):
            sweep.run(copied, weights, batch, objective)
            scale = math.sqrt(batch.n / data[0].n)
            for name, weight in weights.items():
                moment = moments[name].mul_(beta2)  # v ← β₂ v + (1 − β₂) g²
                if weight.grad is not None:
                    g = in_single(weight.grad) * scale
                    moment.addcmul_(g, g, value=1 - beta2)
            progress(index + 1, len(data))

    correction = 1 - beta2 ** len(data)  # Adam's bias correction
    found = {name: moment / correction * data[0].n for name, moment in moments.items()}
    return sweep.curvature(found, data[0].n, data.n_samples)
