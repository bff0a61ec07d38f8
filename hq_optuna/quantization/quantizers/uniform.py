"""Uniform: 2ᵇ − 1 evenly spaced values around zero, the default.

    Q(w) = s · clamp(round(w / s), −2ᵇ⁻¹ + 1, 2ᵇ⁻¹ − 1)

PyTorch's fake quantization with the scale of least squared error. Its gradient is 1 inside the
range and 0 where a weight is clipped (Bengio et al., 2013, arXiv:1308.3432; Jacob et al., 2018,
arXiv:1712.05877). At 2 bits it has three values, a ternary quantizer; at 1 bit it is binary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hq_optuna.quantization.functional import quantize_weight, weight_grid
from hq_optuna.quantization.quantizers.base import WeightQuantizer
from hq_optuna.quantization.ranges import weight_scale
from hq_optuna.space.layers import MAX_BITS, MIN_BITS


class Uniform(WeightQuantizer):
    """``"uniform"``: evenly spaced, zero among the values; 1 to 16 bits."""

    name = "uniform"
    all_bits = range(MIN_BITS, MAX_BITS + 1)

    def largest_code(self, bits: int) -> int:
        """Return the largest code."""
        return 1 if bits == 1 else weight_grid(bits)[1]

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of least squared error, ``(channels,)``."""
        return weight_scale(weight, bits, channel_axis)

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, with its gradient."""
        return quantize_weight(weight, scale, bits, channel_axis)

    def nearest(self, values: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return the values of the grid next to ``values``."""
        if bits == 1:
            return torch.where(values >= 0, scale, -scale)
        return (values / scale).round_().clamp_(*weight_grid(bits)).mul_(scale)

    def describe(self, bits: int) -> dict[str, Any]:
        """Return what a reader of a saved result needs to know of the grid."""
        if bits == 1:
            return {"scheme": "per-channel binary"}
        quant_min, quant_max = weight_grid(bits)
        grid = {"quant_min": quant_min, "quant_max": quant_max}
        return {"scheme": "per-channel symmetric", **grid}
