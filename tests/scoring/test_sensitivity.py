"""Sensitivities against losses whose Hessian is known, where the prediction is no estimate."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_optuna.curvature import Curvature, InputCurvature, calibration_adam
from hq_optuna.errors import DataError, ScoreError
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import get_bits, observe_inputs, prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.observers import watch_inputs
from hq_optuna.quantization.prepare import input_quantizer
from hq_optuna.rises import rise_of_loss
from hq_optuna.scoring import (
    Sensitivity,
    measure_layer_sums,
    measure_sensitivity,
)
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace, bits_needed
from tests.small_networks import (
    ConvNet,
    PartlyDetached,
    Residual,
    Tokens,
    Twice,
    layers_of,
    make,
    rounded_by_hand,
    seeded,
)

ALL_BITS = range(1, 9)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def ready(network: nn.Module, data: Batches, **space):
    layers = layers_of(network, data[0].inputs)
    histograms = observe_inputs(network, [layer.name for layer in layers], data)
    options = {"bits": ALL_BITS, "pin_first_last": None, **space}
    return prepare(network, layers, histograms), SearchSpace.build(layers, **options)


def loss_over(network: nn.Module, data: Batches, loss_fn) -> float:
    with torch.no_grad():
        losses = [float(loss_fn(forward(network, b.inputs), b.labels)) * b.n for b in data]
    return math.fsum(losses) / data.n_samples


def known(weights: Tensor, inputs: Tensor, n: int) -> Curvature:
    """Curvature of a network of one layer, ``inputs`` per element of a sample."""
    entry = InputCurvature(float(inputs.sum()) * n, inputs.numel() * n, n, inputs * n)
    return Curvature({"0": weights}, {"0": [entry]}, batch_size=1, n_samples=n, no_gradient=())


@pytest.fixture
def quadratic():
    """½ Σ h (w − w₀)² as the loss of one linear layer: inputs are the unit vectors."""
    network = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(rows(4, 6))
    h = rows(4, 6, seed=1).exp()
    # Sample i gives column i of the weight; its labels are the column of h and of w₀.
    labels = torch.stack([h.t(), network[0].weight.detach().t()], dim=1)  # (6, 2, 4)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        h, w0 = labels.unbind(1)
        return 0.5 * (6 * h * (outputs - w0).square()).sum(1).mean()

    data = read_batches((torch.eye(6, dtype=torch.float64), labels), batch_size=4)
    return network, h, data, loss


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_predicted_rise_of_a_quadratic_loss_in_the_weights_is_the_measured_one(quadratic, bits):
    network, h, data, loss = quadratic
    prepared, space = ready(network, data)
    curvature = known(h, torch.ones(6, dtype=torch.float64), 6)
    found = measure_sensitivity(prepared, space, curvature, data, "diagonal")
    set_bits(prepared, {"0": LayerBits(bits, FLOAT_BITS)})
    assert loss_over(network, data, loss) == 0.0
    measured = loss_over(prepared, data, loss)
    assert measured > 0
    assert found.weights["0"][bits] == pytest.approx(measured, rel=1e-12)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_predicted_rise_of_a_quadratic_loss_in_the_inputs_is_the_measured_one(bits):
    network = nn.Sequential(nn.Linear(5, 5, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(5))
    x, c = rows(30, 5), rows(5, seed=1).exp()
    data = read_batches((x, x), batch_size=8)  # outputs are compared with the inputs themselves

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (c * (outputs - labels).square()).sum(1).mean()

    prepared, space = ready(network, data)
    curvature = known(torch.ones(5, 5, dtype=torch.float64), c, 30)
    found = measure_sensitivity(prepared, space, curvature, data, "diagonal")
    set_bits(prepared, {"0": LayerBits(FLOAT_BITS, bits)})
    assert found.activations["0"][bits] == pytest.approx(loss_over(prepared, data, loss), rel=1e-12)


@pytest.mark.parametrize("kind, shape", [(Residual, (9, 3)), (ConvNet, (9, 2, 5, 5))])
@pytest.mark.parametrize("scorer", ["trace", "diagonal"])
def test_both_forms_are_the_sums_they_are_named_after(kind, shape, scorer):
    network, x = make(kind), rows(*shape)
    data = read_batches((x, torch.arange(9) % 3), batch_size=4)
    prepared, space = ready(network, data)
    curvature = calibration_adam(network, space.layers, data, F.cross_entropy)
    found = measure_sensitivity(prepared, space, curvature, data, scorer)
    for layer in space.layers:
        w = network.get_submodule(layer.name).weight.detach()
        h = curvature.weights[layer.name]
        for bits in range(2, 9):
            e = w - rounded_by_hand(network.get_submodule(layer.name), layer, bits)
            expected = h.mean() * e.square().sum() if scorer == "trace" else (h * e**2).sum()
            assert found.weights[layer.name][bits] == pytest.approx(float(expected) / 2, rel=1e-10)


@pytest.mark.parametrize("name", ["Twice", "tokens", "flat tokens"])
@pytest.mark.parametrize("scorer", ["trace", "diagonal"])
def test_the_inputs_part_adds_up_all_calls_and_positions_of_a_layer(name, scorer):
    networks = {"Twice": Twice, "tokens": Tokens(False), "flat tokens": Tokens(True)}
    network, x = make(networks[name]), rows(*((9, 3) if name == "Twice" else (9, 4, 3)))
    data = read_batches((x, torch.arange(9) % 3), batch_size=4)
    prepared, space = ready(network, data)
    curvature = calibration_adam(network, space.layers, data, F.cross_entropy)
    found = measure_sensitivity(prepared, space, curvature, data, scorer)
    for layer in space.layers:
        seen: list[Tensor] = []
        with watch_inputs(network, [layer.name], lambda _, x, seen=seen: seen.append(x.detach())):
            network(x)
        assert len(seen) == layer.n_calls
        for bits in (1, 4, 8):
            quantizer = input_quantizer(prepared.get_submodule(layer.name))
            scale, zero_point = quantizer.range(bits)
            total = 0.0
            for call, entry in zip(seen, curvature.inputs[layer.name], strict=True):
                rounded = torch.fake_quantize_per_tensor_affine(
                    call, scale, zero_point, 0, 2**bits - 1
                )
                e = (rounded - call).square().reshape(9, -1)
                if scorer == "trace":
                    total += entry.mean * float(e.sum()) / 9
                else:
                    total += float((entry.per_element / 9 * e.mean(0)).sum())
            assert found.activations[layer.name][bits] == pytest.approx(total / 2, rel=1e-10)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_at_an_optimum_the_predicted_rise_for_the_inputs_is_the_measured_one(bits):
    network, x = make(nn.Sequential(nn.Linear(4, 3))), rows(4000, 4)
    p = network(x).softmax(1).detach()
    # A classifier that drew its labels itself, so its weights are the best there are.
    data = read_batches((x, torch.multinomial(p, 1, generator=seeded(3))[:, 0]), batch_size=50)
    prepared, space = ready(network, data)
    curvature = calibration_adam(network, space.layers, data, F.cross_entropy)
    found = measure_sensitivity(prepared, space, curvature, data, "diagonal")
    # Measured without the labels' noise: the mean over all labels it could have drawn.
    soft = read_batches((x, p), batch_size=500)
    set_bits(prepared, {"0": LayerBits(FLOAT_BITS, bits)})
    measured = loss_over(prepared, soft, F.cross_entropy) - loss_over(
        network, soft, F.cross_entropy
    )
    # Errors of different inputs are independent, so what the diagonal leaves out cancels; squared
    # gradients of 4000 samples scatter by 4 % at most.
    assert found.activations["0"][bits] == pytest.approx(measured, rel=0.1)


def test_fewer_bits_cost_more():
    network, x = make(ConvNet), rows(9, 2, 5, 5)
    data = read_batches((x, torch.arange(9) % 3), batch_size=4)
    prepared, space = ready(network, data)
    curvature = calibration_adam(network, space.layers, data, F.cross_entropy)
    found = measure_sensitivity(prepared, space, curvature, data, "trace")
    for table in (found.weights, found.activations):
        for row in table.values():
            values = [row[bits] for bits in sorted(row) if bits > 1]
            assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", ["trace", "diagonal", "fisher", "hutchinson"])
def test_the_rises_of_a_layer_without_gradient_are_measured(name):
    network, x = make(PartlyDetached), rows(9, 3)
    data = read_batches((x, torch.arange(9) % 3), batch_size=4)
    prepared, space = ready(network, data)
    sums = measure_layer_sums(name, network, prepared, space, data, F.cross_entropy)
    found = sums.sensitivity
    assert sums.curvature.no_gradient == ("frozen",)
    outputs = [network(batch.inputs).detach() for batch in data]
    rise = rise_of_loss(F.cross_entropy).fitted(outputs, data)
    for bits in (2, 8):
        for row, pair in ((found.weights, (bits, 32)), (found.activations, (32, bits))):
            set_bits(prepared, {"frozen": pair})
            moved = [prepared(batch.inputs).detach() for batch in data]
            expected = sum(map(float, map(rise, outputs, moved))) / 9
            assert row["frozen"][bits] == pytest.approx(expected, rel=1e-6) and expected > 0
    assert any("'frozen' gets no gradient" in each for each in sums.warnings)


class Steps(nn.Module):
    """Calls a layer once for each step of a sequence; `rare` only for long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.rare, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(x[:, t] + h))
        return self.head(self.rare(h) if x.shape[1] > 2 else h)


