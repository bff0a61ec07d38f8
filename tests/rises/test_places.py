"""Gauss-Newton scores against the loss itself and its exact Hessian in the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from hq_optuna.rises import CrossEntropy, SquaredError, rise_of_loss


def outputs(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_cross_entropy_rise_is_the_quadratic_form_of_the_exact_hessian() -> None:
    z, change = outputs(5, 4), 0.1 * outputs(5, 4, seed=1)
    expected = 0.0
    for row, delta in zip(z, change, strict=True):
        hessian = torch.func.hessian(lambda v: functional.cross_entropy(v, torch.tensor(0)))(row)
        expected += float(0.5 * delta @ hessian @ delta)
    assert float(CrossEntropy(temperature=1.0)(z, z + change)) == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_rise_is_the_divergence_of_a_small_change() -> None:
    z, change = outputs(50, 6), 1e-3 * outputs(50, 6, seed=2)
    p, q = torch.log_softmax(z, 1), torch.log_softmax(z + change, 1)
    divergence = float((p.exp() * (p - q)).sum())
    # Third order is left out: relative error of the size of the change.
    assert float(CrossEntropy(temperature=1.0)(z, z + change)) == pytest.approx(
        divergence, rel=3e-3
    )


def test_a_shift_of_all_classes_costs_nothing() -> None:
    z = outputs(7, 3)
    assert float(CrossEntropy()(z, z + 5.0)) == pytest.approx(0.0, abs=1e-12)


def test_temperature_softens_the_probabilities_and_nothing_else() -> None:
    z, moved = outputs(4, 3), outputs(4, 3, seed=3)
    softened = CrossEntropy(temperature=1.0)(z / 2, z / 2 + (moved - z))
    assert float(CrossEntropy(temperature=2.0)(z, moved)) == pytest.approx(
        float(softened), rel=1e-12
    )


def test_pixels_count_by_their_mean() -> None:
    z, moved = outputs(2, 3, 5), outputs(2, 3, 5, seed=4)
    flat = [t.permute(0, 2, 1).reshape(10, 3) for t in (z, moved)]
    assert float(CrossEntropy()(z, moved)) == pytest.approx(
        float(CrossEntropy()(flat[0], flat[1])) / 5
    )


def test_squared_error_rise_is_the_rise_of_the_loss_at_its_minimum() -> None:
    z, change = outputs(6, 4), outputs(6, 4, seed=5)
    rise = functional.mse_loss(z + change, z) - functional.mse_loss(z, z)
    assert float(SquaredError()(z, z + change)) / 6 == pytest.approx(float(rise), rel=1e-12)


def test_squared_error_rise_of_one_number_a_sample_is_that_of_one_column() -> None:
    z, moved = outputs(6), outputs(6, seed=5)
    assert float(SquaredError()(z, moved)) == float(SquaredError()(z[:, None], moved[:, None]))


def test_the_rise_follows_from_the_loss() -> None:
    assert isinstance(rise_of_loss(functional.cross_entropy), CrossEntropy)
    assert isinstance(rise_of_loss(nn.CrossEntropyLoss()), CrossEntropy)
    assert isinstance(rise_of_loss(nn.MSELoss()), SquaredError)
    assert isinstance(rise_of_loss(functional.mse_loss), SquaredError)
    assert rise_of_loss(functional.l1_loss) is None


def test_calibration_gives_the_mean_curvature_of_the_unsoftened_network() -> None:
    z = [5 * outputs(40, 6), 5 * outputs(30, 6, seed=6)]
    rise = CrossEntropy().fitted(z)

    def trace(outputs: torch.Tensor, temperature: float) -> float:
        hessians = [
            torch.diag(p) - torch.outer(p, p) for p in torch.softmax(outputs / temperature, 1)
        ]
        return float(sum(torch.trace(h) for h in hessians))

    expected = sum(trace(part, 1.0) for part in z) / sum(trace(part, 3.0) for part in z)
    assert rise.scale == pytest.approx(expected, rel=1e-12)
    moved = z[0] + outputs(40, 6, seed=7)
    assert float(rise(z[0], moved)) == pytest.approx(
        expected * float(CrossEntropy()(z[0], moved)), rel=1e-12
    )


def test_a_network_that_is_sure_of_everything_keeps_a_finite_scale() -> None:
    z = torch.tensor([[1e4, 0.0]], dtype=torch.float64)
    assert CrossEntropy(temperature=1e-3).fitted([z]).scale == 1.0


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is above 0"):
        CrossEntropy(temperature=0.0)
