"""Ranges of inputs for hardware that does not take any scale and zero point."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hq_optuna.quantization.functional import activation_grid
from hq_optuna.quantization.ranges import REFINEMENTS, TINY, AffineRange, Bins

N_SCALES = 257
"""Scales between the widest range and the narrowest that are looked at."""


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