@pytest.mark.parametrize("form", ["trace", "output"])
def test_calls_that_curvature_never_saw_count_by_those_it_did(form):
    network, labels = make(Steps), torch.arange(6) % 3
    data = read_batches([(rows(6, n, 3, seed=n), labels) for n in (2, 5)])
    prepared, space = ready(network, Batches(data[::-1]))  # the long batch shows all layers
    # What stopping after the first batch leaves: two calls of `step`, none of `rare`.
    early = calibration_adam(network, space.layers, Batches(data[:1]), F.cross_entropy)
    found = measure_sensitivity(prepared, space, early, data, form).activations
    first, second = early.inputs["step"]
    largest = max(first.mean, second.mean, early.inputs["head"][0].mean)
    means = {
        "step": [first.mean, second.mean] * 2 + [(first.mean + second.mean) / 2] * 3,
        "rare": [largest],
    }
    for name, expected in means.items():
        seen: list[Tensor] = []
        with watch_inputs(network, [name], lambda _, x, seen=seen: seen.append(x.detach())):
            for batch in data:
                network(batch.inputs)
        for bits in (2, 8):
            error = input_quantizer(prepared.get_submodule(name)).quantized
            squares = [float((error(x, bits) - x).square().sum()) for x in seen]
            rise = 0.5 * sum(m * e for m, e in zip(expected, squares, strict=True)) / 12
            assert found[name][bits] == pytest.approx(rise, rel=1e-10)


