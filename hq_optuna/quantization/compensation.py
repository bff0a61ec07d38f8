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
PRECISION = torch.float32
"""Of the columns' loop; factors are found in double precision."""
BLOCK = 32
"""Columns after which the others take up the errors of all these together."""
FEW_BITS = 4
SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Multiples of the scale with the least weight error that are tried up to `FEW_BITS`."""
MOST_BITS = 8
"""Beyond this, rounding errors do not matter and weights are rounded to nearest."""
MOST_ELEMENTS = 2**22
"""Elements of weights rounded together, at all bits and scales."""
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
    for group in fitting_memory(prepared, layers):
        moments = input_moments(prepared, group, data)
        for layer in group:
            module = prepared.get_submodule(layer.name)
            if layer.is_product:
                done += 1
                progress(done, len(layers))
                continue
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
                scales = {b: quantizer.scale(weight, b) for b in compensable}
                found = _round_groups(weight, factored, scales, quantizer.quantizer)
                for b, one in found.items():
                    quantizer.keep(weight, b, *one)
            done += 1
            progress(done, len(layers))


def fitting_memory(
    network: nn.Module, layers: Sequence[LayerSpec], work: Sequence[float] = (), n_groups: int = 1
) -> list[list[LayerSpec]]:
    """Return the layers in groups whose moments fit `MOST_BYTES`.

    These are at least about ``n_groups`` of the same work, given the work on each layer.
    """
    groups: list[list[LayerSpec]] = []
    room, done, last, total = 0, 0.0, -1, math.fsum(work)
    for place, layer in enumerate(layers):
        module = network.get_submodule(layer.name)
        needed, here = 0, 0
        if can_have_moments(module):
            needed = 8 * getattr(module, "groups", 1) * columns(module) ** 2
        if total:  # where the middle of the work on this layer falls
            here = int((done + work[place] / 2) / total * n_groups)
            done += work[place]
        if not groups or needed > room or here != last:
            groups.append([])
            room = MOST_BYTES
        groups[-1].append(layer)
        room, last = room - needed, here
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
    return _round_groups(weight, _factored(moment), {bits: scale}, quantizer)[bits]


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
    weight: Tensor, moments: _Moments, scales: Mapping[int, Tensor], quantizer: WeightQuantizer
) -> dict[int, Compensated]:
    """Round the usable groups with compensation, the others to nearest, at all bits."""
    nearest = {b: quantizer.quantize(weight, scale, b, 0) for b, scale in scales.items()}
    usable = moments.usable
    if not bool(usable.any()):
        return {b: Compensated(nearest[b], scale, None) for b, scale in scales.items()}
    rows = usable.repeat_interleave(len(weight) // len(usable))
    part = weight[rows]
    starts = [
        _Start(quantizer, b, columns_first(nearest[b][rows], moments.order), scale[rows])
        for b, scale in scales.items()
    ]
    found: dict[int, Compensated] = {}
    for odd in (True, False):
        alike = [start for start in starts if start.odd is odd]
        if alike:
            best = _best_of_scales(columns_first(part, moments.order), moments, alike)
            found |= {
                start.bits: _compensated(part, moments, *one)
                for start, one in zip(alike, best, strict=True)
            }
    if bool(usable.all()):
        return found
    none = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    return {
        b: Compensated(
            nearest[b].index_put((rows,), one.weight),
            scales[b].index_put((rows,), one.scale),
            none.index_put((rows,), torch.as_tensor(one.output_error)),
        )
        for b, one in found.items()
    }


def columns_first(values: Tensor, order: Tensor) -> Tensor:
    """Return a weight as ``(groups, d, channels)``, the largest input first."""
    groups, d = order.shape
    rows = values.flatten(1).to(PRECISION).reshape(groups, -1, d).mT
    return rows.gather(1, order[:, :, None].expand_as(rows))


class _Start:
    """A number of bits with the weight rounded to nearest, columns first, and the scales tried."""

    def __init__(
        self, quantizer: WeightQuantizer, bits: int, nearest: Tensor, scale: Tensor
    ) -> None:
        self.bits, self.nearest, self.odd = bits, nearest, quantizer.has_odd_codes(bits)
        self.largest = float(quantizer.largest_code(bits))
        self.scale = scale.reshape(len(nearest), 1, -1)  # (groups, 1, channels)
        tried = torch.tensor(
            SCALES if bits <= FEW_BITS else (1.0,), dtype=torch.float64, device="cpu"
        )
        # Scales in single precision, as they are kept, so that what is tried is what is meant.
        self.scales = (self.scale.double() * tried.to(scale.device)[:, None]).float()


class Grid(NamedTuple):
    """Whole multiples of ``scale`` up to ``largest``, or ``odd`` ones; tensors that broadcast."""

    scale: Tensor
    largest: Tensor
    odd: bool

    def nearest(self, values: Tensor) -> Tensor:
        """Return the values of the grid next to ``values``."""
        if self.odd:
            codes = (values / (2 * self.scale)).floor_().mul_(2).add_(1)
        else:
            codes = (values / self.scale).round_()
        return codes.clamp_(-self.largest, self.largest).mul_(self.scale)


def _best_of_scales(
    rows: Tensor, moments: _Moments, starts: Sequence[_Start]
) -> list[tuple[Tensor, Tensor]]:
    """Return for each channel the rounding with the least output error, and its scale.

    ``rows`` are the weight, columns first. All bits and all `SCALES` go through the columns
    together, for as many channels as fit `MOST_ELEMENTS`.
    """
    groups, d, channels = rows.shape
    # Of any unit, so that single precision holds it: only errors of one group are compared.
    unit = torch.frexp(moments.factor.diagonal(dim1=1, dim2=2).amax(1)).exponent[:, None, None]
    factor = torch.ldexp(moments.factor, -unit).to(PRECISION)
    damped = torch.ldexp(moments.damped, 2 * unit).to(PRECISION)
    scales = torch.cat([start.scales for start in starts], 1)  # (groups, tried, channels)
    counts = [start.scales.shape[1] for start in starts]
    largest = torch.cat(
        [torch.full((n,), s.largest, device="cpu") for n, s in zip(counts, starts, strict=True)]
    )
    best = [(s.nearest.clone(), s.scale[:, 0].clone()) for s in starts]
    width = max(1, MOST_ELEMENTS // (groups * d * sum(counts)))
    for first in range(0, channels, width):
        these = slice(first, first + width)
        w, tried = rows[:, :, these], scales[:, :, these]
        tops = largest.to(rows).repeat_interleave(tried.shape[2])
        grid = Grid(tried.flatten(1).to(PRECISION), tops, starts[0].odd)
        rounded, errors = _round(w.repeat(1, 1, sum(counts)), factor, grid)
        of_start = zip(
            *(starts, best, torch.split(errors.reshape(tried.shape), counts, 1)),
            torch.split(rounded.reshape(groups, d, *tried.shape[1:]), counts, 2),
            torch.split(tried, counts, 1),
            strict=True,
        )
        for start, (kept, scale), error, found, at in of_start:
            least, which = error.min(1, keepdim=True)  # (groups, 1, channels)
            nearest = start.nearest[:, :, these]
            better = least < _output_error(nearest - w, damped)[:, None]
            chosen = found.gather(2, which[:, None].expand(-1, d, -1, -1))[:, :, 0]
            kept[:, :, these] = torch.where(better, chosen, nearest)
            now = torch.where(better, at.gather(1, which), start.scale[:, :, these])
            scale[:, these] = now[:, 0]
    return best


def _compensated(weight: Tensor, moments: _Moments, best: Tensor, scale: Tensor) -> Compensated:
    """Return what was found, with its columns in order again."""
    order, moment = moments.order, moments.moment
    groups, d = order.shape
    back = torch.empty_like(best).scatter_(1, order[:, :, None].expand_as(best), best)
    found = scale.flatten()
    codes = (back.mT.reshape(weight.shape[0], d) / found.to(back.dtype)[:, None]).round()
    result = codes.to(weight.dtype) * found[:, None].to(weight.dtype)
    change = (result.double() - weight.flatten(1).double()).reshape(groups, -1, d).mT
    relative = moment / moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    error = _output_error(change.to(PRECISION), relative.to(PRECISION)).double()
    return Compensated(result.reshape(weight.shape).contiguous(), found, error.flatten())


def _round(rows: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round ``(groups, d, R)`` column by column; ``rows`` are written over.

    Returns what they are rounded to, and ΔW E[x xᵀ] ΔWᵀ, ``(groups, R)``: the sum of what each
    column adds to it once those to come have taken up its error.
    """
    rounded = torch.empty_like(rows)
    total = rows.new_zeros(rows.shape[0], rows.shape[2])
    d = rows.shape[1]
    shares = 1 / factor.diagonal(dim1=1, dim2=2)
    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        errors = rows.new_empty(rows.shape[0], end - start, rows.shape[2])
        for j in range(start, end):
            w = rows[:, j : j + 1]
            if j > start:
                before = factor[:, start:j, j : j + 1].mT
                w = torch.baddbmm(w, before, errors[:, : j - start], alpha=-1)
            w = w[:, 0]
            q = grid.nearest(w)
            torch.mul(w - q, shares[:, j : j + 1], out=errors[:, j - start])
            rounded[:, j] = q
        total += errors.square().sum(1)
        if end < d:
            rows[:, end:].baddbmm_(factor[:, start:end, end:].mT, errors, alpha=-1)
    return rounded, total


def _output_error(change: Tensor, moment: Tensor) -> Tensor:
    """Return ΔW E[x xᵀ] ΔWᵀ per channel, ``(groups, R)``, from ``(groups, d, R)``."""
    return (change * (moment @ change)).sum(1)
