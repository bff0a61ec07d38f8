"""Two published scores in their exact forms, for comparison; both add up over layers.

`hawq_v2`: Dong et al. 2020, HAWQ-V2, eq. (2.11): Ω = Σ (Tr(H_l) / n_l) · ‖Q(W_l) − W_l‖², with the
trace of the layer's Hessian by Hutchinson's estimator; activations likewise, with the Hessian in
the activations, per sample. Without the ½ of the expansion: twice a loss rise in nats.

`fit`: Zandonati et al. 2023, FIT: Ω = Σ Tr(F_l) · E[δ_l²], with F the empirical Fisher matrix of
weights and activations and the noise power of uniform rounding, E[δ²] = Δ²/12 with Δ = (max − min)
/ (2ᵇ − 1), per tensor. As in their code the Fisher trace is n times the squared gradient of a batch
of n, averaged over batches, and an activation's range is the mean over batches of each batch's
range. The rounding itself is never looked at: FIT has no say in how ranges are chosen, per-channel
scales or clipping. Without ½ as well: about twice a loss rise in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hq_optuna.curvature import Curvature, hutchinson
from hq_optuna.curvature.fisher import squared_gradients
from hq_optuna.network.batches import Batches, forward
from hq_optuna.network.losses import LossFunction
from hq_optuna.quantization.observers import watch_inputs
from hq_optuna.quantization.prepare import float_weight, get_bits, set_bits
from hq_optuna.scoring.layer_sums import LAYER_SUMS, LayerSums, measure_layer_sums
from hq_optuna.scoring.sensitivity import Sensitivity, Table, check_finite, measure_sensitivity
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.search_space import SearchSpace, bits_needed

PUBLISHED = ("fit", "hawq_v2", *LAYER_SUMS)
"""Names that `measure_published` knows."""


def empirical_fisher(
    network: nn.Module, layers: Sequence[LayerSpec], data: Batches, loss_fn: LossFunction
) -> Curvature:
    """Return the mean over batches of n times the squared gradient of the batch's mean loss.

    With one sample a batch that is the diagonal of the empirical Fisher matrix. Larger batches add
    n times the squared mean gradient, which is 0 at a minimum.

    Args:
        network: Left as it is; a copy is differentiated.
        layers: Layers to look at (`L`).
        data: Calibration batches on the network's device.
        loss_fn: Mean loss of a batch from outputs and labels.

    Raises:
        ScoreError: The loss does not depend on the network through any gradient.
    """
    return squared_gradients(
        network, layers, data, lambda outputs, batch: loss_fn(outputs, batch.labels), 0.0
    )


def hawq_v2(
    prepared: nn.Module, space: SearchSpace, curvature: Curvature, data: Batches
) -> Sensitivity:
    """Return HAWQ-V2's Ω of every layer and number of bits, in 2 nats.

    Args:
        prepared: The prepared network; its bits are restored afterwards.
        space: Which bits to look at.
        curvature: From `hutchinson`.
        data: Calibration batches on the network's device.

    Raises:
        ScoreError: A value is NaN or infinite, or no layer at all received a gradient.
    """
    halves = measure_sensitivity(prepared, space, curvature, data, "trace")
    return Sensitivity(_times(halves.weights, 2.0), _times(halves.activations, 2.0))


def _times(table: Table, factor: float) -> Table:
    return {name: {b: factor * v for b, v in row.items()} for name, row in table.items()}


@torch.no_grad()
def fit(
    prepared: nn.Module, space: SearchSpace, curvature: Curvature, data: Batches
) -> Sensitivity:
    """Return FIT of every layer and number of bits, in about 2 nats.

    Args:
        prepared: The prepared network; its bits are restored afterwards.
        space: Which bits to look at.
        curvature: From `empirical_fisher`.
        data: Calibration batches on the network's device.

    Raises:
        ScoreError: A value is NaN or infinite.
    """
    needed = bits_needed(space)
    weights, traces = {}, {}
    for name, (bits, _) in needed.items():
        weight: Tensor = float_weight(prepared.get_submodule(name))
        trace = float(curvature.weights[name].double().sum())
        weights[name] = {b: trace * _noise(float(weight.max() - weight.min()), b) for b in bits}
        # Per sample: the sum over a sample's elements, of all calls of the layer.
        traces[name] = sum(e.total / max(e.n_samples, 1) for e in curvature.inputs[name])
    watched = [name for name, (_, bits) in needed.items() if bits]
    ranges = _ranges(prepared, watched, data)
    activations = {
        name: {b: traces[name] * _noise(ranges[name], b) for b in needed[name][1]}
        for name in needed
    }
    return check_finite(Sensitivity(weights, activations))


def _noise(value_range: float, bits: int) -> float:
    """Return Δ²/12, the mean squared error of rounding uniformly spread values."""
    step: float = value_range / (2**bits - 1)
    return step * step / 12


def _ranges(prepared: nn.Module, names: list[str], data: Batches) -> Mapping[str, float]:
    """Return the mean of max − min of what enters each layer, over the batches that reach it."""
    sums = dict.fromkeys(names, 0.0)
    if not names:
        return sums
    counts = dict.fromkeys(names, 0)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}

    def see(name: str, x: Tensor) -> None:
        if not x.numel():
            return
        lows[name] = min(lows.get(name, float(x.min())), float(x.min()))
        highs[name] = max(highs.get(name, float(x.max())), float(x.max()))

    before = get_bits(prepared)
    set_bits(prepared, dict.fromkeys(before, (FLOAT_BITS, FLOAT_BITS)))
    try:
        with watch_inputs(prepared, names, see):
            for batch in data:
                lows.clear()
                highs.clear()
                forward(prepared, batch.inputs)
                for name in lows:
                    sums[name] += highs[name] - lows[name]
                    counts[name] += 1
    finally:
        set_bits(prepared, before)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def measure_published(
    name: str,
    network: nn.Module,
    prepared: nn.Module,
    space: SearchSpace,
    data: Batches,
    loss_fn: LossFunction,
) -> LayerSums:
    """Return a published score, or one of this project's, of every layer at every number of bits.

    Args:
        name: ``"fit"``, ``"hawq_v2"``, or one of `hq_optuna.scoring.LAYER_SUMS`.
        network: The float network.
        prepared: The same, prepared; its bits are restored afterwards.
        space: Which bits to look at.
        data: Calibration batches on the network's device.
        loss_fn: Mean loss of a batch from outputs and labels.

    Raises:
        ScoreError: A value is NaN or infinite.
    """
    if name == "fit":
        curvature = empirical_fisher(network, space.layers, data, loss_fn)
        return LayerSums(fit(prepared, space, curvature, data), curvature)
    if name == "hawq_v2":  # nothing is done about negative traces, as published
        curvature = hutchinson(network, space.layers, data, loss_fn, raw=True)
        return LayerSums(hawq_v2(prepared, space, curvature, data), curvature)
    return measure_layer_sums(name, network, prepared, space, data, loss_fn)  # type: ignore[arg-type]
