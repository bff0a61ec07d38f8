"""`plot_cost_share`."""

import numpy as np
import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import shares
from hq_optuna.visualization.cost_share import (
    CostShareInfo,
    cost_share_figure,
    cost_share_info,
)
from tests.fake_search import fake_space, fake_study

NAMES = ("conv1", "layer1.0.conv", "layer3.1.conv", "fc")


def test_the_costs_are_macs_times_bits_of_weights_and_of_activations():
    study = fake_study(fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32))
    macs = (442_368, 2_359_296, 2_359_296, 1280)
    assert cost_share_info(read_history(study)) == CostShareInfo(
        NAMES,
        tuple(64.0 * m for m in macs),
        tuple(float(m * b * b) for m, b in zip(macs, (8, 4, 4, 8), strict=True)),
        "bops",
    )


def test_with_a_budget_in_bytes_the_costs_are_those_of_the_weights():
    study = fake_study(fake_space(4), budget=Budget.fraction(size_bytes=0.9), n_trials=0)
    info = cost_share_info(read_history(study))
    assert info == CostShareInfo(NAMES, (432.0, 2304.0, 36_864.0, 1280.0), None, "size_bytes")
    assert len(cost_share_figure(info).data) == 1


def test_the_bars_of_one_colour_add_up_to_one():
    figure = cost_share_figure(cost_share_info(read_history(fake_study(20))))
    assert len(figure.data) == 2
    for trace in figure.data:
        assert sum(trace.x) == pytest.approx(1, rel=1e-14)  # 20 rounded quotients


def test_shares_are_fractions_of_the_sum_and_zero_where_nothing_costs():
    assert np.array_equal(shares((1.0, 3.0)), [0.25, 0.75])
    assert np.array_equal(shares((0.0, 0.0)), [0.0, 0.0])
