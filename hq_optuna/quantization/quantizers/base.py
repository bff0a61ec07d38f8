"""What every quantizer of weights does; by default it rounds to the uniform grid."""

from __future__ import annotations

from typing import Any

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

    name: str
    all_bits: range
    compensates: bool = True
    stores_codes: bool = False

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

    def has_odd_codes(self, bits: int) -> bool:
        """Say whether codes are odd numbers, as the signs of one bit are, or all numbers."""
        return bits == 1

    def describe(self, bits: int) -> dict[str, Any]:
        """Return what a reader of a saved result needs to know of the grid, as JSON data."""
        largest = self.largest_code(bits)
        return {
            "name": self.name,
            "scheme": f"per-channel {self.name}",
            "quant_min": -largest,
            "quant_max": largest,
        }


class ByGroup(WeightQuantizer):
    """Another quantizer, for transposed convolutions in groups: a scale for each output of each.

    Their weights are ``(inputs, outputs of a group, …)``.
    """

    def __init__(self, inner: WeightQuantizer, groups: int) -> None:
        self.inner, self.groups = inner, groups
        self.name, self.all_bits, self.stores_codes = inner.name, inner.all_bits, inner.stores_codes
        self.compensates = False

    def largest_code(self, bits: int) -> int:
        """Return the largest code of the other quantizer."""
        return self.inner.largest_code(bits)

    def _by_output(self, weight: Tensor) -> Tensor:
        """Return the weight as ``(groups, outputs of a group, inputs of a group, …)``."""
        return weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)

    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scales of all outputs."""
        return self.inner.scale(self._by_output(weight).flatten(0, 1), bits, 0)

    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight."""
        rows = self._by_output(weight)
        rounded = self.inner.quantize(rows.flatten(0, 1).contiguous(), scale, bits, 0)
        return rounded.reshape(rows.shape).transpose(1, 2).flatten(0, 1)


def in_single(weight: Tensor) -> Tensor:
    """Return the weight in single precision or better: half precision would pick other codes."""
    return weight if weight.dtype.itemsize >= 4 else weight.float()
