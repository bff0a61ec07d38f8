"""Every sum over layers by its name, on one small network."""

import pytest
import torch
import torch.nn.functional as F

from hq_optuna.curvature import calibration_adam
from hq_optuna.network.batches import read_batches
from hq_optuna.quantization import observe_inputs, prepare
from hq_optuna.scoring import LAYER_SUMS, SCORERS, measure_layer_sums, measure_sensitivity
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.search_space import SearchSpace
from tests.small_networks import ConvNet, layers_of, make, seeded

X = torch.randn(16, 2, 5, 5, generator=seeded(0), dtype=torch.float64)
Y = torch.arange(16) % 3


@pytest.fixture
def parts():
    network, data = make(ConvNet), read_batches((X, Y), batch_size=4)
    layers = layers_of(network, X)
    histograms = observe_inputs(network, [layer.name for layer in layers], data)
    prepared = prepare(network, layers, histograms)
    return network, prepared, SearchSpace.build(layers, pin_first_last=None), data


def test_every_sum_is_a_scorer():
    assert set(LAYER_SUMS) < set(SCORERS)
    assert set(SCORERS) - set(LAYER_SUMS) == {"gauss_newton", "loss"}


@pytest.mark.parametrize("name", LAYER_SUMS)
def test_weights_and_activations_of_all_layers_add_up_and_fewer_bits_cost_more(parts, name):
    network, prepared, space, data = parts
    told: list[str] = []
    table, curvature, measured = measure_layer_sums(
        name,
        network,
        prepared,
        space,
        data,
        F.cross_entropy,
        progress=lambda what, done, of: told.append(what),
    )
    assert told[0] == ("sensitivity" if name == "hessian_trace" else "curvature")
    assert measured == ()
    assert 1 <= curvature.n_samples <= 16
    names = [layer.name for layer in space.layers]
    weights, inputs = table.score(BitConfig.uniform(names, 3, 5))
    assert weights == pytest.approx(sum(table.weights[n][3] for n in names))
    assert inputs == pytest.approx(sum(table.activations[n][5] for n in names))
    assert all(table.weights[n][2] > table.weights[n][8] >= 0 for n in names)
    assert all(table.activations[n][2] > table.activations[n][8] >= 0 for n in names)


@pytest.mark.parametrize("name", ["diagonal", "trace"])
def test_adams_sums_are_what_they_were(parts, name):
    network, prepared, space, data = parts
    curvature = calibration_adam(network, space.layers, data, F.cross_entropy)
    expected = measure_sensitivity(prepared, space, curvature, data, name)
    found = measure_layer_sums(name, network, prepared, space, data, F.cross_entropy)
    assert found.sensitivity == expected


def test_unknown_names_and_losses_are_refused(parts):
    with pytest.raises(ValueError, match=r"A sum over layers is one of .*diagonal, .*; got 'loss'"):
        measure_layer_sums("loss", *parts, F.cross_entropy)
    with pytest.raises(ValueError, match="'fisher' knows cross-entropy and squared error"):
        measure_layer_sums("fisher", *parts, lambda z, y: z.square().mean())
