"""`plot_sensitivity`."""

import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.visualization.sensitivity import (
    SensitivityInfo,
    plot_sensitivity,
    sensitivity_figure,
    sensitivity_info,
)
from tests.fake_search import fake_space, fake_study


def _history(**more):
    space = fake_space(4, bits=(8, 4))
    return read_history(fake_study(space, budget=Budget.fraction(bops=0.32), **more))


def test_the_table_is_in_network_order_and_from_wide_to_narrow():
    weights = tuple((s * 4.0**-8, s * 4.0**-4) for s in (0.25, 2.0, 1.0, 2.75))
    assert sensitivity_info(_history()) == SensitivityInfo(
        layers=("conv1", "layer1.0.conv", "layer3.1.conv", "fc"),
        bits=(8, 4),
        weights=weights,
        activations=tuple(tuple(nats / 2 for nats in row) for row in weights),
        weight_bits=(8, 4, 4, 8),
        activation_bits=(8, 4, 4, 8),
    )


def test_before_the_first_step_no_bits_are_marked():
    info = sensitivity_info(_history(n_trials=0))
    assert info.weight_bits is info.activation_bits is None
    assert all(trace.type == "heatmap" for trace in sensitivity_figure(info).data)


def test_the_marks_stand_at_the_bits_of_the_incumbent():
    figure = sensitivity_figure(sensitivity_info(_history()))
    marks = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(marks) == 2
    for trace in marks:
        assert trace.x == ("8", "4", "4", "8")
        assert trace.y == ("conv1", "layer1.0.conv", "layer3.1.conv", "fc")


def test_colours_are_powers_of_ten_and_what_is_missing_or_zero_is_empty():
    info = SensitivityInfo(
        ("a", "b"), (8, 4), ((0.01, 1.0), (None, 0.0)), ((None, None), (None, None)), None, None
    )
    figure = sensitivity_figure(info)
    (heatmap,) = figure.data  # a part without numbers has no panel
    assert [list(row) for row in heatmap.z] == [[-2.0, 0.0], [None, None]]
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-2.0, 0.0)
    assert axis.colorbar.ticktext == ("10<sup>−2</sup>", "10<sup>−1</sup>", "10<sup>0</sup>")


@pytest.mark.parametrize("nats", [((0.02, 0.05),), ((0.02, 0.02),), ((0.0, 0.0),)])
def test_a_table_within_a_decade_still_has_a_colour_bar(nats):
    info = SensitivityInfo(("a",), (8, 4), nats, ((None, None),), None, None)
    axis = sensitivity_figure(info).layout.coloraxis
    assert axis.cmin < axis.cmax
    assert len(axis.colorbar.ticktext) == 2


def test_layers_that_the_table_does_not_know_are_empty():
    history = _history()
    del history.sensitivity["fc"]
    assert sensitivity_info(history).weights[-1] == (None, None)


def test_bits_that_the_table_does_not_know_get_no_mark():
    study = fake_study(
        fake_space(4, bits=(8, 4), activation_bits=None), budget=Budget.fraction(size_bytes=0.6)
    )
    marks = [trace for trace in plot_sensitivity(study).data if trace.type == "scatter"]
    assert len(marks) == 1  # activations are in float
