"""Learned step sizes: rounding whose scale takes gradient (LSQ, Esser et al., 2020).

The value is x̂ = s · clamp(round(x / s)), as everywhere. The gradient sees the rounding as if it
added a constant r = round(x / s) − x / s, and the clipping as it is:

    ∂x̂/∂x = 1 inside the grid, 0 outside
    ∂x̂/∂s = r inside the grid, the last code outside

We differ from LSQ in what is trained: log s instead of s, as in TQT (Jain et al., 2020). A step of
the optimizer changes a scale by a share of itself, whether it belongs to weights of 0.01 or to
activations of 10, and never makes it negative. With ∂x̂/∂log s = s · ∂x̂/∂s all of it comes to

    ∂L/∂log s = Σ g · x̂ − Σ (g inside) · x

two inner products with tensors that the layer keeps anyway. LSQ multiplies the gradient of s by
1 / √(n · quant_max), so that SGD moves scales and weights by like shares; in terms of log s that is
1 / (√(n · quant_max) · s₀²) with s₀ the scale at the start. To Adam it makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.quantization.functional import activation_grid, along
from hq_optuna.quantization.modules import InputFakeQuantize
from hq_optuna.quantization.prepare import (
    float_weight,
    input_quantizer,
    prepared_layers,
    weight_quantizer,
)
from hq_optuna.quantization.quantizers import UNIFORM, WeightQuantizer
from hq_optuna.quantization.quantizers.midrise import odd_codes
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.space.layers import FLOAT_BITS


class _Rounding(torch.autograd.Function):
    """s · clamp(round(x / s), low, high) with gradients of x and log s; or s · odd numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor,
        low: int,
        high: int,
        factor: Tensor | float,
        passes: bool,
        odd: bool,
    ) -> Tensor:
        scale = log_scale.exp()
        codes = odd_codes(x, scale, high) if odd else (x * (1 / scale)).round_().clamp_(low, high)
        rounded = codes.mul_(scale)
        ctx.save_for_backward(x, rounded, scale)
        ctx.grid = low, high, odd
        ctx.factor, ctx.passes = factor, passes
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, rounded, scale = ctx.saved_tensors
        low, high, odd = ctx.grid
        learns = ctx.needs_input_grad[1]
        inside = g
        if learns or not ctx.passes:
            if scale.numel() == 1 and not odd:
                s = float(scale)
                inside = torch.ops.aten.hardtanh_backward(g, x, low * s, high * s)
            else:
                inside = g * ((x >= low * scale) & (x <= high * scale))
        by_scale = None
        if learns:
            by_scale = _log_scale_gradient(g, rounded, inside, x, scale) * ctx.factor
        by_x = (g if ctx.passes else inside) if ctx.needs_input_grad[0] else None
        return by_x, by_scale, None, None, None, None, None


def _log_scale_gradient(
    g: Tensor, rounded: Tensor, inside: Tensor, x: Tensor, scale: Tensor
) -> Tensor:
    """Return Σ g · x̂ − Σ inside · x, summed to the scale's shape."""
    if scale.numel() == 1:
        gradient = _inner(g, rounded) - _inner(inside, x)
    else:
        gradient = (g * rounded - inside * x).sum_to_size(scale.shape)
    return gradient.to(scale.dtype).reshape(scale.shape)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a · b, in single precision at least."""
    if a.dtype in (torch.bfloat16, torch.float16):
        a, b = a.float(), b.float()
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.movedim(1, -1), b.movedim(1, -1)
    # One pass over memory where the layout is the same; a product would write a tensor first.
    return torch.dot(a.reshape(-1), b.reshape(-1))


class _Scaled(torch.autograd.Function):
    """A rounded tensor whose codes are given: the gradient of log s is g · x̂, that of x passes."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, log_scale: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(rounded)
        ctx.shape, ctx.factor = log_scale.shape, factor
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        (rounded,) = ctx.saved_tensors
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = (g * rounded).sum_to_size(ctx.shape) * ctx.factor
        return g, by_scale, None


