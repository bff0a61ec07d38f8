"""Ranges that minimize the squared error of quantization: scales of weights and of activations.

Weights: for each channel, the scale s that minimizes ‖Q_s(w) − w‖². For given integer codes q the
best scale is w·q / q·q, so only the code vectors that rounding can produce need be compared. A
channel with few weights or few bits goes through all of them and gets the exact optimum; otherwise
a logarithmic grid of scales finds the basin, a finer one its bottom, and codes and scale are then
improved in turn, which never raises the error.

Activations: for each number of bits, the range that minimizes the squared error over a histogram
of the values seen on the calibration set, by the same three moves. Hardware that does not take any
scale and zero point says which by an `InputGrid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hq_optuna.quantization.functional import activation_grid, weight_grid

TINY = 1e-12
"""Smallest scale: an all-zero channel still needs a positive one."""
EXACT = 2048
"""Code changes in a channel, weights · 2ᵇ⁻¹, up to which its optimum is found exactly."""
COARSE_POINTS = 24
FINE_POINTS_PER_BIT = 8
REFINEMENTS = 4
N_SCALES = 257
"""Scales between the widest range and the narrowest that are looked at."""
CHUNK = 2**16
"""Weights looked at together on a CPU: what fits its cache."""


def weight_scale(weight: Tensor, bits: int, channel_axis: int) -> Tensor:
    """Return the scale per channel with the least squared error, for 1 to 16 bits.

    Exact where a channel has at most `EXACT` / 2ᵇ⁻¹ weights. Above that the squared error is within
    1 % of the optimum up to 4 bits, and within 5 % up to 8 bits (tested against a scan of thousands
    of scales). It is never above that of the range that clips nothing.

    Shape ``(channels,)``, positive, float32 whatever the weight's dtype (PyTorch's fake
    quantization takes no other).

    Example:
        >>> weight_scale(torch.tensor([[1.0, -2.0, 1.0]]), bits=2, channel_axis=0)
        tensor([1.3333])
    """
    rows = weight.detach().movedim(channel_axis, 0).flatten(1).double()
    if bits == 1:
        # XNOR-Net eq. (6): the best scale of sign(w) is the mean absolute weight.
        return rows.abs().mean(1).clamp_min(TINY).float()
    if rows.shape[1] * 2 ** (bits - 1) <= EXACT:
        return scale_by_channel(weight, channel_axis, lambda part: exact_scale(part, bits))
    low, high = weight_grid(bits)

    def find(part: Tensor) -> Tensor:
        def codes(scale: Tensor) -> Tensor:
            return (part * (1 / scale)[:, None]).round_().clamp_(low, high)

        return searched_scale(part, bits, high, codes)

    return scale_by_channel(weight, channel_axis, find)


def scale_by_channel(weight: Tensor, channel_axis: int, find: Callable[[Tensor], Tensor]) -> Tensor:
    """Return scales ``(channels,)``, float32 and positive, looking at as much as fits a cache.

    ``find`` returns the scales of rows ``(channels, n)`` whose largest magnitude is 1.
    """
    rows = weight.detach().movedim(channel_axis, 0).flatten(1).double()
    # Largest magnitude 1, so that single precision is enough for a search.
    largest = rows.abs().amax(1)
    largest = torch.where(largest > 0, largest, 1.0)
    rows = (rows / largest[:, None]).float()
    together = max(1, (CHUNK if rows.device.type == "cpu" else CHUNK * 256) // rows.shape[1])
    scale = torch.cat([find(part) for part in torch.split(rows, together)])
    return (scale.double() * largest).clamp_min(TINY).float()


def exact_scale(rows: Tensor, bits: int) -> Tensor:
    """Return the best scale of ``rows``, ``(channels, n)``: codes step from k − 1 to k."""
    k = torch.arange(1, weight_grid(bits)[1] + 1, dtype=torch.float64, device=rows.device)
    return scale_over_steps(rows.abs().double(), k - 0.5, 1.0, 2 * k - 1)


def scale_over_steps(
    magnitude: Tensor,
    at: Tensor,
    gain: float,
    growth: Tensor,
    first: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the best scale of ``(channels, n)`` magnitudes, from all reachable code vectors.

    As the scale falls from infinity, the code of a weight steps at the scales |w| / ``at``. Steps
    in falling order of that scale give all code vectors; each adds ``gain`` · |w| to w·q and
    ``growth`` to q·q, and the error is ‖w‖² − (w·q)² / q·q. ``first`` are w·q and q·q before the
    first step, where codes are not 0 there.
    """
    steps = (magnitude[:, :, None] / at).flatten(1)  # (channels, n · steps of one weight)
    order = steps.argsort(1, descending=True)
    wq = (gain * magnitude.gather(1, order // len(at))).cumsum(1)
    qq = growth[order % len(at)].cumsum(1)
    if first is not None:
        wq, qq = torch.cat([first[0], first[0] + wq], 1), torch.cat([first[1], first[1] + qq], 1)
    best = (wq.square() / qq).argmax(1, keepdim=True)
    scale: Tensor = (wq.gather(1, best) / qq.gather(1, best)).squeeze(1)
    return scale


def searched_scale(
    rows: Tensor,
    bits: int,
    largest_code: int,
    codes: Callable[[Tensor], Tensor],
    half_step: float = 0.5,
) -> Tensor:
    """Return a nearly best scale of each channel, for any grid of whole multiples of a scale.

    ``rows`` are ``(channels, n)`` with largest magnitude 1. ``codes`` returns, in a new tensor, the
    multiples that they are rounded to with scales ``(channels,)``; ``largest_code`` is the largest,
    and two that are next to each other are at most twice ``half_step`` apart.
    """
    # With this scale nothing is clipped.
    full = (rows.abs().amax(1) / largest_code).clamp_min(TINY)

    def error(scale: Tensor) -> Tensor:
        difference = codes(scale).mul_(scale[:, None]).sub_(rows)
        norm: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return norm

    best, best_error = full, error(full)

    def consider(scale: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal best, best_error
        candidate = error(scale)
        better = candidate < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, candidate, best_error)
        return candidate, better

    # One large weight among n small ones may be clipped down to about 1/√n, not further: its own
    # error would exceed that of all others rounded to zero.
    ratio = (0.5 / math.sqrt(rows.shape[1])) ** (1 / COARSE_POINTS)
    for power in range(1, COARSE_POINTS + 1):
        scale = full * ratio**power
        found, _ = consider(scale)
        # All beyond rounding is clipping, which grows as the scale falls: where that alone is more
        # than the least error, no smaller scale is better.
        clipped = found.square() - rows.shape[1] * (half_step * scale).square()
        if bool((clipped > best_error.square()).all()):
            break
    centre = best
    fine = FINE_POINTS_PER_BIT * min(bits, 8)
    for power in np.linspace(-1, 1, fine + 2)[1:-1]:
        consider(torch.minimum(centre * ratio ** float(power), full))
    for _ in range(REFINEMENTS):
        q = codes(best)
        scale = torch.linalg.vecdot(rows, q) / torch.linalg.vecdot(q, q).clamp_min(1.0)
        _, better = consider(torch.where(scale > 0, scale, best))
        if not bool(better.any()):
            break
    return best


class AffineRange(NamedTuple):
    """Scale and zero point of one tensor."""

    scale: float
    zero_point: int


def affine_range(low: float, high: float, bits: int) -> AffineRange:
    """Return scale and zero point of the grid that covers ``[low, high]`` and holds 0.0 exactly.

    Zero padding and ReLU make 0.0 the commonest value of all, so it must be free of error.

    Example:
        >>> affine_range(0.0, 15.0, bits=4)
        AffineRange(scale=1.0, zero_point=0)
        >>> affine_range(-1.0, 2.0, bits=2)
        AffineRange(scale=1.0, zero_point=1)
    """
    scales, zero_points = _affine_ranges(np.array([low]), np.array([high]), bits)
    return AffineRange(float(scales[0]), int(zero_points[0]))


def _affine_ranges(
    low: NDArray[np.float64], high: NDArray[np.float64], bits: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scales and zero points of many ranges."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    quant_min, quant_max = activation_grid(bits)
    scales = np.maximum((high - low) / (quant_max - quant_min), TINY)
    # Round as PyTorch will: in single precision.
    scales = scales.astype(np.float32).astype(np.float64)
    return scales, np.clip(np.rint(-low / scales), quant_min, quant_max)


def histogram_range(
    counts: NDArray[np.float64], edges: NDArray[np.float64], bits: int
) -> AffineRange:
    """Return the range with the least squared error over a histogram with evenly spaced edges.

    Both ends of the observed range are shrunk towards zero; where nothing is negative, the lower
    end is 0 and the grid unsigned.
    """
    low, high = min(float(edges[0]), 0.0), max(float(edges[-1]), 0.0)
    bins = Bins(counts, edges, bits)
    signed = low < 0
    if not len(bins.counts):
        return affine_range(low, high, bits)

    def shrunk(end: float, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        return end * factors if end else np.zeros(1)

    best, best_error, (lower, upper) = affine_range(low, high, bits), np.inf, (low, high)
    # No narrower than two bins: the histogram cannot tell ranges below that apart.
    span = -math.log(2 / len(counts))
    points = 14 if signed else 28
    step = span / (points - 1)
    factors = np.exp(np.linspace(-span, 0.0, points))
    for _ in range(3):
        lows = np.maximum(shrunk(lower, factors), low)
        highs = np.minimum(shrunk(upper, factors), high)
        ends = np.repeat(lows, len(highs)), np.tile(highs, len(lows))
        scales, zero_points = _affine_ranges(*ends, bits)
        errors = bins.error(scales, zero_points)
        winner = int(np.argmin(errors))
        if errors[winner] <= best_error:
            best = AffineRange(float(scales[winner]), int(zero_points[winner]))
            best_error = float(errors[winner])
            lower, upper = (float(end[winner]) for end in ends)
        n_fine = 7 if signed else 28
        factors = np.exp(np.linspace(-step, step, n_fine))
        step *= 2 / n_fine
    quant_max = activation_grid(bits)[1]
    for zero_point in sorted({max(best.zero_point + d, 0) for d in (-1, 0, 1)} if signed else {0}):
        scale = best.scale
        for _ in range(REFINEMENTS):
            scale = bins.best_scale(scale, min(zero_point, quant_max))
            if scale <= TINY:
                break
            candidate = AffineRange(scale, min(zero_point, quant_max))
            error = float(bins.error(np.array([scale]), np.array([candidate.zero_point]))[0])
            if error < best_error:
                best, best_error = candidate, error
    return best


class Bins:
    """The filled bins of a histogram, and the squared error of quantizing them."""

    def __init__(self, counts: NDArray[np.float64], edges: NDArray[np.float64], bits: int) -> None:
        filled = counts > 0
        values = (edges[:-1] + edges[1:]) / 2
        # The extremes were seen exactly, and ReLU6 and its like put much there.
        values[0], values[-1] = edges[0], edges[-1]
        # The bin that holds 0.0 stands for the exact zeros of a ReLU, which cost nothing.
        values[(edges[:-1] <= 0) & (edges[1:] > 0)] = 0.0
        self.values = values[filled]
        self.counts = counts[filled]
        self.quant_max = activation_grid(bits)[1]

    def codes(
        self, scale: NDArray[np.float64], zero_point: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return codes minus zero point, shape ``(C, filled bins)``, for ``C`` ranges."""
        codes = np.rint(self.values / scale[:, None])
        return np.clip(codes, -zero_point[:, None], self.quant_max - zero_point[:, None])

    def error(
        self, scale: NDArray[np.float64], zero_point: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the summed squared error of ``C`` ranges, shape ``(C,)``."""
        codes = self.codes(scale, zero_point)
        return np.asarray(np.square(codes * scale[:, None] - self.values) @ self.counts)

    def best_scale(self, scale: float, zero_point: int) -> float:
        """Return the least-squares scale for the codes that ``scale`` gives, or 0 without codes."""
        codes = self.codes(np.array([scale]), np.array([float(zero_point)]))[0]
        power = float(codes * codes @ self.counts)
        # Round as PyTorch will: in single precision.
        return float(np.float32(codes * self.values @ self.counts / power)) if power else 0.0


class InputGrid(NamedTuple):
    """Which scales and zero points a target takes; by default any.

    Attributes:
        symmetric_bits: Widths at which 0.0 is the middle code, 2ᵇ⁻¹: a signed grid with zero
            point 0.
        unsigned: Whether, at these, inputs that are never negative have 0 as the code of 0.0.
        power_of_two: Whether scales are powers of two.
    """

    symmetric_bits: tuple[int, ...] = ()
    unsigned: bool = False
    power_of_two: bool = False

    def constrains(self, bits: int) -> bool:
        """Return whether ranges of this width are limited."""
        return self.power_of_two or bits in self.symmetric_bits

    def zero_point(self, low: float, bits: int) -> int | None:
        """Return the code of 0.0 where it is given; ``low`` is the lowest input."""
        if bits not in self.symmetric_bits:
            return None
        return 0 if self.unsigned and low >= 0 else 2 ** (bits - 1)


ANY_GRID = InputGrid()
"""Takes any scale and zero point."""


def fitted_range(
    found: AffineRange,
    grid: InputGrid,
    counts: NDArray[np.float64],
    edges: NDArray[np.float64],
    bits: int,
    covers: bool,
) -> AffineRange:
    """Return the range that a target takes in place of one with any scale and zero point.

    Args:
        found: The range without the target's limits.
        grid: What the target takes.
        counts: Histogram of the inputs.
        edges: Its edges; the first and last are the extremes seen.
        bits: Width.
        covers: Whether it has to cover what ``found`` covers; otherwise it has the least squared
            error over the histogram.
    """
    quant_max, zero_point = activation_grid(bits)[1], grid.zero_point(float(edges[0]), bits)
    if covers:
        low, high = -found.zero_point * found.scale, (quant_max - found.zero_point) * found.scale
        scale = found.scale
        if zero_point is not None:
            below = -low / zero_point if zero_point else 0.0
            scale = max(below, high / (quant_max - zero_point), TINY)
        if grid.power_of_two:
            scale = 2.0 ** math.ceil(math.log2(scale) - 1e-9)
        if zero_point is None:
            zero_point = min(max(round(-low / scale), 0), quant_max)
        return AffineRange(float(np.float32(scale)), zero_point)
    bins = Bins(counts, edges, bits)
    widest = _widest_scale(edges, quant_max, zero_point)
    if grid.power_of_two:
        top = math.ceil(math.log2(widest))
        scales = 2.0 ** np.arange(top - 16, top + 1, dtype=np.float64)
    else:
        scales = widest * np.exp(np.linspace(-math.log(len(counts) / 2), 0.0, N_SCALES))
        scales = scales.astype(np.float32).astype(np.float64)
    scales = np.maximum(scales, TINY)
    if not len(bins.counts):  # only zeros were seen
        return AffineRange(float(scales[-1]), zero_point or 0)
    if zero_point is not None:
        zeros = np.full(len(scales), float(zero_point))
    else:  # powers of two, and any zero point: that of the range, and of all that was seen
        lows = np.array([-found.zero_point * found.scale, min(float(edges[0]), 0.0)])
        scales, lows = np.tile(scales, 2), np.repeat(lows, len(scales))
        zeros = np.clip(np.rint(-lows / scales), 0, quant_max)
    errors = bins.error(scales, zeros)
    winner = int(np.argmin(errors))
    best, error = AffineRange(float(scales[winner]), int(zeros[winner])), float(errors[winner])
    for _ in range(0 if grid.power_of_two else REFINEMENTS):
        scale = bins.best_scale(best.scale, best.zero_point)
        now = (
            float(bins.error(np.array([scale]), zeros[winner : winner + 1])[0]) if scale else error
        )
        if scale <= TINY or now >= error:
            break
        best, error = AffineRange(scale, best.zero_point), now
    return best


def _widest_scale(edges: NDArray[np.float64], quant_max: int, zero_point: int | None) -> float:
    """Return the scale that clips nothing that was seen."""
    low, high = min(float(edges[0]), 0.0), max(float(edges[-1]), 0.0)
    if zero_point is None:
        return max((high - low) / quant_max, TINY)
    below = -low / zero_point if zero_point else 0.0
    return max(below, high / (quant_max - zero_point), TINY)
