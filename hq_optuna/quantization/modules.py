"""Fake quantization as modules with state: one for a layer's weight, one for its input.

Both know every number of bits at once. What they compute for a number of bits they keep, so going
back and forth between assignments costs a dictionary look-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.quantization.calls import uncounted
from hq_optuna.quantization.functional import quantize_activation
from hq_optuna.quantization.observers import InputHistogram
from hq_optuna.quantization.quantizers import UNIFORM, WeightQuantizer
from hq_optuna.quantization.ranges import ANY_GRID, AffineRange, InputGrid
from hq_optuna.settings import Observer
from hq_optuna.space.layers import FLOAT_BITS


class Kept(NamedTuple):
    """What `WeightFakeQuantize.keep` was given for a number of bits.

    ``codes`` are the whole multiples of ``scale`` along an axis of channels as int8, a byte each,
    or the rounded weight itself where these are not it to the last bit.
    """

    codes: Tensor
    scale: Tensor
    output_error: Tensor | None = None
    training_start: Tensor | None = None

    @classmethod
    def of(cls, rounded: Tensor, scale: Tensor, axis: int, *more: Tensor | None) -> Kept:
        """Return a rounded weight as codes if these give it back."""
        if len(scale) != rounded.shape[axis]:  # of transposed convolutions in groups
            return cls(rounded, scale, *more)
        codes = (rounded / along(scale.to(rounded.dtype), rounded, axis)).round()
        if float(codes.abs().amax() if codes.numel() else 0.0) <= 127:
            packed = cls(codes.to(torch.int8), scale, *more)
            if torch.equal(packed.rounded(rounded.dtype, axis), rounded):
                return packed
        return cls(rounded, scale, *more)

    def rounded(self, dtype: torch.dtype, axis: int) -> Tensor:
        """Return the rounded weight."""
        if self.codes.dtype != torch.int8:
            return self.codes.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        scale = along(self.scale.to(exact), self.codes, axis)
        return (self.codes.to(exact) * scale).to(dtype)

    def to(self, device: torch.device) -> Kept:
        """Return the same on a device."""
        return self._replace(codes=self.codes.to(device), scale=self.scale.to(device))


def along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Return ``(channels,)`` values in a shape that broadcasts along an axis of another tensor."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


class WeightFakeQuantize(nn.Module):
    """Parametrization that rounds a layer's weight to `bits`.

    Without gradients the rounded weight is kept for each number of bits and computed again only
    when the weight has changed. With gradients it is computed each time, straight-through. A scale
    is found once and stays while the weight is trained.

    Changes behind PyTorch's back (``weight.data.mul_(2)``) are not noticed, as in autograd itself;
    ``with torch.no_grad(): weight.mul_(2)`` and ``load_state_dict`` are.
    """

    def __init__(self, channel_axis: int, quantizer: WeightQuantizer = UNIFORM) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.quantizer = quantizer
        self.bits = FLOAT_BITS
        self.scales: dict[int, Tensor] = {}
        # What `keep` was given, and the float weight it is for.
        self._kept: dict[int, Kept] = {}
        self._kept_for: Tensor | None = None
        self._seen: tuple[Tensor, int] | None = None
        self._rounded: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files get the scales, and round anew: their weight is another tensor.
        return {**self.__dict__, "_seen": None, "_rounded": {}}

    def scale(self, weight: Tensor, bits: int) -> Tensor:
        """Return the scale for ``bits``, shape ``(channels,)``; found once, then kept."""
        if bits not in self.scales:
            exact = torch.autocast(weight.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), exact:
                self.scales[bits] = self.quantizer.scale(weight, bits, self.channel_axis)
        if self.scales[bits].device != weight.device:
            self.scales[bits] = self.scales[bits].to(weight.device)
        return self.scales[bits]

    def keep(
        self,
        weight: Tensor,
        bits: int,
        rounded: Tensor,
        scale: Tensor,
        output_error: Tensor | None = None,
        training_start: Tensor | None = None,
    ) -> None:
        """Use ``rounded`` for ``weight`` at ``bits`` as long as the weight stays the same.

        Its values are whole multiples of ``scale``, ``(channels,)``. `output_error` returns
        ``output_error`` then, ``(channels,)``. ``training_start`` is the float weight behind the
        rounded one where the layer was trained at these bits before: training starts from it again.
        """
        more = output_error, training_start
        self.keep_as(weight, bits, Kept.of(rounded, scale, self.channel_axis, *more))

    def keep_as(self, weight: Tensor, bits: int, kept: Kept) -> None:
        """Use what `kept_at` returned for the same weight of another copy of the network."""
        if self._kept_for is None or not torch.equal(self._kept_for, weight):
            self._kept = {}
            self._kept_for = weight.detach().clone()
        self._kept[bits] = kept
        self.scales[bits] = kept.scale
        self._rounded.pop(bits, None)

    def kept_at(self, weight: Tensor, bits: int) -> Kept | None:
        """Return what `keep` was given for this weight as it is held, if anything."""
        return None if self.kept(weight, bits) is None else self._kept[bits]

    def retrained(self, scales: Mapping[int, Tensor]) -> None:
        """Use the scales of a trained weight, by bits, and forget all that was found before."""
        self.scales = dict(scales)
        self._kept, self._kept_for, self._seen = {}, None, None

    def kept(self, weight: Tensor, bits: int) -> Tensor | None:
        """Return what `keep` was given for this weight, if anything."""
        if bits not in self._kept or self._kept_for is None:
            return None
        same = self._kept_for.to(weight)  # the network may have gone to another device or type
        if not torch.equal(same, weight):
            return None
        if same is not self._kept_for:
            self._kept_for = same
            self._kept = {b: kept.to(weight.device) for b, kept in self._kept.items()}
        return self._kept[bits].rounded(weight.dtype, self.channel_axis)

    def training_start(self, weight: Tensor, bits: int) -> Tensor | None:
        """Return where training of this weight starts, if `keep` was told."""
        if self.kept(weight, bits) is None:
            return None
        start = self._kept[bits].training_start
        return None if start is None else start.to(weight.device)

    @torch.no_grad()
    def output_error(self, weight: Tensor, bits: int) -> Tensor:
        """Return each channel's squared error, weighted by what it does to the layer's output.

        For a compensated weight that is ΔW E[x xᵀ] ΔWᵀ over the mean of E[x²]: the squared error
        that would change the output as much if inputs were not correlated. Otherwise it is the
        squared error itself. Shape ``(channels,)``, float64, weight².
        """
        rounded = self.quantized(weight, bits)
        if self.kept(weight, bits) is not None:
            known = self._kept[bits].output_error
            if known is not None:
                return known.to(weight.device)
        change = (rounded.double() - weight.double()).movedim(self.channel_axis, 0)
        return change.flatten(1).square().sum(1)

    def quantized(self, weight: Tensor, bits: int) -> Tensor:
        """Return the rounded weight without gradient, kept until the weight changes."""
        if self._changed(weight):
            self._rounded.clear()
        if bits not in self._rounded:
            # What is kept must serve later in training too, so it is no inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                kept = self.kept(weight, bits)
                if kept is None:
                    scale = self.scale(weight, bits)
                    kept = self.quantizer.quantize(weight, scale, bits, self.channel_axis)
                elif self._kept[bits].codes.dtype == torch.int8:  # quickly made again
                    self._rounded.clear()
                self._rounded[bits] = kept
        return self._rounded[bits]

    def _changed(self, weight: Tensor) -> bool:
        """Return whether the weight has changed since the last call."""
        if weight.is_inference():  # keeps no count of its changes
            self._seen = None
            return True
        seen, self._seen = self._seen, (weight.detach(), weight._version)
        # `seen` holds the memory, so that no later tensor can have its address.
        return (
            seen is None
            or seen[0].data_ptr() != weight.data_ptr()
            or seen[0].dtype != weight.dtype
            or seen[1] != weight._version
        )

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        if self.bits == FLOAT_BITS:
            return weight
        with uncounted():
            return self._rounding(weight)

    def _rounding(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            scale = self.scale(weight, self.bits)
            nearest = self.quantizer.quantize(weight, scale, self.bits, self.channel_axis)
            kept = self.kept(weight, self.bits)
            # The value that was kept, with the gradient of rounding to nearest.
            return nearest if kept is None else kept + (nearest - nearest.detach())
        return self.quantized(weight, self.bits)


class InputFakeQuantize(nn.Module):
    """Rounds what enters a layer to `bits`.

    Ranges, by bits, are found from the histogram of what the layer received on the calibration set.
    A loaded result has no histogram and knows its ranges. ``grid`` is what the target takes.
    """

    def __init__(
        self,
        histogram: InputHistogram | None,
        observer: Observer = "squared_error",
        ranges: Mapping[int, AffineRange] | None = None,
        grid: InputGrid = ANY_GRID,
    ) -> None:
        super().__init__()
        self.histogram = histogram
        self.observer: Observer = observer
        self.grid = grid
        self.bits = FLOAT_BITS
        self.ranges: dict[int, AffineRange] = dict(ranges or {})

    def calibrate(
        self, histogram: InputHistogram, ranges: Mapping[int, AffineRange] | None = None
    ) -> None:
        """Find ranges from a histogram from here on; those of some bits may be known."""
        self.histogram = histogram
        self.ranges |= ranges or {}

    def range(self, bits: int) -> AffineRange:
        """Return scale and zero point for ``bits``; found once, then kept.

        Raises `ValueError` where the range was not saved, and there is no histogram to find it
        from.
        """
        if bits not in self.ranges:
            if self.histogram is None:
                raise ValueError(
                    f"No range is known for {bits}-bit activations: they were not calibrated. "
                    f"Known are: {sorted(self.ranges) or 'none'}."
                )
            self.ranges[bits] = self.histogram.range(bits, self.observer, self.grid)
        return self.ranges[bits]

    def quantized(self, x: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        """Return ``x`` rounded to ``bits``, without gradient in ``out``."""
        return quantize_activation(x, *self.range(bits), bits, out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input as the layer sees it."""
        return x if self.bits == FLOAT_BITS else self.quantized(x, self.bits)
