"""What rounded weights and inputs of a layer do to ⟨g, y⟩, sample by sample, at all bits at once.

A linear layer or a convolution computes y = W x at every place x of its input. A change of W moves
⟨g, y⟩, summed over places, by ⟨G, ΔW⟩ with G = Σ g xᵀ: the gradient of one sample in the weight. It
is computed once, and then each number of bits is one product with a small matrix. Where a sample
has few places it is cheaper to compute ΔW x itself. A change of x moves ⟨g, y⟩ by ⟨Wᵀ g, Δx⟩, and
the gradient in x is what a backward pass gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.layer_types import TRANSPOSED, has_known_axes
from hq_optuna.quantization.moments import patches

FEW_PLACES = 8
"""Places of a sample below which ΔW x is cheaper than G."""
MANY_PLACES = 128
"""Places from which PyTorch's convolution finds G faster than a product of unfolded patches."""
WIDE_KERNEL = 9
"""Taps above which PyTorch's gradient of a depthwise weight is slow."""
MOST_ELEMENTS = 2**22
"""Elements of G at a time."""
CHUNK = 2**16
"""Elements of an input rounded together: what stays in a cache."""


def is_plain(module: nn.Module) -> bool:
    """Say whether a layer is W x + bias as its class has it.

    Hooks of a user's could make it another; ours leave a layer in float as it is.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = all(getattr(hook, "__module__", "").startswith("hq_optuna.") for hook in hooks)
    return ours and has_known_axes(module) and not isinstance(module, TRANSPOSED)


def applied(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a plain layer makes of ``x`` with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight)
    found: Tensor = module._conv_forward(x, weight, None)
    return found


def by_outer_products(module: Any, y: Tensor) -> bool:
    """Say whether G is the cheaper way for a plain layer with this output."""
    if isinstance(module, nn.Linear):
        return math.prod(y.shape[1:-1]) >= FEW_PLACES
    fast = module.groups == 1 or math.prod(module.kernel_size) <= WIDE_KERNEL
    return fast and math.prod(y.shape[2:]) >= FEW_PLACES


def outer(module: Any, x: Tensor, g: Tensor, shape: torch.Size, *, summed: bool = False) -> Tensor:
    """Return Σ g xᵀ over the places of each sample, ``(N, *shape)``, or over all, ``shape``.

    Of a plain layer whose weight has this shape, ``x`` is the input and ``g`` like the output.
    """
    if isinstance(module, nn.Linear):
        g, x = g.reshape(len(g), -1, g.shape[-1]), x.reshape(len(x), -1, x.shape[-1])
        return g.flatten(0, 1).mT @ x.flatten(0, 1) if summed else g.mT @ x
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
    n, axes = len(x), x.dim() - 2
    if not summed and math.prod(g.shape[2:]) < MANY_PLACES:
        seen = patches(x, shape[2:], module.stride, module.dilation, module.groups)
        seen = seen.reshape(n, -1, module.groups, math.prod(shape[1:])).transpose(1, 2)
        return (g.reshape(n, module.groups, shape[0] // module.groups, -1) @ seen).reshape(
            n, *shape
        )
    if not summed:  # with samples as groups, each has a weight of its own, and a gradient of it
        x, g = (v.reshape(1, -1, *v.shape[2:]) for v in (x, g))
    groups = 1 if summed else n
    _, found, _ = torch.ops.aten.convolution_backward(
        *(g, x, g.new_empty(1).expand(groups * shape[0], *shape[1:]), None),
        *(module.stride, [0] * axes, module.dilation, False, [0] * axes),
        *(groups * module.groups, [False, True, False]),
    )
    gradient: Tensor = found
    return gradient if summed else gradient.reshape(n, *shape)


def weight_changes(module: Any, x: Tensor, gradients: Sequence[Tensor], changes: Tensor) -> Tensor:
    """Return ⟨G, ΔW⟩ for changes ``(B, *weight.shape)``: ``(B, probes, N)``."""
    shape, flat = changes.shape[1:], changes.flatten(1).mT
    rows = max(1, MOST_ELEMENTS // shape.numel())
    parts = range(0, len(x), rows)

    def of(g: Tensor, i: int) -> Tensor:
        return outer(module, x[i : i + rows], g[i : i + rows], shape).flatten(1) @ flat

    return torch.stack([torch.cat([of(g, i) for i in parts]) for g in gradients]).movedim(2, 0)


def input_changes(
    x: Tensor,
    gradients: Sequence[Tensor],
    bits: Sequence[int],
    quantized: Callable[[Tensor, int, Tensor], Tensor],
) -> Tensor:
    """Return ⟨Wᵀ g, Δx⟩ for each number of bits, ``(B, probes, N)`` float64.

    ``gradients`` are those in the input. ``quantized(x, bits, out)`` rounds into a buffer.
    """
    n, rows = len(x), x.flatten(1)
    found = x.new_zeros(len(bits), len(gradients), n, dtype=torch.float64)
    if not x.numel():
        return found
    flat = [g.flatten(1) for g in gradients]
    width = min(rows.shape[1], CHUNK)
    height = max(1, CHUNK // width)
    buffer = x.new_empty(height * width)
    for i in range(0, n, height):
        for j in range(0, rows.shape[1], width):
            part = rows[i : i + height, j : j + width]
            g = torch.stack([one[i : i + height, j : j + width] for one in flat], 1)
            out = buffer[: part.numel()].view(part.shape)
            for place, b in enumerate(bits):
                change = quantized(part, b, out).sub_(part)
                found[place, :, i : i + height] += (g @ change[:, :, None]).squeeze(2).mT
    return found
