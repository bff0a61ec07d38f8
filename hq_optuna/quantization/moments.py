"""Second moments of what enters each layer: E[x xᵀ], which tells how weight errors add up.

A layer computes W x at every place x of its input (a patch for a convolution), so a change ΔW of
its weight changes its output by E‖ΔW x‖² = tr(ΔW E[x xᵀ] ΔWᵀ) on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.batches import Batches, forward
from hq_optuna.network.layer_types import TRANSPOSED, has_known_axes
from hq_optuna.quantization.observers import watch_inputs
from hq_optuna.space.layers import LayerSpec

PLACES_PER_INPUT = 64
"""Places looked at for each column of the moment matrix; more change its entries by noise only."""
LEAST_PLACES = 16_384
MOST_COLUMNS = 8192
"""Widest layer whose moments are gathered: 512 MiB in double precision."""
MOST_ELEMENTS = 2**24
"""Elements of patches unfolded together."""


@torch.no_grad()
def input_moments(
    network: nn.Module, layers: Sequence[LayerSpec], data: Batches
) -> dict[str, Tensor]:
    """Return E[x xᵀ] of each layer over samples and places, from one pass of the float network.

    Layer → ``(groups, d, d)`` float64 with d = weights per output channel. Transposed convolutions,
    whose errors overlap, and layers with more than `MOST_COLUMNS` inputs per output are left out.
    Where a layer sees more places than tell anything new, a random part of them is taken, the same
    one at each call.
    """
    watched = {
        layer.name: columns(network.get_submodule(layer.name))
        for layer in layers
        if can_have_moments(network.get_submodule(layer.name))
    }
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(watched, 0)
    n = 0

    def see(name: str, x: Tensor) -> None:
        module: Any = network.get_submodule(name)
        view = _places(module, x.detach())
        # Axes of places first; groups, channels and the kernel's axes behind them.
        shape = view.shape[: 1 if isinstance(module, nn.Linear) else view.dim() // 2]
        total, wanted = math.prod(shape), max(PLACES_PER_INPUT * watched[name], LEAST_PLACES)
        most = math.ceil(wanted * n / data.n_samples)
        picked = torch.arange(total, device="cpu")
        if total > most:
            generator = torch.Generator().manual_seed(counts[name])
            drawn = torch.randperm(total, generator=generator, device="cpu")
            picked = drawn[:most].sort().values
        for part in torch.split(picked, max(1, MOST_ELEMENTS // watched[name])):
            index = torch.unravel_index(part.to(x.device), shape)
            rows = view[index].flatten(2).movedim(1, 0)  # (groups, places, d)
            if rows.dtype.itemsize < 4:  # rounded sums need not be a matrix of moments any more
                rows = rows.float()
            seen = _products(rows)
            sums[name] = sums[name] + seen if name in sums else seen
            counts[name] += len(part)

    with watch_inputs(network, list(watched), see):
        for batch in data:
            n = batch.n
            forward(network, batch.inputs)
    return {name: total / counts[name] for name, total in sums.items()}


def _products(rows: Tensor) -> Tensor:
    """Return the sums of x xᵀ, ``(groups, d, d)`` float64, of rows ``(groups, places, d)``.

    Products are made in the rows' own precision, of values that a power of two brings near to 1:
    the same digits, and nothing is lost of inputs whose squares are too small or too large for it.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], *2 * rows.shape[2:], dtype=torch.float64)
    exponent = torch.frexp(rows.abs().amax((1, 2), keepdim=True)).exponent.clamp(-126, 126)
    near_one = torch.ldexp(rows, -exponent)
    return torch.ldexp((near_one.mT @ near_one).double(), 2 * exponent)


def can_have_moments(module: nn.Module) -> bool:
    """Return whether `input_moments` knows how this module meets its input."""
    if isinstance(module, TRANSPOSED) or not has_known_axes(module):
        return False
    return columns(module) <= MOST_COLUMNS


def columns(module: nn.Module) -> int:
    """Return d, the weights that one output channel has."""
    weight: Any = module.weight
    return math.prod(weight.shape[1:])


def _places(module: Any, x: Tensor) -> Tensor:
    """Return a view of what a linear layer or a convolution multiplies its weight with.

    For a linear layer ``(places, 1, d)``; for a convolution of k axes ``(N, places of each axis,
    groups, channels of a group, kernel of each axis)``.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    axes = len(module.kernel_size)
    if x.dim() == axes + 1:  # without an axis of samples
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis in range(axes):
        size, step, gap = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
        x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
    x = x.reshape(len(x), module.groups, -1, *x.shape[2:])
    return x.movedim((1, 2), (1 + axes, 2 + axes))
