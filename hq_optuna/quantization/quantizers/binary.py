"""Binary: the sign of a weight times the mean magnitude of its channel.

    Q(w) = α · sign(w),   α = Σ|w| / n   (Rastegari et al., 2016, arXiv:1603.05279, eq. (6))

α is the scale of least squared error. sign(0) is 1. What ``uniform`` does at 1 bit is the same.

The gradient passes straight through, as DoReFa-Net writes it for these weights (Zhou et al., 2016,
arXiv:1606.06160, section 2.3). XNOR-Net itself takes 1/n + α · 1[|w| ≤ 1]: its clip at 1 hardly
ever acts on the weights of a trained network, and the factor α would slow this layer down beside
layers of more bits, whose gradient has no such factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hq_optuna.quantization.functional import quantize_weight
from hq_optuna.quantization.quantizers.base import WeightQuantizer
from hq_optuna.quantization.ranges import weight_scale


class Binary(WeightQuantizer):
    """``"binary"``: sign times mean magnitude (XNOR-Net); 1 bit."""

    name = "binary"
    all_bits = range(1, 2)

    def largest_code(self, bits: int) -> int:
        """Return the largest code."""
        return 1

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of least squared error, ``(channels,)``."""
        return weight_scale(weight, 1, channel_axis)

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, with its gradient."""
        return quantize_weight(weight, scale, 1, channel_axis)

    def nearest(self, values: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return the values of the grid next to ``values``."""
        return torch.where(values >= 0, scale, -scale)
