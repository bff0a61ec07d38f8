"""Ranges: how far the squared error is from the least that a scan of thousands finds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hq_optuna.quantization import ranges
from hq_optuna.quantization.functional import quantize_weight
from hq_optuna.quantization.ranges import TINY, affine_range, histogram_range, weight_scale
from tests.reference.best_range import (
    error,
    least_error,
    least_weight_errors,
    unclipped,
    weight_errors,
)
from tests.small_networks import seeded

# Weights.


def channels(n: int, seed: int = 0) -> Tensor:
    """Channels of every kind: uniform, Gaussian, Laplace, skewed, heavy-tailed, with an outlier."""
    g = seeded(seed)
    gauss = torch.randn(8, 2, n, generator=g)
    laplace = torch.log(torch.rand(2, n, generator=g) / torch.rand(2, n, generator=g))
    heavy = gauss[2] / gauss[3].abs().clamp_min(0.1)
    outlier = gauss[4] * 0.1
    outlier[:, 0] = torch.tensor([5.0, -8.0])
    kinds = [torch.rand(2, n, generator=g) - 0.5, gauss[0], laplace, gauss[1].exp() - 1]
    return torch.cat([*kinds, heavy, outlier, gauss[5].abs(), -gauss[6].abs() - 0.1])


@pytest.mark.parametrize("n", [1, 9, 27, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_channels_with_few_weights_get_the_exact_optimum(n, bits):
    rows = channels(n)
    ours = weight_errors(rows, weight_scale(rows, bits, 0), bits)
    # No scan is finer than the optimum; the scale's single precision costs at most 1e-5 of it.
    least = least_weight_errors(rows, bits, 4000)
    assert (ours <= least * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("bits, within", [(2, 1.01), (3, 1.01), (4, 1.01), (6, 1.05), (8, 1.05)])
@pytest.mark.parametrize("n", [288, 2304])
def test_the_squared_error_of_weights_is_near_the_least_of_a_scan(n, bits, within):
    rows = channels(n, seed=n)
    ratio = weight_errors(rows, weight_scale(rows, bits, 0), bits)
    ratio /= least_weight_errors(rows, bits, 4000 if n < 1000 else 1200)
    assert ratio.max() <= within
    assert ratio.mean() <= 1.01


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 12, 16])
@pytest.mark.parametrize("n", [9, 300, 2304])
def test_weights_never_err_more_than_with_the_range_that_clips_nothing(bits, n):
    rows = channels(n, seed=1)
    ours = weight_errors(rows, weight_scale(rows, bits, 0), bits)
    # Single precision of the scale moves the error by about 2ᵇ · 6e-8 of it.
    assert (ours <= weight_errors(rows, unclipped(rows, bits), bits) * (1 + 2**bits * 1e-6)).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_one_outlier_among_thousands_does_not_cost_the_others_their_codes(bits):
    rows = torch.randn(4, 4608, generator=seeded(2))
    rows[:, 7] = 40.0
    ours = weight_errors(rows, weight_scale(rows, bits, 0), bits)
    assert (ours <= 1.01 * least_weight_errors(rows, bits, 1200)).all()
    assert (ours < 0.7 * weight_errors(rows, unclipped(rows, bits), bits)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [9, 700])
@pytest.mark.parametrize("factor", [2.0**-40, 0.125, 4.0, 2.0**60])
def test_the_scale_follows_the_weights_scale_exactly(bits, n, factor):
    rows = channels(n, seed=3) + 1e-3
    keep = weight_scale(rows, bits, 0) * factor > 1e3 * TINY
    scaled = weight_scale(rows * factor, bits, 0)
    assert torch.equal(scaled[keep], (weight_scale(rows, bits, 0) * factor)[keep])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [9, 700])
def test_each_channel_is_scaled_for_itself(bits, n):
    rows = channels(n, seed=4)
    together = weight_scale(rows, bits, 0)
    alone = torch.cat([weight_scale(row[None], bits, 0) for row in rows])
    # Sums over a row may be taken in another order when it stands alone.
    torch.testing.assert_close(together, alone, rtol=1e-4 if n > 9 else 0.0, atol=0.0)


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("n", [9, 700])
def test_a_channel_of_zeros_keeps_a_positive_scale_and_rounds_to_zero(bits, n):
    rows = torch.randn(3, n, generator=seeded(5))
    rows[1] = 0.0
    scale = weight_scale(rows, bits, 0)
    assert (scale > 0).all() and scale.isfinite().all()
    rounded = quantize_weight(rows, scale, bits, 0)
    assert rounded[1].abs().max() <= 1e-11
    assert torch.equal(scale[[0, 2]], weight_scale(rows[[0, 2]], bits, 0))


def test_binary_scales_are_the_mean_absolute_weight():
    w = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-0.5, -0.5, 0.5, 0.5]])
    assert weight_scale(w, 1, 0).tolist() == [1.5, 0.5]


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_transposed_convolutions_are_scaled_along_their_second_axis(bits):
    w = torch.randn(3, 5, 2, 2, generator=seeded(6))
    assert torch.equal(weight_scale(w, bits, 1), weight_scale(w.transpose(0, 1), bits, 0))
    assert weight_scale(w, bits, 1).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scales_are_single_precision_whatever_the_weights_are(dtype):
    w = torch.randn(4, 50, generator=seeded(7)).to(dtype)
    for bits in (1, 2, 8):
        assert torch.equal(weight_scale(w, bits, 0), weight_scale(w.float(), bits, 0))


def test_the_result_does_not_depend_on_how_many_channels_are_looked_at_together(monkeypatch):
    rows = torch.randn(40, 500, generator=seeded(8))
    whole = weight_scale(rows, 5, 0)
    monkeypatch.setattr(ranges, "CHUNK", 1500)
    torch.testing.assert_close(weight_scale(rows, 5, 0), whole, rtol=1e-4, atol=0.0)


def test_weights_that_require_gradients_or_are_strided_are_looked_at_as_they_are():
    w = torch.randn(6, 8, generator=seeded(9)).t().requires_grad_()
    scale = weight_scale(w, 4, 0)
    assert not scale.requires_grad
    assert torch.equal(scale, weight_scale(w.detach().contiguous(), 4, 0))


# Activations.

RNG = np.random.default_rng(0)
GAUSS = RNG.standard_normal(3000)
INPUTS = {
    "relu": np.maximum(GAUSS, 0),
    "relu6": np.clip(GAUSS * 4, 0, 6),
    "relu with outlier": np.append(np.maximum(GAUSS, 0), 40.0),
    "log-normal": np.exp(GAUSS),
    "gauss": GAUSS,
    "gauss off centre": GAUSS + 1.5,
    "laplace": RNG.laplace(size=3000),
    "gauss with outliers": np.append(GAUSS, [-3.0, 40.0]),
    "leaky relu": np.where(GAUSS > 0, GAUSS, 0.1 * GAUSS),
    "negative": -np.abs(GAUSS),
    "uniform": RNG.uniform(-1, 2, 3000),
}


def histogram(values, n_bins=2048):
    ends = (min(values.min(), 0.0), max(values.max(), 1e-6))
    counts, edges = np.histogram(values, n_bins, ends)
    return counts.astype(np.float64), edges


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", INPUTS)
def test_the_squared_error_of_activations_is_near_the_least_of_a_scan(kind, bits):
    values = INPUTS[kind]
    scale, zero_point = histogram_range(*histogram(values), bits)
    assert error(values, scale, zero_point, bits) <= 1.01 * least_error(values, bits)


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 10, 12, 16])
@pytest.mark.parametrize("kind", INPUTS)
def test_activations_err_hardly_more_than_with_the_range_of_all_values(kind, bits):
    values = INPUTS[kind]
    counts, edges = histogram(values)
    ours = error(values, *histogram_range(counts, edges, bits), bits)
    # Above 8 bits 2048 bins tell little about rounding; measured are 3 % at most.
    assert ours <= 1.05 * error(values, *affine_range(edges[0], edges[-1], bits), bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", INPUTS)
def test_zero_is_a_code_and_the_grid_is_unsigned_where_nothing_is_negative(kind, bits):
    values = INPUTS[kind]
    scale, zero_point = histogram_range(*histogram(values), bits)
    assert scale > 0 and scale == np.float32(scale)
    assert isinstance(zero_point, int) and 0 <= zero_point <= 2**bits - 1
    if values.min() >= 0:
        assert zero_point == 0
    if values.max() <= 0:
        assert zero_point >= 2**bits - 2


def test_a_layer_that_sees_only_zeros_or_nothing_gets_a_range():
    edges = np.linspace(0.0, 1e-6, 9)
    for counts in (np.zeros(8), np.eye(8)[0] * 100):
        scale, zero_point = histogram_range(counts, edges, 4)
        assert 0 < scale < 1e-6
        assert zero_point == 0


@pytest.mark.parametrize(
    "low, high", [(-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 0.0), (-0.2, 9)]
)
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_affine_ranges_hold_zero_and_cover_both_ends_to_half_a_step(low, high, bits):
    scale, zero_point = affine_range(low, high, bits)
    assert 0 <= zero_point <= 2**bits - 1
    step = scale * (0.5 + 1e-6 * 2**bits)  # single precision of the scale
    assert (0 - zero_point) * scale <= min(low, 0) + step
    assert (2**bits - 1 - zero_point) * scale >= max(high, 0) - step
