"""Compensated rounding: each weight's rounding error is made up for by the weights after it.

Rounding to nearest makes the error of each weight small. What counts is the error of the layer's
output, tr(ΔW E[x xᵀ] ΔWᵀ), in which errors of weights that meet correlated inputs cancel or add up.
Column by column, in falling order of E[x²], a weight is rounded and the columns still to come take
up its error as well as they can (OBQ's step in the order of GPTQ: Frantar & Alistarh, 2022;
Frantar et al., 2023). No training, no labels, no gradient; the float network's inputs are all.

Beyond GPTQ, each channel tries several scales and keeps what has the least output error; rounding
to nearest is among what is tried, so a channel never gets worse by it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches
from hq_optuna.quantization.moments import can_have_moments, columns, input_moments
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.quantizers import UNIFORM, WeightQuantizer
from hq_optuna.settings import Rounding
from hq_optuna.space.layers import LayerSpec

logger = logging.getLogger(__name__)

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of the mean of E[x²] added to the diagonal: GPTQ's, and more where that is singular."""
BLOCK = 128
FEW_BITS = 4
SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Multiples of the scale with the least weight error that are tried up to `FEW_BITS`."""
MOST_BITS = 8
"""Beyond this, rounding errors do not matter and weights are rounded to nearest."""
MOST_ELEMENTS = 2**25
"""Elements of weights rounded together."""
MOST_BYTES = 2**30
"""Moments gathered in one pass; a network with more takes several passes."""


def compensate_weights(
    prepared: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    bits: Mapping[str, Collection[int]],
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Give a prepared network, which is in float, compensated weights for these bits of its layers.

    Transposed convolutions, very wide layers, bits above `MOST_BITS` and layers whose quantizer
    does not allow it stay rounded to nearest. Labels of the data are not read. ``progress`` is
    called with (layers done, layers).
    """
    done = 0
    for group in _fitting_memory(prepared, layers):
        moments = input_moments(prepared, group, data)
        for layer in group:
            module = prepared.get_submodule(layer.name)
            quantizer = weight_quantizer(module)
            weight: Tensor = float_weight(module).detach()
            compensable = [b for b in sorted(bits.get(layer.name, ())) if b <= MOST_BITS]
            if layer.name in moments and compensable and quantizer.quantizer.compensates:
                factored = _factored(moments.pop(layer.name))
                if factored.n_singular:
                    logger.warning(
                        "The input moments of layer %r are singular in %d of %d groups, whose "
                        "weights are rounded to nearest instead of compensated.",
                        *(layer.name, factored.n_singular, len(factored.usable)),
                    )
                for b in compensable:
                    start = quantizer.scale(weight, b)
                    found = _round_groups(weight, factored, start, b, quantizer.quantizer)
                    quantizer.keep(weight, b, *found)
            done += 1
            progress(done, len(layers))


def _fitting_memory(network: nn.Module, layers: Sequence[LayerSpec]) -> list[list[LayerSpec]]:
    """Return the layers in groups whose moments fit `MOST_BYTES`."""
    groups: list[list[LayerSpec]] = [[]]
    room = MOST_BYTES
    for layer in layers:
        module = network.get_submodule(layer.name)
        needed = 0
        if can_have_moments(module):
            needed = 8 * getattr(module, "groups", 1) * columns(module) ** 2
        if needed > room and groups[-1]:
            groups.append([])
            room = MOST_BYTES
        groups[-1].append(layer)
        room -= needed
    return groups


class Compensated(NamedTuple):
    """A rounded weight: each value is a whole multiple of its channel's scale.

    The output error is ΔW E[x xᵀ] ΔWᵀ over the mean of E[x²], ``(channels,)`` float64, weight²; 0
    where a group is rounded to nearest, ``None`` where all groups are.
    """

    weight: Tensor
    scale: Tensor
    output_error: Tensor | None


@torch.no_grad()
def compensated(
    weight: Tensor, moment: Tensor, scale: Tensor, bits: int, quantizer: WeightQuantizer = UNIFORM
) -> Compensated:
    """Return the rounded weight, given E[x xᵀ] ``(groups, d, d)`` with d weights per channel.

    Starts from scales ``(channels,)``. Groups whose input is always zero, or whose moments stay
    singular whatever the damping, are rounded to nearest and make no difference to the others.

    Example:
        The second weight makes up for the first, because both meet the same input.

        >>> w, scale = torch.tensor([[0.4, 0.8]]), torch.tensor([1.0])
        >>> compensated(w, torch.ones(1, 2, 2).double(), scale, bits=3).weight.sum(1)
        tensor([1.2000])
    """
    return _round_groups(weight, _factored(moment), scale, bits, quantizer)


class _Moments(NamedTuple):
    """Input moments of the groups that can be compensated, and their factors.

    ``usable`` says which groups these are, ``(groups,)``; the others are rounded to nearest, and
    ``n_singular`` of them have moments without a factor at any damping. ``moment`` is E[x xᵀ],
    ``(usable, d, d)``; ``order`` sorts columns by falling E[x²], ``(usable, d)``; ``damped`` are
    the damped moments in this order. Row j of ``factor``, the upper Cholesky factor of their
    inverse, says how later columns make up for column j.
    """

    usable: Tensor
    n_singular: int
    moment: Tensor
    order: Tensor
    damped: Tensor
    factor: Tensor


