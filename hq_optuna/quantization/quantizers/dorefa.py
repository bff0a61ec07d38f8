"""DoReFa: tanh squeezes the weights, then 2ᵏ evenly spaced values between the extremes.

    quantize_k(y) = round((2ᵏ − 1) · y) / (2ᵏ − 1)
    D(w) = 2 · quantize_k(tanh(w) / (2 · max|tanh(w)|) + ½) − 1

(Zhou et al., 2016, arXiv:1606.06160, sections 2.2 and 2.3.) D lies in [−1, 1]: DoReFa-Net trains
with it from the start, and batch-norm learns what size the outputs have. A network that was trained
without it knows other sizes, so two things differ here: each channel has its own max|tanh(w)|, and
D is multiplied by the α of least squared error, Q(w) = α · D(w). On ResNet-20 the maximum of each
channel is worth 20 points of accuracy at 2 bits and 4 at 3 bits over one maximum for a layer
(docs/results/quantizers.md).

The gradient is that of D as written, with quantize_k passed straight through: it goes through tanh
and the maximum too. At 1 bit DoReFa's weights are sign(w) · mean|w|, here per channel too, so they
are binary.

Weights are rounded where D says, so their errors cannot be made up for (a weight's value on the
grid would no longer be D's; ``midrise`` is the same grid without tanh, with compensation).

Activations: DoReFa-Net clips them to [0, 1] and takes quantize_k (section 2.4). A trained network's
activations have other bounds, and clipping them at 1 would make it another network. What rounds
inputs here is quantize_k with a bound r that was found on the calibration set,
r · quantize_k(clip(x / r, 0, 1)) where nothing is negative: DoReFa's with r in the place of 1. So
activations have one quantizer, whatever that of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hq_optuna.quantization.functional import along, straight_through
from hq_optuna.quantization.quantizers.base import WeightQuantizer, in_single
from hq_optuna.quantization.ranges import TINY


class Dorefa(WeightQuantizer):
    """``"dorefa"``: evenly spaced between the extremes after tanh; 1 to 8 bits."""

    name = "dorefa"
    all_bits = range(1, 9)
    compensates = False
    stores_codes = True  # tanh may differ in the last digit from one machine to another

    def largest_code(self, bits: int) -> int:
        """Return the largest code."""
        return int(2**bits) - 1

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of least squared error, ``(channels,)``."""
        if bits == 1:
            return super().scale(weight, bits, channel_axis)
        rows = weight.detach().movedim(channel_axis, 0).flatten(1)
        codes = _codes(_squeezed(rows, 0), bits).double()
        best = (rows.double() * codes).sum(1) / codes.square().sum(1)
        return best.clamp_min(TINY).float()

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, with its gradient."""
        if bits == 1:
            return super().quantize(weight, scale, bits, channel_axis)
        y = _squeezed(weight, channel_axis)
        rounded = _codes(y.detach(), bits).to(weight.dtype) * along(scale, weight, channel_axis)
        smooth = self.largest_code(bits) * along(scale, y, channel_axis) * (2 * y - 1)
        return straight_through(rounded, smooth.to(weight.dtype))

    def has_odd_codes(self, bits: int) -> bool:
        """Say that codes are odd numbers."""
        return True


def _squeezed(weight: Tensor, channel_axis: int) -> Tensor:
    """Return tanh(w) / (2 · max|tanh(w)|) + ½, the maximum over each channel."""
    squeezed = torch.tanh(in_single(weight))
    others = [axis for axis in range(weight.dim()) if axis != channel_axis]
    largest = squeezed.abs().amax(others, keepdim=True)
    return squeezed / (2 * torch.where(largest > 0, largest, 1.0)) + 0.5


def _codes(y: Tensor, bits: int) -> Tensor:
    """Return (2ᵏ − 1) · D, odd whole numbers, from y in [0, 1]."""
    n = 2**bits - 1
    codes: Tensor = 2 * torch.round(n * y) - n
    return codes