class LearnedWeight(nn.Module):
    """Parametrization that rounds a weight with learned scales, one a channel.

    ``uniform``, ``ternary`` and ``midrise`` get LSQ's gradients. Where codes do not depend on the
    scale (one bit, ``dorefa``), that of the scale is Σ g · code, and that of the weight is the
    quantizer's own. Scales start at ``scale``, ``(channels,)``, and are learned as `log_scale`.
    ``passes`` says whether gradients of clipped weights pass.
    """

    def __init__(
        self,
        scale: Tensor,
        weight: Tensor,
        bits: int,
        channel_axis: int,
        passes: bool,
        quantizer: WeightQuantizer = UNIFORM,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.channel_axis = channel_axis
        self.passes = passes
        self.quantizer = quantizer
        start = scale.detach().to(weight.dtype)
        self.log_scale = nn.Parameter(start.log())
        n = weight.numel() // len(scale)
        self.largest = quantizer.largest_code(bits)
        self.factor = along(
            1 / (math.sqrt(n * self.largest) * start.square()), weight, channel_axis
        )

    @property
    def scale(self) -> Tensor:
        """The scales as they are now, float32."""
        return self.log_scale.detach().exp().float()

    @property
    def clips(self) -> bool:
        """Whether there are weights beyond the largest code."""
        return self.bits > 1 and self.quantizer.name in ("uniform", "ternary", "midrise")

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        log_scale = along(self.log_scale, weight, self.channel_axis)
        if not self.clips:
            rounded = self.quantizer.quantize(weight, self.scale, self.bits, self.channel_axis)
            scaled: Tensor = _Scaled.apply(rounded, log_scale, self.factor)
            return scaled
        grid, odd = (-self.largest, self.largest), self.quantizer.name == "midrise"
        learned: Tensor = _Rounding.apply(weight, log_scale, *grid, self.factor, self.passes, odd)
        return learned

    def n_clipped(self, weight: Tensor) -> int:
        """Return how many weights lie beyond the largest code; none where nothing clips."""
        if not self.clips:
            return 0
        end = self.largest * along(self.log_scale.detach().exp(), weight, self.channel_axis)
        return int((weight.detach().abs() > end).sum())


class LearnedInput(InputFakeQuantize):
    """Rounds what enters a layer with one learned scale; the zero point stays."""

    def __init__(
        self, start: AffineRange, bits: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(None)
        self.bits = bits
        self.zero_point = start.zero_point
        self.start = start.scale
        value = torch.tensor(start.scale, dtype=dtype, device=device)
        self.log_scale = nn.Parameter(value.log())

    @property
    def learned(self) -> AffineRange:
        """Scale and zero point as they are now."""
        return AffineRange(float(self.log_scale.detach().exp().float()), self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded input."""
        quant_min, quant_max = activation_grid(self.bits)
        n = max(x.numel() // max(len(x), 1), 1)  # an expert may get no sample
        factor = 1 / (math.sqrt(n * quant_max) * self.start**2)
        low, high = quant_min - self.zero_point, quant_max - self.zero_point
        rounded: Tensor = _Rounding.apply(x, self.log_scale, low, high, factor, False, False)
        return rounded


@dataclass
class LearnedSteps:
    """The learned step sizes of a prepared network, for the bits it has.

    By layer: what rounds its weight while it is trained, and what rounds its input.
    """

    weights: dict[str, LearnedWeight]
    inputs: dict[str, LearnedInput]

    @classmethod
    def of(cls, network: nn.Module, passes: bool) -> LearnedSteps:
        """Start from the scales and ranges of a prepared network; layers in float have none."""
        weights, inputs = {}, {}
        for name, module in prepared_layers(network).items():
            weight, quantizer = float_weight(module), weight_quantizer(module)
            if quantizer.bits != FLOAT_BITS:
                scale, axis = quantizer.scale(weight, quantizer.bits), quantizer.channel_axis
                given = scale, weight, quantizer.bits, axis, passes, quantizer.quantizer
                weights[name] = LearnedWeight(*given)
            bits = input_quantizer(module).bits
            if bits != FLOAT_BITS:
                start = input_quantizer(module).range(bits)
                inputs[name] = LearnedInput(start, bits, weight.dtype, weight.device)
        return cls(weights, inputs)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the logarithms of all scales by name, weights' first."""
        for name, weight in self.weights.items():
            yield f"weight_step.{name}", weight.log_scale
        for name, entering in self.inputs.items():
            yield f"input_step.{name}", entering.log_scale

    @contextmanager
    def used_in(self, network: nn.Module) -> Iterator[None]:
        """Let the network round with these; afterwards its own quantizers get their scales."""
        layers = prepared_layers(network)
        weights = {name: weight_quantizer(layers[name]) for name in self.weights}
        inputs = {name: input_quantizer(layers[name]) for name in self.inputs}
        try:
            _round_with_(layers, self.weights, self.inputs)
            yield
        finally:
            _round_with_(layers, weights, inputs)
            self.write_back(network)

    def write_back(self, network: nn.Module) -> None:
        """Give the scales to the network's quantizers; scales of other bits are found anew."""
        layers = prepared_layers(network)
        for name in layers:
            known = {}
            if name in self.weights:
                known[self.weights[name].bits] = self.weights[name].scale
            weight_quantizer(layers[name]).retrained(known)
        for name, entering in self.inputs.items():
            input_quantizer(layers[name]).ranges[entering.bits] = entering.learned


def _round_with_(
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, nn.Module],
    inputs: Mapping[str, InputFakeQuantize],
) -> None:
    for name, quantizer in weights.items():
        layers[name].parametrizations.weight[-1] = quantizer  # type: ignore[union-attr, operator, assignment]
    for name, entering in inputs.items():
        layers[name].input_fake_quantize = entering
