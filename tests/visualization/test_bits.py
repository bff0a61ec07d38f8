"""`plot_bits`."""

import numpy as np

from hq_optuna.protocol.history import read_history
from hq_optuna.search import ProgressiveSearch
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.visualization.bits import BitsInfo, bits_figure, bits_info, plot_bits
from tests.fake_search import fake_score, fake_space, fake_study, fake_table

NAMES = ("conv1", "layer1.0.conv", "layer3.1.conv", "fc")


def test_the_rows_are_the_layers_and_the_columns_the_closed_steps():
    # Both inner layers have the same MACs; layer3.1 is half as sensitive, so it goes first.
    study = fake_study(fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32))
    bits = ((8, 8, 8), (8, 8, 4), (8, 4, 4), (8, 8, 8))
    assert bits_info(read_history(study)) == BitsInfo(NAMES, (0, 1, 2), bits, bits, (4, 8))


def test_an_open_step_is_not_shown():
    study = fake_study(fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32), n_trials=4)
    info = bits_info(read_history(study))
    assert info.steps == (0,)
    assert info.weight_bits == ((8,), (8,), (8,), (8,))


def test_the_bits_are_those_of_the_same_search_run_without_a_study():
    space, budget = fake_space(8, bits=range(2, 9), activation_bits=(8, 4)), 0.3
    study = fake_study(space, budget=Budget.fraction(bops=budget), seed=3)
    table, model = fake_table(space), CostModel(space.layers)
    alone = ProgressiveSearch(
        space,
        model.cost,
        limit=budget * model.int8,
        n_candidates=4,
        rule="ratio",
        seed=3,
        refine=True,
    ).run(lambda config: sum(fake_score(table, config)))
    configs = [space.config(incumbent.state) for incumbent in alone]
    info = bits_info(read_history(study))
    assert info.steps == tuple(range(len(alone)))
    for i, name in enumerate(info.layers):
        assert info.weight_bits[i] == tuple(c[name].weight_bits for c in configs)
        assert info.activation_bits[i] == tuple(c[name].activation_bits for c in configs)


def test_equal_bits_share_one_panel_and_different_ones_get_two():
    same = plot_bits(fake_study(fake_space(5)))
    apart = plot_bits(fake_study(fake_space(5, activation_bits=(8, 6, 4))))
    assert len(same.data) == 1
    assert len(apart.data) == 2
    assert [a.text for a in apart.layout.annotations] == ["weights", "activations"]


def test_constant_activations_are_said_in_the_title_instead_of_drawn():
    fixed = plot_bits(fake_study(fake_space(5, activation_bits=8)))
    floating = plot_bits(
        fake_study(fake_space(5, activation_bits=None), budget=Budget.fraction(size_bytes=0.6))
    )
    assert len(fixed.data) == len(floating.data) == 1
    assert "activations stay at 8 bits" in fixed.layout.title.text
    assert "activations stay in float" in floating.layout.title.text


def test_each_cell_has_the_colour_that_the_colour_bar_names():
    info = BitsInfo(("a", "b"), (0, 1), ((8, 4), (32, 32)), ((8, 4), (32, 32)), (4, 8, 32))
    figure = bits_figure(info)
    axis = figure.layout.coloraxis
    assert axis.colorbar.ticktext == ("4", "8", "float")
    assert axis.colorbar.tickvals == (0, 1, 2)
    assert np.array_equal(figure.data[0].z, [[1, 0], [2, 2]])
    assert np.array_equal(figure.data[0].customdata, [[8, 4], [32, 32]])
    # Each level covers one third of the scale with one colour.
    stops = axis.colorscale
    for i in range(3):
        assert stops[2 * i][1] == stops[2 * i + 1][1]
        assert (stops[2 * i][0], stops[2 * i + 1][0]) == (i / 3, (i + 1) / 3)


def test_layers_with_numbers_for_names_keep_the_order_of_the_network():
    info = BitsInfo(("4", "0", "2"), (0,), ((8,), (4,), (2,)), ((8,), (4,), (2,)), (2, 4, 8))
    axis = bits_figure(info).layout.yaxis
    assert axis.type == "category"
    assert axis.categoryarray == axis.tickvals == ("4", "0", "2")
