"""What every quantizer of weights can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor


class WeightQuantizer(ABC):
    """A way to round weights: whole multiples of one scale per output channel.

    The multiples are its codes, so codes times scale are the rounded weight bit for bit, whatever
    the way to the codes. It has no state: scales are kept by who uses it.

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

    @abstractmethod
    def largest_code(self, bits: int) -> int:
        """Return the largest code; the smallest is its negative."""

    @abstractmethod
    def scale(self, weight: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the scale of each channel, shape ``(channels,)``, float32, positive."""

    @abstractmethod
    def quantize(self, weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
        """Return the rounded weight, differentiable as the quantizer was published.

        Args:
            weight: Any float tensor with ``channel_axis``.
            scale: Shape ``(channels,)``.
            bits: One of `all_bits`.
            channel_axis: Axis of the output channels.
        """

    @abstractmethod
    def nearest(self, values: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return the values of the grid next to ``values``; scale is broadcast, no gradient."""

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
