"""What every quantizer of weights does; by default it rounds to the uniform grid."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hq_optuna.quantization.functional import quantize_weight, weight_grid
from hq_optuna.quantization.ranges import weight_scale


class WeightQuantizer:
    """A way to round weights: whole multiples of one scale per output channel.

    The multiples are its codes: codes times scale are the rounded weight bit for bit. A quantizer
    has no state; its user keeps the scales. Subclasses override what differs from the uniform grid,
    which at 1 bit is sign(w) times the scale.

    Attributes:
        name: What users call it.
        all_bits: Numbers of bits it can do.
        compensates: Whether rounding errors may be made up for on its grid
            (`hq_optuna.quantization.compensation`).
        stores_codes: Whether a saved result must hold the codes, because rounding the float weight
            again could end otherwise on another machine.
    """

    name: ClassVar[str]
    all_bits: ClassVar[range]
    compensates: ClassVar[bool] = True
    stores_codes: ClassVar[bool] = False

    @property
    def bits_text(self) -> str:
        """What it can do, in words: ``"2 bits"``, ``"1 to 8 bits"``."""
        low, high = self.all_bits[0], self.all_bits[-1]
        if low < high:
            return f"{low} to {high} bits"
        return f"{low} bit{'' if low == 1 else 's'}"

    def largest_code(self, bits: int) -> int:
        """Return the largest code; the smallest is its negative."""
        return 1 if bits == 1 else weight_grid(bits)[1]

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of least squared error, ``(channels,)``, float32, positive."""
        return weight_scale(weight, bits, channel_axis)

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, differentiable as the quantizer was published."""
        return quantize_weight(weight, scale, bits, channel_axis)

    def nearest(self, values: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return the values of the grid next to ``values``; scale is broadcast, no gradient."""
        if bits == 1:
            return torch.where(values >= 0, scale, -scale)
        return (values / scale).round_().clamp_(*weight_grid(bits)).mul_(scale)

    def describe(self, bits: int) -> dict[str, Any]:
        """Return what a reader of a saved result needs to know of the grid, as JSON data."""
        largest = self.largest_code(bits)
        return {
            "name": self.name,
            "scheme": f"per-channel {self.name}",
            "quant_min": -largest,
            "quant_max": largest,
        }


def in_single(weight: Tensor) -> Tensor:
    """Return the weight in single precision or better: half precision would pick other codes."""
    return weight if weight.dtype.itemsize >= 4 else weight.float()
