"""Mean and variance per channel, in the time of reading the tensor twice.

`torch.var_mean` over all axes but the channels is exact to the last digit and, on a CPU, takes as
long as a convolution. The sums of a channel's values and of their squares, sample by sample in
single precision and then over the samples in double, take a tenth of that. The variance is what is
left of the squares without the mean; where little is left, the mean is taken away first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches
from hq_optuna.network.layer_types import runs_forward_of

MOST_CANCELLATION = 8.0
"""Mean square over variance above which a channel is centred first. Relative errors measured
against double precision stay below 3e-6 at this bound, and below 3e-7 where the mean is small."""

LEAST_SAMPLES = 128
"""Statistics of more samples than this made no difference to what they correct."""
LEAST_BATCHES = 16
"""Statistics come from so many batches at least: each may hold samples of one kind."""
MOST_ELEMENTS = 2**26
"""Elements of the largest tensor, all batches together: they go through the network together."""


def statistics_places(
    data: Batches,
    largest: int,
    *,
    least_samples: int = LEAST_SAMPLES,
    least_batches: int = LEAST_BATCHES,
    most_elements: int = MOST_ELEMENTS,
) -> tuple[int, ...]:
    """Return which batches statistics are measured on, in order: a seeded random part of all.

    ``largest`` are the elements of a sample's largest tensor. One batch is always taken.
    """
    generator = torch.Generator().manual_seed(0)
    places: list[int] = []
    n = 0
    for place in torch.randperm(len(data), generator=generator, device="cpu").tolist():
        enough = n >= least_samples and len(places) >= least_batches
        if enough or (places and (n + data[place].n) * largest > most_elements):
            break
        places.append(place)
        n += data[place].n
    return tuple(sorted(places))


class ChannelStatistics(NamedTuple):
    """Mean and variance per channel, ``(channels,)`` each, of ``n`` values a channel."""

    n: int
    mean: Tensor
    var: Tensor


def statistics_of(x: Tensor, axis: int) -> ChannelStatistics:
    """Return `channel_statistics` with how many values of a channel they are of, maybe none."""
    n = x.numel() // max(x.shape[axis], 1)
    return ChannelStatistics(n, *(channel_statistics(x, axis) if n else (x.sum(), x.sum())))


def pooled(parts: Sequence[ChannelStatistics]) -> tuple[Tensor | None, Tensor | None]:
    """Return mean and variance of all values together; ``None`` where there is no value."""
    parts = [part for part in parts if part.n]
    if not parts:
        return None, None
    if len(parts) == 1:
        return parts[0].mean, parts[0].var
    total = sum(part.n for part in parts)
    mean = sum(part.n / total * part.mean.double() for part in parts)
    var = sum(
        part.n / total * (part.var.double() + (part.mean.double() - mean).square())
        for part in parts
    )
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    return mean.to(parts[0].mean.dtype), var.to(parts[0].var.dtype)


def channel_statistics(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance (not Bessel-corrected) per channel, each ``(channels,)``.

    They are in single precision at least.

    Example:
        >>> channel_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), axis=1)
        (tensor([2., 5.]), tensor([1., 0.]))
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    rows = _rows(x, axis)
    if rows is None:
        others = [a for a in range(x.dim()) if a != axis % x.dim()]
        var, mean = torch.var_mean(x, others, correction=0)
        return mean, var
    mean, square = _moments(*rows)
    var = square - mean.square()
    again = square > MOST_CANCELLATION * var  # also where rounding made it negative
    if bool(again.any()):
        places = again.nonzero().flatten()
        centre = mean[places].float()
        values, dim = rows
        values = values.index_select(3 - dim, places).sub_(centre[:, None] if dim == 2 else centre)
        rest, square = _moments(values, dim)
        mean[places], var[places] = centre + rest, (square - rest.square()).clamp_min(0)
    return mean.float(), var.float()


def _moments(rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the means of values and squares per channel in double precision, shape ``(C,)``."""
    n = rows.shape[0] * rows.shape[dim]
    if dim == 2:
        squares = torch.linalg.vector_norm(rows, dim=2).double().square()
    else:
        squares = rows.square().sum(1).double()
    return rows.sum(dim).double().sum(0) / n, squares.sum(0) / n


def _rows(x: Tensor, axis: int) -> tuple[Tensor, int] | None:
    """Return a view by samples, ``(N, C, places)`` or ``(N, places, C)``, and where places are.

    That is where memory of a CPU is laid out so; otherwise ``None``.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() < 3 or not x.numel():
        return None
    if axis == 1 and x.is_contiguous():
        return x.flatten(2), 2
    last = x.movedim(axis, -1)
    if axis % x.dim() and last.is_contiguous():
        return last.flatten(1, -2), 1
    return None


@torch.no_grad()
def follows_statistics(module: Any, x: Tensor) -> bool:
    """Say whether a batch-norm normalizes axis 1 by the statistics that it stores.

    PyTorch's own does. One with a forward pass of its own is asked: its output stays when its input
    and its stored mean move by the same amounts, and when the input's distance to the mean and
    the stored deviation grow by the same factor.
    """
    if runs_forward_of(module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return True
    mean, var = module.running_mean.clone(), module.running_var.clone()
    if x.dim() < 2 or x.shape[1] != len(mean) or not x.numel():
        return False
    shape = [1, -1, *[1] * (x.dim() - 2)]
    factors = torch.linspace(0.5, 1.5, len(mean), device=mean.device).to(mean)
    step = (var.sqrt() + mean.abs()) * factors
    try:
        expected = module.forward(x.clone())
        module.running_mean.copy_(mean + step)
        moved = module.forward(x + step.reshape(shape))
        module.running_mean.copy_(mean)
        module.running_var.copy_(4 * (var + module.eps) - module.eps)
        grown = module.forward(mean.reshape(shape) + 2 * (x - mean.reshape(shape)))
    except Exception:  # of a forward pass that takes something else
        return False
    finally:
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
    near = 1e-3 * float(expected.std() if expected.numel() > 1 else expected.abs().max())
    same_shape = moved.shape == grown.shape == expected.shape
    return same_shape and float((torch.stack([moved, grown]) - expected).abs().max()) <= near
