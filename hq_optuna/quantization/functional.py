"""Fake quantization as pure functions: round in float, keep the gradient.

The rounding is PyTorch's own (`torch.fake_quantize_per_channel_affine` and
`…_per_tensor_affine`), so what is scored here is what PyTorch's tools compute elsewhere:

    q = clamp(round(x · (1 / scale)) + zero_point, quant_min, quant_max)
    Q(x) = (q − zero_point) · scale

Its gradient is the straight-through estimator: 1 inside the range, 0 where a value is clipped.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def weight_grid(bits: int) -> tuple[int, int]:
    """Return ``(quant_min, quant_max)`` of signed weights, as many steps below zero as above.

    The one code that two's complement has beyond that, −2ᵇ⁻¹, stays unused. With it the squared
    error is smaller, but positive weights are clipped earlier than negative ones, and that bias
    shifts every channel.

    Example:
        >>> weight_grid(8), weight_grid(2)
        ((-127, 127), (-1, 1))
    """
    return -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1


def activation_grid(bits: int) -> tuple[int, int]:
    """Return ``(quant_min, quant_max)`` of activations: always 0 to 2ᵇ − 1, with a zero point.

    Example:
        >>> activation_grid(4)
        (0, 15)
    """
    return 0, 2**bits - 1


def quantize_weight(weight: Tensor, scale: Tensor, bits: int, channel_axis: int) -> Tensor:
    """Round a weight to its symmetric per-channel grid; scales ``(channels,)`` are positive.

    One bit is the exception: ``sign(w) · scale``, the binary weights of XNOR-Net (Rastegari et al.,
    2016), whose gradient passes straight through.

    Example:
        >>> w = torch.tensor([[0.30, -1.04], [2.0, 0.1]])
        >>> quantize_weight(w, torch.tensor([0.5, 1.0]), bits=3, channel_axis=0)
        tensor([[ 0.5000, -1.0000],
                [ 2.0000,  0.0000]])
    """
    if bits == 1:
        signs = torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)
        return straight_through(signs * along(scale, weight, channel_axis), weight)
    quant_min, quant_max = weight_grid(bits)
    zero = torch.zeros(scale.shape, dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, zero, channel_axis, quant_min, quant_max
    )


def quantize_activation(
    x: Tensor, scale: float, zero_point: int, bits: int, out: Tensor | None = None
) -> Tensor:
    """Round activations to a per-tensor affine grid; ``zero_point`` is the code of 0.0.

    Without gradient, single precision on a CPU takes four plain passes, which are ten times faster
    than PyTorch's fake quantization (it also writes a mask for the gradient) and equal to it bit
    for bit, signs of zeros included. A NaN stays NaN, where PyTorch would make ``quant_min`` of it.
    Without gradient the result may go into a tensor ``out`` of the same shape.

    Example:
        >>> quantize_activation(torch.tensor([-0.2, 0.6, 9.0]), scale=0.5, zero_point=1, bits=2)
        tensor([0.0000, 0.5000, 1.0000])
    """
    quant_min, quant_max = activation_grid(bits)
    graded = torch.is_grad_enabled() and x.requires_grad
    if graded or x.dtype != torch.float32 or x.device.type != "cpu":
        rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
        rounded = torch.where(x.isnan(), x, rounded)
        return rounded if out is None else out.copy_(rounded)
    scale_32 = np.float32(scale)  # and single precision in the division, as PyTorch has it
    rounded = torch.mul(x, float(np.float32(1) / scale_32), out=out)
    rounded.round_().clamp_(quant_min - zero_point, quant_max - zero_point)
    # 0 + scale · q instead of q · scale turns −0.0 into 0.0, as PyTorch's integers do.
    return torch.add(_ZERO, rounded, alpha=float(scale_32), out=rounded)


_ZERO = torch.tensor(0.0, device="cpu")


def along(scale: Tensor, weight: Tensor, channel_axis: int) -> Tensor:
    """Return the scale in the weight's precision, shaped to multiply it along an axis.

    A transposed convolution in groups has axis 1 for the outputs of one group, and one scale for
    each output of all groups, in their order.
    """
    scale, n = scale.to(weight.dtype), weight.shape[channel_axis]
    if len(scale) > n:
        groups = scale.reshape(len(scale) // n, 1, n)
        rows = groups.expand(-1, len(weight) // len(groups), n).reshape(len(weight), n)
        return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
    shape = [1] * weight.dim()
    shape[channel_axis] = -1
    return scale.reshape(shape)


def straight_through(rounded: Tensor, smooth: Tensor) -> Tensor:
    """Return ``rounded``, with the gradient of ``smooth``; the sum is exact because it adds zero.

    Example:
        >>> w = torch.tensor([0.3, -2.0], requires_grad=True)
        >>> straight_through(w.round(), 3 * w).sum().backward()
        >>> w.grad
        tensor([3., 3.])
    """
    return rounded.detach() + (smooth - smooth.detach())
