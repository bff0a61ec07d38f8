"""Mean and variance per channel against double precision and against `torch.var_mean`."""

import pytest
import torch

from hq_optuna.quantization.statistics import MOST_CANCELLATION, channel_statistics
from tests.small_networks import seeded


def exact(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.double().movedim(axis, 0).flatten(1)
    return flat.mean(1), flat.var(1, correction=0)


@pytest.mark.parametrize("shape", [(64, 5, 24, 24), (7, 3, 50), (3, 4, 5, 6, 7), (1, 2, 1, 1)])
@pytest.mark.parametrize("offset", [0.0, 2.0, -2.6, 5.0, 300.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mean_and_variance_are_those_of_double_precision(shape, offset, channels_last):
    # Up to 2.6 standard deviations the quick way serves, above it the slow one.
    x = torch.randn(shape, generator=seeded(0)) + offset
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    mean, var = channel_statistics(x, 1)
    expected_mean, expected_var = exact(x, 1)
    assert mean.dtype == var.dtype == torch.float32
    assert torch.allclose(mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(var.double(), expected_var, rtol=3e-6, atol=1e-12)


def test_constant_channels_have_no_variance_at_all():
    x = torch.randn(16, 3, 9, 9, generator=seeded(1))
    x[:, 1], x[:, 2] = 1000.1, 0.0
    mean, var = channel_statistics(x, 1)
    # Well below what counts as a living channel in the correction, 1e-12.
    assert var[1] < 1e-14 and var[2] == 0 and mean[2] == 0
    assert mean[1] == pytest.approx(1000.1, rel=1e-7)


@pytest.mark.parametrize("times", [0.9, 1.1])
def test_both_sides_of_the_bound_agree_with_double_precision(times):
    x = torch.randn(64, 2, 90, 9, generator=seeded(2))
    x[:, 1] += (times * MOST_CANCELLATION - 1) ** 0.5
    mean, var = channel_statistics(x, 1)
    expected_mean, expected_var = exact(x, 1)
    assert torch.allclose(var.double(), expected_var, rtol=1e-6)
    assert torch.allclose(mean.double(), expected_mean, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_any_axis_layout_and_precision(axis):
    for x in (
        torch.randn(6, 4, 4, generator=seeded(3)).double(),
        torch.randn(6, 4, 4, generator=seeded(3)).transpose(0, 2),
    ):
        mean, var = channel_statistics(x, axis)
        expected_mean, expected_var = exact(x, axis)
        assert torch.allclose(mean.double(), expected_mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(var.double(), expected_var, rtol=1e-5)


def test_what_is_no_number_is_passed_on():
    x = torch.zeros(2, 2, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    mean, var = channel_statistics(x, 1)
    assert mean.isnan().tolist() == var.isnan().tolist() == [True, False]
