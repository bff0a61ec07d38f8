"""The least squared error of quantization, by trying thousands of ranges on the values."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]


def error(values: Values, scale: float, zero_point: int, bits: int) -> float:
    """Return Σ (Q(x) − x)² of an affine grid of 2ᵇ codes."""
    codes = np.clip(np.rint(values / scale), -zero_point, 2**bits - 1 - zero_point)
    return float(np.square(codes * scale - values).sum())


def weight_errors(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return Σ (Q(w) − w)² per channel, ``(channels,)``, on a symmetric grid."""
    top = 2 ** (bits - 1) - 1
    rows, scale = rows.double(), scale.double()[:, None]
    return ((rows / scale).round().clamp(-top, top) * scale - rows).square().sum(1)


def unclipped(rows: Tensor, bits: int) -> Tensor:
    """Return the scale per channel that clips nothing."""
    return rows.double().abs().amax(1) / (2 ** (bits - 1) - 1)


def least_weight_errors(rows: Tensor, bits: int, n_scales: int) -> Tensor:
    """Return the least error per channel of ``n_scales`` scales over three decades."""
    full = unclipped(rows, bits)
    least = torch.full_like(full, torch.inf)
    for factor in np.geomspace(0.3 / rows.shape[1] ** 0.5, 1.0, n_scales):
        least = torch.minimum(least, weight_errors(rows, full * float(factor), bits))
    return least


def least_error(values: Values, bits: int) -> float:
    """Return the least error over scales and zero points."""
    low, high, top = min(values.min(), 0.0), max(values.max(), 0.0), 2**bits - 1
    if low == 0:
        zero_points = [0]
    elif high == 0:
        zero_points = [top]
    else:
        zero_points = sorted({int(z) for z in np.rint(np.linspace(0, top, 17))})
    least = np.inf
    for zero_point in zero_points:
        sides = [-low / zero_point] if zero_point else []
        sides += [high / (top - zero_point)] if zero_point < top else []
        for scale in max(sides) * np.geomspace(4e-3, 1.0, 160):
            least = min(least, error(values, float(scale), zero_point, bits))
    return least
