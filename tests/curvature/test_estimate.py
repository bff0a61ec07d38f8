"""Mean curvatures per layer: their standard errors, and when they are settled."""

import math

import pytest
import torch

from hq_optuna.curvature.estimate import MIN_MEASUREMENTS, Curvature, MeanCurvatures
from tests.small_networks import seeded


def gathered(values: torch.Tensor) -> MeanCurvatures:
    """Of values (K, L, 2)."""
    means = MeanCurvatures()
    for row in values.tolist():
        means.add({f"l{i}": (w, x) for i, (w, x) in enumerate(row)})
    return means


def test_means_are_the_means_over_the_measurements():
    values = torch.rand(5, 3, 2, generator=seeded(0), dtype=torch.float64)
    found = gathered(values).means()
    for i, pair in enumerate(found.values()):
        assert pair == pytest.approx(values.mean(0)[i].tolist())


def test_errors_are_the_standard_errors_of_independent_layers():
    # Ten thousand experiments of 25 measurements of 21 layers, each layer by itself.
    values = 1 + 0.2 * torch.randn(25, 21, 2, generator=seeded(1), dtype=torch.float64)
    found = torch.tensor(list(gathered(values).errors().values()))
    # The median over 21 layers adds a little noise of its own (2 to 4 %).
    assert float(found.mean()) == pytest.approx(0.2 / 5, rel=0.1)


def test_what_all_layers_have_in_common_is_no_error():
    common = torch.rand(6, 1, 1, generator=seeded(2), dtype=torch.float64) + 0.1
    layers = torch.tensor([[1.0, 2.0], [30.0, 0.1], [5.0, 5.0]], dtype=torch.float64)
    for pair in gathered(common * layers).errors().values():
        assert pair == pytest.approx((0.0, 0.0), abs=1e-15)


def test_a_layer_that_moves_against_the_others_has_an_error():
    values = torch.ones(4, 3, 2, dtype=torch.float64)
    values[:, 1, 0] = torch.tensor([0.5, 1.5, 0.5, 1.5])
    errors = gathered(values).errors()
    assert errors["l1"] == (pytest.approx(math.sqrt(1 / 3) / 2), 0.0)
    assert errors["l0"] == errors["l2"] == (0.0, 0.0)


def test_a_layer_without_curvature_does_not_keep_the_others_from_settling():
    values = torch.ones(5, 3, 2, dtype=torch.float64)
    values[:, 2] = 0.0
    assert gathered(values).errors()["l2"] == (0.0, 0.0)
    assert gathered(values).settled(0.01)


@pytest.mark.parametrize("k", range(1, 7))
def test_nothing_is_settled_below_four_measurements(k):
    assert gathered(torch.ones(k, 2, 2)).settled(0.1) == (k >= MIN_MEASUREMENTS == 4)


def test_settled_compares_the_largest_error_of_any_layer_and_part():
    values = torch.ones(4, 3, 2, dtype=torch.float64)
    values[:, 1, 1] = torch.tensor([0.5, 1.5, 0.5, 1.5])
    assert not gathered(values).settled(0.28)
    assert gathered(values).settled(0.29)


def test_means_within_their_own_error_are_unsure():
    values = torch.ones(4, 2, 2, dtype=torch.float64)
    values[:, 0, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    values[:, 1, 1] = -3.0
    found = gathered(values).unsure()
    assert found["l0"] == (pytest.approx(math.sqrt(4 / 3) / 2), None)
    assert found["l1"] == (None, 0.0)


def test_the_largest_error_of_a_curvature_is_infinite_where_none_was_measured():
    bare = Curvature({}, {}, batch_size=1, n_samples=1, no_gradient=())
    assert bare.largest_error == math.inf
    some = Curvature({}, {}, 1, 1, (), (), {"a": (0.1, 0.2), "b": (0.3, 0.0)})
    assert some.largest_error == 0.3
    one = MeanCurvatures()
    one.add({"a": (1.0, 1.0)})
    assert one.errors() == {"a": (math.inf, math.inf)}
