"""Uniform: 2ᵇ − 1 evenly spaced values around zero, the default.

    Q(w) = s · clamp(round(w / s), −2ᵇ⁻¹ + 1, 2ᵇ⁻¹ − 1)

PyTorch's fake quantization with the scale of least squared error. Its gradient is 1 inside the
range and 0 where a weight is clipped (Bengio et al., 2013, arXiv:1308.3432; Jacob et al., 2018,
arXiv:1712.05877). At 2 bits it has three values, a ternary quantizer; at 1 bit it is binary.
"""

from __future__ import annotations

from typing import Any

from hq_optuna.quantization.functional import weight_grid
from hq_optuna.quantization.quantizers.base import WeightQuantizer
from hq_optuna.space.layers import MAX_BITS, MIN_BITS


class Uniform(WeightQuantizer):
    """``"uniform"``: evenly spaced, zero among the values; 1 to 16 bits."""

    name = "uniform"
    all_bits = range(MIN_BITS, MAX_BITS + 1)

    def describe(self, bits: int) -> dict[str, Any]:
        """Return what a reader of a saved result needs to know of the grid."""
        if bits == 1:
            return {"scheme": "per-channel binary"}
        quant_min, quant_max = weight_grid(bits)
        grid = {"quant_min": quant_min, "quant_max": quant_max}
        return {"scheme": "per-channel symmetric", **grid}
