"""Ranges that minimize the squared error of quantization: scales of weights and of activations.

Weights: for each channel, the scale s that minimizes ‖Q_s(w) − w‖². A grid of clipping points finds
the basin; then integer codes and scale are improved in turn (for fixed codes q the best scale is
w·q / q·q, in closed form), which never raises the error.

Activations: for each number of bits, the range that minimizes the squared error over a histogram
of the values seen on the calibration set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hq_optuna.quantization.functional import activation_grid, weight_grid

GRID_POINTS = 40
REFINEMENTS = 8
TINY = 1e-12
"""Smallest scale: an all-zero channel still needs a positive one."""


def _rows(weight: Tensor, channel_axis: int) -> Tensor:
    """Return the weight as ``(channels, rest)``."""
    return weight.detach().movedim(channel_axis, 0).flatten(1)


def weight_scale(weight: Tensor, bits: int, channel_axis: int) -> Tensor:
    """Return the scale per channel with the least squared error.

    Args:
        weight: Float tensor with at least two axes.
        bits: 1 to 16.
        channel_axis: Axis of the output channels.

    Returns:
        Shape ``(channels,)``, the weight's dtype and device, positive.

    Example:
        >>> weight_scale(torch.tensor([[1.0, -2.0, 0.0]]), bits=2, channel_axis=0)
        tensor([1.5000])
    """
    rows = _rows(weight, channel_axis).to(torch.float64)
    if bits == 1:
        # XNOR-Net eq. (6): the best scale of sign(w) is the mean absolute weight.
        return rows.abs().mean(1).clamp_min(TINY).to(weight.dtype)
    quant_min, quant_max = weight_grid(bits)
    # With this scale nothing is clipped on either side.
    full = torch.maximum(rows.amax(1) / quant_max, rows.amin(1) / quant_min).clamp_min(TINY)

    def codes(scale: Tensor) -> Tensor:
        return (rows / scale[:, None]).round_().clamp_(quant_min, quant_max)

    def error(scale: Tensor) -> Tensor:
        return (codes(scale) * scale[:, None] - rows).square_().sum(1)

    best, best_error = full, error(full)
    # Below 4 bits good ranges clip much; above 8 bits hardly at all, and rounding wins nothing.
    lowest = 0.2 if bits <= 4 else 0.5
    for factor in np.linspace(lowest, 1.0, GRID_POINTS, endpoint=False):
        scale = full * float(factor)
        candidate = error(scale)
        better = candidate < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, candidate, best_error)
    for _ in range(REFINEMENTS):
        q = codes(best)
        scale = (rows * q).sum(1) / q.square().sum(1).clamp_min(1.0)
        scale = torch.where(scale > 0, scale, best)
        candidate = error(scale)
        better = candidate < best_error
        if not bool(better.any()):
            break
        best = torch.where(better, scale, best)
        best_error = torch.where(better, candidate, best_error)
    return best.to(weight.dtype)


class AffineRange(NamedTuple):
    """Scale and zero point of one tensor."""

    scale: float
    zero_point: int


def affine_range(low: float, high: float, bits: int) -> AffineRange:
    """Return scale and zero point of the grid that covers ``[low, high]`` and holds 0.0 exactly.

    Zero padding and ReLU make 0.0 the commonest value of all, so it must be free of error.

    Example:
        >>> affine_range(0.0, 15.0, bits=4)
        AffineRange(scale=1.0, zero_point=0)
        >>> affine_range(-1.0, 2.0, bits=2)
        AffineRange(scale=1.0, zero_point=1)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    quant_min, quant_max = activation_grid(bits)
    scale = max((high - low) / (quant_max - quant_min), TINY)
    # Round as PyTorch will: in single precision.
    scale = float(np.float32(scale))
    return AffineRange(scale, int(np.clip(round(-low / scale), quant_min, quant_max)))


def histogram_range(
    counts: NDArray[np.float64], edges: NDArray[np.float64], bits: int
) -> AffineRange:
    """Return the range with the least squared error over a histogram.

    Args:
        counts: Values per bin, shape ``(bins,)``.
        edges: Bin edges, shape ``(bins + 1,)``, ascending.
        bits: 1 to 16.

    Both ends of the observed range are shrunk towards zero by factors on a grid; where nothing is
    negative, the lower end is 0 and the grid unsigned.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = float(edges[0]), float(edges[-1])
    factors = np.linspace(0.1, 1.0, 46)
    lows = [0.0] if low >= 0 else [low * f for f in factors[::3]]
    highs = [0.0] if high <= 0 else [high * f for f in factors]
    quant_min, quant_max = activation_grid(bits)
    best, best_error = affine_range(low, high, bits), np.inf
    for lower in lows:
        for upper in highs:
            if lower == upper:
                continue
            scale, zero_point = affine_range(lower, upper, bits)
            codes = np.clip(np.round(centres / scale) + zero_point, quant_min, quant_max)
            error = float(counts @ ((codes - zero_point) * scale - centres) ** 2)
            if error < best_error:
                best, best_error = AffineRange(scale, zero_point), error
    return best
