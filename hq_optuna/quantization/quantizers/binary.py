"""Binary: the sign of a weight times the mean magnitude of its channel.

    Q(w) = α · sign(w),   α = Σ|w| / n   (Rastegari et al., 2016, arXiv:1603.05279, eq. (6))

α is the scale of least squared error. sign(0) is 1. What ``uniform`` does at 1 bit is the same.

The gradient passes straight through, as DoReFa-Net writes it for these weights (Zhou et al., 2016,
arXiv:1606.06160, section 2.3). XNOR-Net itself takes 1/n + α · 1[|w| ≤ 1]: its clip at 1 hardly
ever acts on the weights of a trained network, and the factor α would slow this layer down beside
layers of more bits, whose gradient has no such factor.
"""

from __future__ import annotations

from hq_optuna.quantization.quantizers.base import WeightQuantizer


class Binary(WeightQuantizer):
    """``"binary"``: sign times mean magnitude (XNOR-Net); 1 bit."""

    name = "binary"
    all_bits = range(1, 2)
