"""Ranges on grids that hardware takes, against a scan of scales."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hq_optuna.quantization.observers import N_BINS, InputHistogram
from hq_optuna.quantization.ranges import InputGrid

SIGNED = np.random.default_rng(0).normal(0.3, 1.0, 20_000)
POSITIVE = np.maximum(SIGNED, 0.0)


def histogram(values: np.ndarray) -> InputHistogram:
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    counts, edges = np.histogram(values, N_BINS, (low, high))
    return InputHistogram(counts.astype(float), edges)


def error(values: np.ndarray, scale: float, zero_point: int, bits: int) -> float:
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 2**bits - 1)
    return float(np.square((codes - zero_point) * scale - values).sum())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("values", [SIGNED, POSITIVE], ids=["signed", "positive"])
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("observer", ["squared_error", "min_max", "percentile"])
def test_the_code_of_zero_is_the_middle_or_the_end(bits, values, unsigned, observer) -> None:
    found = histogram(values).range(bits, observer, InputGrid((bits,), unsigned))
    at_end = unsigned and values.min() >= 0
    assert found.zero_point == (0 if at_end else 2 ** (bits - 1))
    if observer == "min_max":
        low = -found.zero_point * found.scale
        assert low <= values.min() + found.scale * 1e-3
        assert (2**bits - 1 - found.zero_point) * found.scale >= values.max() * (1 - 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("values", [SIGNED, POSITIVE], ids=["signed", "positive"])
def test_a_symmetric_scale_has_nearly_the_least_squared_error(bits, values) -> None:
    found = histogram(values).range(bits, grid=InputGrid((bits,)))
    every = np.abs(values).max() * np.geomspace(1e-3, 1.0, 4000)
    least = min(error(values, scale, 2 ** (bits - 1), bits) for scale in every)
    assert error(values, *found, bits) <= 1.01 * least


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("values", [SIGNED, POSITIVE], ids=["signed", "positive"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_are_powers_of_two_are_the_best_of_them(bits, values, symmetric) -> None:
    grid = InputGrid((bits,) if symmetric else (), unsigned=True, power_of_two=True)
    found = histogram(values).range(bits, grid=grid)
    assert math.log2(found.scale) == round(math.log2(found.scale))
    zero_points = [found.zero_point] if symmetric else range(2**bits)
    least = min(error(values, 2.0**k, zero, bits) for k in range(-12, 4) for zero in zero_points)
    assert error(values, *found, bits) <= (1.01 if symmetric else 1.1) * least


def test_a_width_that_is_not_limited_has_the_range_it_had() -> None:
    grid = InputGrid((16,))
    seen = histogram(SIGNED)
    assert seen.range(8, grid=grid) == seen.range(8)
    assert seen.range(16, grid=grid) != seen.range(16)
    zeros = InputHistogram(np.zeros(N_BINS), np.linspace(0, 1e-6, N_BINS + 1))
    assert zeros.range(8, grid=InputGrid((8,))).scale > 0
