"""Published scores against their formulas, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published_scores import empirical_fisher, fit, hawq_v2
from hq_optuna.curvature import hutchinson
from hq_optuna.network.batches import read_batches
from hq_optuna.quantization import get_bits, observe_inputs, prepare, set_bits
from hq_optuna.quantization.observers import watch_inputs
from hq_optuna.scoring import measure_sensitivity
from hq_optuna.space.search_space import SearchSpace
from tests.reference import curvature as slow
from tests.small_networks import ConvNet, Twice, layers_of, make, seeded


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


LABELS = torch.arange(9) % 3
CASES = {"Twice": (Twice, rows(9, 3)), "ConvNet": (ConvNet, rows(9, 2, 5, 5))}


def ready(network: nn.Module, data):
    layers = layers_of(network, data[0].inputs)
    histograms = observe_inputs(network, [layer.name for layer in layers], data)
    return prepare(network, layers, histograms), SearchSpace.build(layers, pin_first_last=None)


@pytest.mark.parametrize("name", CASES)
def test_fit_is_the_fisher_trace_times_the_noise_power_of_uniform_rounding(name):
    network, x = make(CASES[name][0]), CASES[name][1]
    data = read_batches((x, LABELS), batch_size=1)
    prepared, space = ready(network, data)
    set_bits(prepared, {space.layers[0].name: (5, 3)})
    before = get_bits(prepared)
    curvature = empirical_fisher(network, space.layers, data, F.cross_entropy)
    found = fit(prepared, space, curvature, data)
    assert get_bits(prepared) == before
    for layer in space.layers:
        w = network.get_submodule(layer.name).weight.detach()
        trace = slow.fisher_diagonal(network, layer.name, x, LABELS, F.cross_entropy).sum()
        calls = slow.input_gradients(network, layer.name, x, LABELS, F.cross_entropy)
        inputs = sum(float(g.square().sum()) for call in calls for g in call) / 9
        ranges = []
        for sample in x.split(1):
            seen: list[Tensor] = []
            with watch_inputs(network, [layer.name], lambda _, v, seen=seen: seen.append(v)):
                network(sample)
            values = torch.cat([v.detach().flatten() for v in seen])
            ranges.append(float(values.max() - values.min()))
        for bits in (2, 5, 8):
            noise = (float(w.max() - w.min()) / (2**bits - 1)) ** 2 / 12
            assert found.weights[layer.name][bits] == pytest.approx(float(trace) * noise)
            noise = (sum(ranges) / 9 / (2**bits - 1)) ** 2 / 12
            assert found.activations[layer.name][bits] == pytest.approx(inputs * noise)


@pytest.mark.parametrize("expert", [False, True])
def test_the_range_of_a_layer_that_some_batches_pass_by_is_that_of_the_others(expert):
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if bool(x.mean() > 0) else x)

    class Expert(Detour):
        """Calls its layer with no samples, instead of not at all."""

        def forward(self, x: Tensor) -> Tensor:
            taken = x if bool(x.mean() > 0) else x[:0]
            return self.b(torch.cat([self.a(taken), x[len(taken) :]]))

    network = make(Expert if expert else Detour)
    batches = [rows(8, 3, seed=i) + shift for i, shift in enumerate((5, -5, 5))]
    labels = torch.arange(8) % 3
    data = read_batches([(x, labels) for x in batches])
    prepared, space = ready(network, data)
    curvature = empirical_fisher(network, space.layers, data, F.cross_entropy)
    found = fit(prepared, space, curvature, data)
    entry = curvature.inputs["a"][0]
    spread = sum(float(x.max() - x.min()) for x in batches[::2]) / 2
    expected = entry.total / entry.n_samples * (spread / 255) ** 2 / 12
    assert found.activations["a"][8] == pytest.approx(expected)


def test_hawq_v2_is_the_mean_trace_times_the_squared_error_without_a_half():
    network, x = make(CASES["ConvNet"][0]), CASES["ConvNet"][1]
    data = read_batches((x, LABELS), batch_size=4)
    prepared, space = ready(network, data)
    curvature = hutchinson(
        network, space.layers, data, F.cross_entropy, most_sweeps=1, tolerance=0, raw=True
    )
    found = hawq_v2(prepared, space, curvature, data)
    halves = measure_sensitivity(prepared, space, curvature, data, "trace")
    for name in found.weights:
        for bits in (2, 8):
            set_bits(prepared, {name: (bits, 32)})
            moved = prepared.get_submodule(name).weight - network.get_submodule(name).weight
            mean = curvature.weights[name].sum() / moved.numel()
            omega = float((mean * moved.detach().square().sum()).detach())
            assert found.weights[name][bits] == pytest.approx(omega, rel=1e-9)
            assert found.activations[name][bits] == 2 * halves.activations[name][bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_the_curvature_is_the_same_everywhere_hawq_v2_is_twice_the_measured_rise(bits):
    network = make(nn.Sequential(nn.Linear(6, 4, bias=False)))
    x = torch.eye(6, dtype=torch.float64)
    data = read_batches((x, network[0].weight.detach().t().clone()), batch_size=6)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:  # ½ · 3 · ‖w − w₀‖²
        return 0.5 * 3 * 6 * (outputs - labels).square().sum(1).mean()

    prepared, space = ready(network, data)
    curvature = hutchinson(network, space.layers, data, loss, most_sweeps=1, tolerance=0)
    set_bits(prepared, {"0": (bits, 32)})
    rise = float(loss(prepared(x), data[0].labels).detach())
    assert hawq_v2(prepared, space, curvature, data).weights["0"][bits] == pytest.approx(2 * rise)
    halves = measure_sensitivity(prepared, space, curvature, data, "trace")
    assert halves.weights["0"][bits] == pytest.approx(rise)