def test_a_loss_that_does_not_hang_on_the_network_is_refused():
    network, x = make(Residual), rows(9, 3)
    data = read_batches((x, torch.arange(9) % 3))
    prepared, space = ready(network, data)
    with pytest.raises(DataError, match="moves the loss"):
        measure_layer_sums("diagonal", network, prepared, space, data, lambda z, y: (z * 0).sum())


@pytest.mark.parametrize("where", ["weights", "inputs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused_with_the_layers_name(quadratic, where, value):
    network, h, data, _ = quadratic
    prepared, space = ready(network, data)
    inputs = torch.ones(6, dtype=torch.float64)
    (h if where == "weights" else inputs)[0] = value
    before = get_bits(prepared)
    with pytest.raises(ScoreError, match=r"loss rise of layer '0' at \d bits is (nan|inf)"):
        measure_sensitivity(prepared, space, known(h, inputs, 6), data)
    assert get_bits(prepared) == before


def test_an_unknown_scorer_is_refused_by_name(quadratic):
    network, h, data, _ = quadratic
    prepared, space = ready(network, data)
    with pytest.raises(ValueError, match="one of trace, diagonal, output; got 'hutchinson'"):
        measure_sensitivity(prepared, space, known(h, h[0], 6), data, "hutchinson")


def test_the_prepared_networks_bits_and_weights_are_as_before_also_after_an_error(quadratic):
    network, h, data, _ = quadratic
    prepared, space = ready(network, data)
    set_bits(prepared, {"0": (5, 3)})
    state = copy.deepcopy(prepared.state_dict())
    told: list[tuple[int, int]] = []
    curvature = known(h, torch.ones(6, dtype=torch.float64), 6)
    measure_sensitivity(
        prepared, space, curvature, data, progress=lambda i, of: told.append((i, of))
    )
    assert told == [(1, 2), (2, 2)]

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(prepared, space, curvature, data, progress=stop)
    assert get_bits(prepared) == BitConfig({"0": (5, 3)})
    assert all(torch.equal(v, state[k]) for k, v in prepared.state_dict().items())
    assert not prepared[0]._forward_pre_hooks.keys() - {
        k for k, hook in prepared[0]._forward_pre_hooks.items() if "quantize" in hook.__name__
    }


def test_only_bits_that_the_space_allows_are_looked_at():
    network, x = make(Residual), rows(9, 3)
    data = read_batches((x, torch.arange(9) % 3))
    prepared, space = ready(
        network, data, bits=(8, 4), activation_bits=None, pin_first_last=8, allowed={"a": (6, 3)}
    )
    assert bits_needed(space) == {
        "first": ({8}, set()),
        "a": ({6, 3}, set()),
        "b": ({8, 4}, set()),
        "head": ({8}, set()),
    }
    curvature = calibration_adam(network, space.layers, data, F.cross_entropy)
    calls: list[int] = []
    handle = prepared.register_forward_hook(lambda *_: calls.append(1))
    found = measure_sensitivity(prepared, space, curvature, data)
    handle.remove()
    assert not calls  # no activation is rounded, so no pass is needed
    assert {name: set(row) for name, row in found.weights.items()} == {
        "first": {8},
        "a": {6, 3},
        "b": {8, 4},
        "head": {8},
    }
    assert not any(found.activations.values())
    assert found.score(space.start)[1] == 0.0


# The table itself.

TABLE = Sensitivity(
    weights={"a": {8: 0.1, 4: 1e-17}, "b": {8: 1e16, 4: 1 / 3}, "c": {8: -1e16, 4: 0.7}},
    activations={"a": {8: 0.2, 4: 2.0}, "b": {8: 5e-324, 4: 0.3}, "c": {8: 0.0, 4: 0.1}},
)


def test_a_score_is_the_exact_sum_over_the_layers_whatever_their_order():
    config = BitConfig({"a": (8, 4), "b": (8, 8), "c": (8, 4)})
    backwards = BitConfig(dict(reversed(list(config.items()))))
    assert TABLE.score(config) == TABLE.score(backwards) == (0.1, 2.0 + 0.1)


def test_float_layers_cost_nothing():
    config = BitConfig({"a": (FLOAT_BITS, 4), "b": (4, FLOAT_BITS), "c": (FLOAT_BITS, FLOAT_BITS)})
    assert TABLE.score(config) == (1 / 3, 2.0)


def test_a_table_survives_json_to_the_last_bit():
    text = json.dumps(TABLE.to_json())
    assert Sensitivity.from_json(json.loads(text)) == TABLE


def test_output_errors_count_less_where_they_make_up_for_each_other():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 24), nn.Linear(24, 3)).eval()
    data = read_batches((torch.randn(64, 2), torch.randint(0, 3, (64,))))
    layers = introspect(network, data[0].inputs).layers
    only_weights = SearchSpace.build(layers, activation_bits=None, pin_first_last=None)
    nearest, compensated = prepare(network, layers), prepare(network, layers)
    compensate_weights(compensated, layers, data, {layer.name: range(2, 9) for layer in layers})
    curvature = calibration_adam(network, layers, data, nn.functional.cross_entropy)

    def rises(prepared, form):
        return measure_sensitivity(prepared, only_weights, curvature, data, form).weights["1"]

    assert rises(nearest, "output") == pytest.approx(rises(nearest, "trace"))
    output, squared = rises(compensated, "output"), rises(compensated, "trace")
    assert all(output[bits] < 0.5 * squared[bits] for bits in range(2, 7))
    assert output[3] < 0.5 * rises(nearest, "output")[3]
