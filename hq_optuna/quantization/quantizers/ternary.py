"""Ternary: −α, 0 or +α, with the threshold of least squared error.

    Q(w) = α · sign(w) where |w| > Δ, else 0   (Li and Liu, 2016, arXiv:1605.04711)

For a threshold Δ the best α is the mean magnitude above it, and the error is ‖w‖² − S²/k with S the
sum of the k magnitudes above Δ. The paper takes Δ ≈ 0.7 · Σ|w| / n, about the optimum for weights
that are distributed uniformly or normally. But whatever the weights, those above Δ are the k
largest, k = 1 … n, so one sort finds the exact optimum, and Δ = α / 2 separates them. On ResNet-20
it has 10 points of accuracy more than the paper's (docs/results/quantizers.md).

The paper has one α for a layer, here each channel has its own. The gradient passes straight
through, as in the paper. ``uniform`` at 2 bits has the same values; its search is exact in channels
of up to 1,024 weights and within 1 % above, and its gradient is 0 where a weight is clipped.

A code takes 2 bits of storage, of whose four values one stays unused; the costs count 2 bits.
"""

from __future__ import annotations

from torch import Tensor

from hq_optuna.quantization.functional import quantize_weight, straight_through
from hq_optuna.quantization.quantizers.base import WeightQuantizer
from hq_optuna.quantization.ranges import exact_scale, scale_by_channel


class Ternary(WeightQuantizer):
    """``"ternary"``: minus, zero or plus one scale (TWN, exact threshold); 2 bits."""

    name = "ternary"
    all_bits = range(2, 3)

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of least squared error, ``(channels,)``."""
        return scale_by_channel(weight, channel_axis, lambda rows: exact_scale(rows, 2))

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, with its gradient."""
        return straight_through(quantize_weight(weight, scale, 2, channel_axis), weight)
