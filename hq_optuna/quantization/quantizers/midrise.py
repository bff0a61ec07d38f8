"""Mid-rise: 2ᵇ evenly spaced values around zero, none of them zero.

    Q(w) = s · clamp(2 · floor(w / 2s) + 1, −2ᵇ + 1, 2ᵇ − 1)

The values are odd multiples of s, half the distance between two of them: at 2 bits −3s, −s, s and
3s. All 2ᵇ codes are used and it is symmetric all the same, where ``uniform`` leaves one code of 2ᵇ
unused for the sake of its zero. That matters below 4 bits; at 1 bit it is binary. In signal
processing this is the mid-rise quantizer beside the mid-tread one (Gersho, 1978, "Principles of
quantization", IEEE Transactions on Circuits and Systems 25), and DoReFa-Net's weights lie on this
grid (Zhou et al., 2016, arXiv:1606.06160, section 2.3), with another way to choose the scale.

The scale is that of least squared error, found as that of ``uniform``. The gradient is 1 inside the
range and 0 where a weight is clipped. There is no zero, so pruned weights do not stay pruned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hq_optuna.quantization.functional import along, straight_through
from hq_optuna.quantization.quantizers.base import WeightQuantizer, in_single
from hq_optuna.quantization.ranges import (
    EXACT,
    scale_by_channel,
    scale_over_steps,
    searched_scale,
)


class Midrise(WeightQuantizer):
    """``"midrise"``: evenly spaced, no zero, all codes used; 1 to 8 bits."""

    name = "midrise"
    all_bits = range(1, 9)

    def largest_code(self, bits: int) -> int:
        """Return the largest code."""
        return int(2**bits) - 1

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of least squared error, ``(channels,)``."""
        if bits == 1:
            return super().scale(weight, bits, channel_axis)
        n = weight.numel() // max(weight.shape[channel_axis], 1)
        exact = n * 2 ** (bits - 1) <= EXACT

        def find(rows: Tensor) -> Tensor:
            if exact:
                return _exact_scale(rows, bits)
            largest = self.largest_code(bits)
            return searched_scale(
                *(rows, bits, largest, lambda scale: odd_codes(rows, scale[:, None], largest)),
                half_step=1.0,
            )

        return scale_by_channel(weight, channel_axis, find)

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, with its gradient."""
        if bits == 1:
            return super().quantize(weight, scale, bits, channel_axis)
        step, largest = along(scale, weight, channel_axis), self.largest_code(bits)
        values = in_single(weight.detach())
        codes = odd_codes(values, along(scale, values, channel_axis), largest)
        rounded = codes.to(weight.dtype) * step
        if not weight.requires_grad:
            return rounded
        end = (largest + 1) * step
        return straight_through(rounded, torch.minimum(torch.maximum(weight, -end), end))

    def has_odd_codes(self, bits: int) -> bool:
        """Say that codes are odd numbers."""
        return True


def odd_codes(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Return the odd multiples of the scale that are nearest, up to ±``largest``; 0 goes to 1.

    Example:
        >>> odd_codes(torch.tensor([-9.0, -0.1, 0.0, 2.5]), torch.tensor(1.0), 3)
        tensor([-3., -1.,  1.,  3.])
    """
    return (values / (2 * scale)).floor_().mul_(2).add_(1).clamp_(-largest, largest)


def _exact_scale(rows: Tensor, bits: int) -> Tensor:
    """Return the best scale of ``rows``, ``(channels, n)``.

    All codes are ±1 at first, and that of a weight steps from 2k − 1 to 2k + 1 at |w| / 2k.
    """
    magnitude = rows.abs().double()
    k = torch.arange(1, 2 ** (bits - 1), dtype=torch.float64, device=rows.device)
    first = magnitude.sum(1, keepdim=True)
    started = first, torch.full_like(first, rows.shape[1])
    return scale_over_steps(magnitude, 2 * k, 2.0, 8 * k, started)