@torch.no_grad()
def _factored(moment: Tensor) -> _Moments:
    """Factor the moments ``(groups, d, d)``; raise the damping of those that are singular."""
    fed = moment.diagonal(dim1=1, dim2=2).sum(1) > 0  # an input that is always zero tells nothing
    found = moment if bool(fed.all()) else moment[fed]  # a copy may be large
    order = torch.argsort(found.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    damped, factor, done = _factored_with(found, order, DAMPINGS[0])
    for damping in DAMPINGS[1:]:
        left = ~done
        if bool(left.any()):
            damped[left], factor[left], now = _factored_with(found[left], order[left], damping)
            done = done.index_put((left,), now)
    kept = [found, order, damped, factor]
    if not bool(done.all()):
        kept = [values[done] for values in kept]
    return _Moments(fed.index_put((fed,), done), int((~done).sum()), *kept)


def _factored_with(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return damped moments, the factors of their inverses, and which groups have a factor."""
    added = damping * moment.diagonal(dim1=1, dim2=2).mean(1)
    damped = moment + torch.diag_embed(added[:, None].expand(order.shape))
    damped = damped.gather(1, order[:, :, None].expand_as(damped))
    damped = damped.gather(2, order[:, None, :].expand_as(damped))
    root, failed = torch.linalg.cholesky_ex(damped)
    # The inverse of what has no root may be an error.
    one = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    root = torch.where((failed == 0)[:, None, None], root, one)
    factor, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
    return damped, factor, (failed == 0) & (again == 0) & factor.isfinite().all(2).all(1)


def _round_groups(
    weight: Tensor, moments: _Moments, scale: Tensor, bits: int, quantizer: WeightQuantizer
) -> Compensated:
    """Round the usable groups with compensation, the others to nearest."""
    nearest = quantizer.quantize(weight, scale, bits, 0)
    usable = moments.usable
    if not bool(usable.any()):
        return Compensated(nearest, scale, None)
    if bool(usable.all()):
        return _best_of_scales(weight, moments, nearest, scale, bits, quantizer)
    rows = usable.repeat_interleave(len(weight) // len(usable))
    part = _best_of_scales(weight[rows], moments, nearest[rows], scale[rows], bits, quantizer)
    assert part.output_error is not None
    error = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    return Compensated(
        nearest.index_put((rows,), part.weight),
        scale.index_put((rows,), part.scale),
        error.index_put((rows,), part.output_error),
    )


def _best_of_scales(
    weight: Tensor,
    moments: _Moments,
    nearest: Tensor,
    scale: Tensor,
    bits: int,
    quantizer: WeightQuantizer,
) -> Compensated:
    """Return for each channel the rounding with the least output error, over `SCALES`."""
    _, _, moment, order, damped, factor = moments
    groups, d = order.shape

    def columns_first(values: Tensor) -> Tensor:  # (groups, d, channels), the largest input first
        rows = values.flatten(1).double().reshape(groups, -1, d).mT
        return rows.gather(1, order[:, :, None].expand_as(rows))

    rows, best = columns_first(weight).contiguous(), columns_first(nearest)
    channels = rows.shape[2]
    first = scale.double().reshape(groups, channels)
    best_scale = scale.reshape(groups, channels)
    best_error = _output_error(best - rows, damped)
    for factors in _together(SCALES if bits <= FEW_BITS else (1.0,), rows.numel()):
        # Scales in single precision, as they are kept, so that what is tried is what is meant.
        scales = torch.cat([(first * f).float() for f in factors], 1)
        rounded = _round(rows.repeat(1, 1, len(factors)), factor, scales.double(), bits, quantizer)
        errors = _output_error(rounded - rows.repeat(1, 1, len(factors)), damped)
        for i in range(len(factors)):
            these = slice(i * channels, (i + 1) * channels)
            better = errors[:, these] < best_error
            best = torch.where(better[:, None], rounded[:, :, these], best)
            best_scale = torch.where(better, scales[:, these], best_scale)
            best_error = torch.where(better, errors[:, these], best_error)
    back = torch.empty_like(best).scatter_(1, order[:, :, None].expand_as(best), best)
    found = best_scale.flatten()
    codes = (back.mT.reshape(weight.shape[0], d) / found.double()[:, None]).round()
    result = codes.to(weight.dtype) * found[:, None].to(weight.dtype)
    change = (result.double() - weight.flatten(1).double()).reshape(groups, -1, d).mT
    error = _output_error(change, moment) / moment.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    return Compensated(result.reshape(weight.shape).contiguous(), found, error.flatten())


def _round(
    rows: Tensor, factor: Tensor, scale: Tensor, bits: int, quantizer: WeightQuantizer
) -> Tensor:
    """Round ``(groups, d, R)`` column by column, ``scale`` being ``(groups, R)``."""
    rounded = torch.empty_like(rows)
    d = rows.shape[1]
    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        errors = rows.new_empty(rows.shape[0], end - start, rows.shape[2])
        for j in range(start, end):
            w = rows[:, j]
            q = quantizer.nearest(w, scale, bits)
            error = (w - q) / factor[:, j, j, None]
            rows[:, j + 1 : end] -= factor[:, j, j + 1 : end, None] * error[:, None]
            rounded[:, j], errors[:, j - start] = q, error
        rows[:, end:] -= factor[:, start:end, end:].mT @ errors
    return rounded


def _output_error(change: Tensor, moment: Tensor) -> Tensor:
    """Return ΔW E[x xᵀ] ΔWᵀ per channel, ``(groups, R)``, from ``(groups, d, R)``."""
    return (change * (moment @ change)).sum(1)


def _together(factors: tuple[float, ...], elements: int) -> list[tuple[float, ...]]:
    """Return the factors in parts that fit memory."""
    size = max(1, min(len(factors), MOST_ELEMENTS // max(elements, 1)))
    return [factors[i : i + size] for i in range(0, math.ceil(len(factors) / size) * size, size)]
