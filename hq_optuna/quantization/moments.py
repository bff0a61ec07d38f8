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
from hq_optuna.network.layer_types import TRANSPOSED
from hq_optuna.network.operators.weight_uses import WatchedWeights, WeightUse
from hq_optuna.network.products import Product
from hq_optuna.space.layers import LayerSpec

PLACES_PER_INPUT = 64
"""Places looked at for each column of the moment matrix; more change its entries by noise only.
Fewer are cheaper; a single trial with half of them gave a keyword network a worse answer at 3 bits,
though the felt error of rounding hardly moved."""
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

    Layer → ``(groups, d, d)`` float64 with d = weights per output channel. x is what PyTorch's
    operators multiply the weight with, so a layer may pad or transpose its input in a way of its
    own. Left out are transposed convolutions, whose errors overlap, layers with more than
    `MOST_COLUMNS` inputs per output, and those that multiply another weight, or in another way.
    Where a layer sees more places than tell anything new, a random part of them is taken, the same
    one at each call.
    """
    weights: dict[str, Tensor] = {
        layer.name: network.get_submodule(layer.name).weight.detach()  # type: ignore[operator]
        for layer in layers
        if can_have_moments(network.get_submodule(layer.name))
    }
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(weights, 0)
    unknown: set[str] = set()
    n = 0

    def see(name: str, use: WeightUse) -> None:
        view = _places(use, weights[name])
        if view is None:
            unknown.add(name)
            return
        d = columns(network.get_submodule(name))
        # Axes of places first; groups, channels and the kernel's axes behind them.
        shape = view.shape[: 1 if weights[name].dim() == 2 else view.dim() // 2]
        least = LEAST_PLACES if view.shape[len(shape)] == 1 else LEAST_PLACES // 4  # in each group
        total, wanted = math.prod(shape), max(PLACES_PER_INPUT * d, least)
        most = math.ceil(wanted * n / data.n_samples)
        picked = torch.arange(total, device="cpu")
        if total > most:
            generator = torch.Generator().manual_seed(counts[name])
            # One at random of each of as many equal stretches.
            drawn = torch.rand(most, generator=generator, dtype=torch.float64, device="cpu")
            picked = ((picked[:most] + drawn) * (total / most)).long().clamp_max(total - 1)
        for part in torch.split(picked, max(1, MOST_ELEMENTS // d)):
            index = torch.unravel_index(part.to(view.device), shape)
            rows = view[index].flatten(2).movedim(1, 0)  # (groups, places, d)
            if rows.dtype.itemsize < 4:  # rounded sums need not be a matrix of moments any more
                rows = rows.float()
            seen = products(rows)
            sums[name] = sums[name] + seen if name in sums else seen
            counts[name] += len(part)

    with WatchedWeights(weights, see):
        for batch in data:
            n = batch.n
            forward(network, batch.inputs)
    return {
        name: _channels_first(total / counts[name], weights[name])
        for name, total in sums.items()
        if name not in unknown and counts[name]
    }


def products(rows: Tensor) -> Tensor:
    """Return the sums of x xᵀ, ``(groups, d, d)`` float64, of rows ``(groups, places, d)``.

    Products are made in the rows' own precision. Where their squares are too small or too large for
    it, a power of two brings them near to 1 first: the same digits, and nothing is lost.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], *2 * rows.shape[2:], dtype=torch.float64)
    found = (rows.mT @ rows).double()
    largest = found.diagonal(dim1=1, dim2=2).amax(1)
    odd = ~((largest > 2.0**-60) & (largest < 2.0**120))
    if not bool(odd.any()):
        return found
    exponent = torch.frexp(rows[odd].abs().amax((1, 2), keepdim=True)).exponent.clamp(-126, 126)
    odd[odd.clone()] = exponent.flatten() != 0  # of an input that is always zero there is no more
    if bool(odd.any()):
        exponent = exponent[exponent.flatten() != 0]
        near_one = torch.ldexp(rows[odd], -exponent)
        found[odd] = torch.ldexp((near_one.mT @ near_one).double(), 2 * exponent)
    return found


def can_have_moments(module: nn.Module) -> bool:
    """Return whether `input_moments` may know what this layer's weight is multiplied with."""
    if isinstance(module, (Product, *TRANSPOSED)):
        return False
    return columns(module) <= MOST_COLUMNS


def columns(module: nn.Module) -> int:
    """Return d, the weights that one output channel has."""
    weight: Any = module.weight
    return math.prod(weight.shape[1:])


def _places(use: WeightUse, weight: Tensor) -> Tensor | None:
    """Return a view of what a weight was multiplied with; ``None`` where it was in another way.

    For a linear layer ``(places, 1, d)``; for a convolution of k axes ``(N, places of each axis,
    groups, channels of a group, kernel of each axis)``, or, with one group, channels last: many
    numbers that lie next to each other are fetched faster.
    """
    if use.operator in (torch.ops.aten.mm, torch.ops.aten.addmm):
        x, by = use.arguments[-2:]
        same = (
            by is use.weight and by.shape == weight.mT.shape and by.stride() == weight.mT.stride()
        )
        return x[:, None] if same and isinstance(x, Tensor) else None
    if use.operator is not torch.ops.aten.convolution or use.weight.shape != weight.shape:
        return None
    x, _, _, stride, padding, dilation, transposed, _, groups = use.arguments
    if transposed:
        return None
    x = functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
    return _padded_places(x, weight, stride, dilation, groups)


def _padded_places(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    if groups > 1:
        return patches(x, weight.shape[2:], stride, dilation, groups)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    found = patches(x, weight.shape[2:], stride, dilation, groups)
    return found.movedim(weight.dim(), -1)


class LayerPlaces:
    """What one of PyTorch's own convolutions or linear layers multiplies its weight with.

    Attributes:
        n: Number of places.
    """

    def __init__(self, layer: Any, x: Tensor) -> None:
        weight: Tensor = layer.weight
        if weight.dim() == 2:
            self._view = x.reshape(-1, 1, x.shape[-1])
        else:
            x = x if x.dim() == weight.dim() else x[None]
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
            told = layer.stride, layer.dilation, layer.groups
            self._view = _padded_places(x, weight, *told)
        self._shape = self._view.shape[: 1 if weight.dim() == 2 else self._view.dim() // 2]
        self._weight, self.n = weight, math.prod(self._shape)

    def rows(self, index: Tensor) -> Tensor:
        """Return ``(groups, places, d)`` of the given places, columns as the weight has them."""
        at = torch.unravel_index(index.to(self._view.device), self._shape)
        found = self._view[at]  # (places, groups, …)
        if self._weight.dim() > 2 and found.shape[1] == 1:
            found = found.movedim(-1, 2)
        return found.flatten(2).movedim(1, 0)


def _channels_first(moment: Tensor, weight: Tensor) -> Tensor:
    """Return moments as `_places` shows the columns, in the order of the weight's."""
    c, k = weight.shape[1], math.prod(weight.shape[2:])
    if len(moment) > 1 or k == 1:
        return moment
    return moment.reshape(1, k, c, k, c).permute(0, 2, 1, 4, 3).reshape(moment.shape)


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Return a view of all patches of a padded ``(N, C, …)``, for a kernel of k axes.

    Its shape is ``(N, places of each axis, groups, channels of a group, kernel of each axis)``.
    """
    axes = len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
    x = x.reshape(len(x), groups, -1, *x.shape[2:])
    return x.movedim((1, 2), (1 + axes, 2 + axes))
