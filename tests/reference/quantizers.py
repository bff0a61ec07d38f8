"""Quantizers of weights written out from their papers, and least errors by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = NDArray[np.float64]


def codes_of(name: str, bits: int) -> list[int]:
    """Return all codes of a quantizer's grid."""
    if bits == 1:
        return [-1, 1]
    if name in ("uniform", "ternary"):
        return list(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))
    return list(range(-(2**bits) + 1, 2**bits, 2))


def least_error(row: Row, codes: Sequence[int]) -> float:
    """Return the least Σ (s·q − w)² over all code vectors q, each with its best scale s > 0."""
    least = float(row @ row)
    for q in itertools.product(codes, repeat=len(row)):
        wq, qq = float(row @ np.array(q)), float(np.square(q).sum())
        if wq > 0:
            least = min(least, float(row @ row) - wq * wq / qq)
    return least


def least_ternary_error(row: Row) -> float:
    """Return the least error of ternary weights: every threshold between two magnitudes."""
    size, errors = np.abs(row), []
    for threshold in size:
        above = size >= threshold
        errors.append(np.square(size[~above]).sum() + np.square(size[above]).sum())
        errors[-1] -= above.sum() * size[above].mean() ** 2
    return float(min(errors))


def least_scanned_error(row: Row, codes: Sequence[int], n_scales: int = 4000) -> float:
    """Return the least error over thousands of scales, each weight at its nearest value."""
    grid, least = np.array(codes, dtype=np.float64), float(row @ row)
    for scale in np.abs(row).max() / max(codes) * np.geomspace(0.02, max(codes), n_scales):
        nearest = grid[np.abs(row[:, None] / scale - grid).argmin(1)]
        least = min(least, float(np.square(scale * nearest - row).sum()))
    return least


def twn(row: Row) -> Row:
    """Ternary weights with the paper's threshold, 0.7 · Σ|w| / n."""
    above = np.abs(row) > 0.7 * np.abs(row).mean()
    return np.where(above, np.sign(row) * np.abs(row[above]).mean(), 0.0)


def dorefa(row: Sequence[float], k: int) -> list[float]:
    """DoReFa-Net's weights as published, value by value."""
    largest, n = max(abs(math.tanh(w)) for w in row), 2**k - 1
    return [2 * round(n * (math.tanh(w) / (2 * largest) + 0.5)) / n - 1 for w in row]


def dorefa_activation(x: float, k: int) -> float:
    """DoReFa-Net's activations as published: clip to [0, 1], then quantize_k."""
    n = 2**k - 1
    return round(n * min(max(x, 0.0), 1.0)) / n


class RoundStraight(torch.autograd.Function):
    """Rounding whose gradient is 1."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def dorefa_composed(row: Tensor, k: int) -> Tensor:
    """DoReFa-Net's weights, differentiable step by step."""
    n = 2**k - 1
    squeezed = torch.tanh(row)
    y: Tensor = RoundStraight.apply(n * (squeezed / (2 * squeezed.abs().max()) + 0.5))
    return 2 * y / n - 1
