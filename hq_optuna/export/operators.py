"""The two operators of a deployed network, as PyTorch computes them.

They are operators of their own so that a traced graph holds them whole: a writer of files puts
ONNX's or QONNX's in their place, and `PLAIN` gives them in PyTorch's own for programs that shall
run without this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hq_optuna.quantization.functional import along, quantize_activation


@torch.library.custom_op("hq_optuna::quantize", mutates_args=())
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Round ``x`` to a grid of one scale, and return the values of the grid.

    ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) − zero_point) · scale``, with the
    division as `hq_optuna.quantization.functional` has it.
    """
    bits = (quant_max - quant_min).bit_length()
    return quantize_activation(x.detach(), float(scale), int(zero_point), bits)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hq_optuna::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return integer codes times their scales, which lie along ``axis``."""
    return codes.to(scale.dtype) * along(scale, codes.to(scale.dtype), axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _plain_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    zero = zero_point.to(torch.float32)
    codes = torch.clamp(torch.round(x * scale.reciprocal()), quant_min - zero, quant_max - zero)
    return codes * scale + 0.0  # no −0.0: integers have none


def _plain_dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    shape = [1] * codes.dim()
    shape[axis] = -1
    return codes.to(scale.dtype) * scale.reshape(shape)


PLAIN: dict[Any, Callable[..., Tensor]] = {
    torch.ops.hq_optuna.quantize.default: _plain_quantize,
    torch.ops.hq_optuna.dequantize.default: _plain_dequantize,
}
"""The operators in PyTorch's own, for `torch.export.ExportedProgram.run_decompositions`."""
