"""Calibration Adam against its slow recursion, sample-by-sample gradients, and the Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_optuna.curvature import InputCurvature, calibration_adam
from hq_optuna.curvature.estimate import per_sample
from hq_optuna.network.batches import Batches, read_batches
from hq_optuna.space.layers import LayerSpec
from tests.reference import curvature as slow
from tests.small_networks import (
    ConvNet,
    LaterInPlace,
    PartlyDetached,
    Residual,
    Tokens,
    Twice,
    assert_unchanged,
    layers_of,
    make,
    seeded,
    snapshot,
)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


LABELS = torch.arange(11) % 3
CASES = {
    "Residual": (lambda: make(Residual), rows(11, 3)),
    "Twice": (lambda: make(Twice), rows(11, 3)),
    "ConvNet": (lambda: make(ConvNet), rows(11, 2, 5, 5)),
    "tokens (N, T, D)": (lambda: make(Tokens(False)), rows(11, 4, 3)),
    "tokens (N * T, D)": (lambda: make(Tokens(True)), rows(11, 4, 3)),
}
BATCH_SIZES = [1, 4, 11]  # 4 leaves a last batch of 3


def case(name: str, batch_size: int) -> tuple[nn.Module, Tensor, list[LayerSpec], Batches]:
    network, x = CASES[name][0](), CASES[name][1]
    return network, x, list(layers_of(network, x)), read_batches((x, LABELS), batch_size=batch_size)


@pytest.mark.parametrize("beta2", [0.9, 0.999])
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_weight_curvature_is_adams_second_moment_times_the_batch_size(name, batch_size, beta2):
    network, _, layers, data = case(name, batch_size)
    found = calibration_adam(network, layers, data, F.cross_entropy, beta2=beta2)
    assert list(found.weights) == [layer.name for layer in layers]
    assert (found.batch_size, found.n_samples, found.no_gradient) == (batch_size, 11, ())
    for layer in layers:
        gradients = slow.batch_gradients(network, layer.name, data, F.cross_entropy)
        # A gradient of fewer samples is noisier: scaled so that its square is as large on average.
        gradients = [g * (b.n / batch_size) ** 0.5 for g, b in zip(gradients, data, strict=True)]
        expected = slow.adam_second_moment(gradients, beta2) * batch_size
        torch.testing.assert_close(found.weights[layer.name], expected, rtol=1e-10, atol=0.0)


def test_in_single_precision_it_is_what_torchs_adam_keeps_bit_for_bit():
    network = make(Twice, dtype=torch.float32)
    x = rows(11, 3).float()
    layers, data = layers_of(network, x), read_batches((x, LABELS), batch_size=4)
    found = calibration_adam(network, layers, data, F.cross_entropy, beta2=0.9)
    weights = {layer.name: network.get_submodule(layer.name).weight for layer in layers}
    optimizer = torch.optim.Adam(weights.values(), lr=0.0, betas=(0.0, 0.9))
    for batch in data:
        optimizer.zero_grad()
        F.cross_entropy(network(batch.inputs), batch.labels).backward()
        for weight in weights.values():
            weight.grad *= (batch.n / 4) ** 0.5
        optimizer.step()
    for name, weight in weights.items():
        kept = optimizer.state[weight]["exp_avg_sq"]
        assert torch.equal(found.weights[name], kept / (1 - 0.9**3) * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_has_the_curvature_of_the_same_in_single(dtype):
    # Gradients near 1e-4, whose squares are below the smallest number of float16.
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return 1e-3 * F.cross_entropy(outputs.float(), labels)

    half = make(Twice, dtype=torch.float32).to(dtype)
    x = rows(320, 3).to(dtype)
    layers, y = layers_of(half, x), torch.arange(320) % 3
    found = calibration_adam(half, layers, read_batches((x, y), batch_size=8), loss)
    single = read_batches((x.float(), y), batch_size=8)
    expected = calibration_adam(half.float(), layers, single, loss)
    for name, h in expected.weights.items():
        assert found.weights[name].dtype == torch.float32
        # Gradients have eight binary digits in bfloat16, and 1e-4 has ten in float16.
        away = torch.linalg.norm(found.weights[name] - h)
        assert float(away) < 0.05 * float(torch.linalg.norm(h))


@pytest.mark.parametrize("name", CASES)
def test_one_sample_a_batch_and_a_long_memory_give_the_empirical_fisher_diagonal(name):
    network, x, layers, data = case(name, 1)
    found = calibration_adam(network, layers, data, F.cross_entropy, beta2=1 - 1e-8)
    for layer in layers:
        expected = slow.fisher_diagonal(network, layer.name, x, LABELS, F.cross_entropy)
        # 1 − β₂ = 1e-8 leaves eight digits in double precision.
        torch.testing.assert_close(found.weights[layer.name], expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("n, batch_size", [(2000, 1), (8000, 5), (32000, 50)])
def test_at_the_optimum_of_a_classifier_curvature_is_the_hessians_diagonal(n, batch_size):
    network, x = make(nn.Sequential(nn.Linear(3, 3))), rows(n, 3, seed=1)
    # Labels drawn from the network itself: its weights are the best there are.
    y = torch.multinomial(network(x).softmax(1).detach(), 1, generator=seeded(3))[:, 0]
    data = read_batches((x, y), batch_size=batch_size)
    found = calibration_adam(network, layers_of(network, x), data, F.cross_entropy, beta2=0.9999)
    exact = slow.hessian_diagonal(network, "0", x, y, F.cross_entropy)
    # Squared gradients scatter by √2 to √5 of their mean: 4 standard errors of the batches' mean.
    within = 4 * (5 / len(data)) ** 0.5
    torch.testing.assert_close(found.weights["0"], exact, rtol=within, atol=0.0)


def test_at_the_optimum_of_least_squares_curvature_is_the_hessians_diagonal():
    network, x = make(nn.Sequential(nn.Linear(3, 2, bias=False))), rows(8000, 3, seed=4)
    x = x * torch.tensor([0.3, 1.0, 3.0])
    y = network(x).detach() + rows(8000, 2, seed=5)  # unit noise: Fisher matrix and Hessian agree

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (outputs - labels).square().sum(1).mean()

    found = calibration_adam(
        network, layers_of(network, x), read_batches((x, y), batch_size=4), loss, beta2=0.9999
    )
    exact = slow.hessian_diagonal(network, "0", x, y, loss)
    torch.testing.assert_close(exact[0], x.square().mean(0))  # the closed form
    within = 4 * (5 / 2000) ** 0.5
    torch.testing.assert_close(found.weights["0"], exact, rtol=within, atol=0.0)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_input_curvature_is_the_mean_of_each_samples_squared_gradient(name, batch_size):
    network, x, layers, data = case(name, batch_size)
    found = calibration_adam(network, layers, data, F.cross_entropy)
    for layer in layers:
        calls = slow.input_gradients(network, layer.name, x, LABELS, F.cross_entropy)
        assert len(found.inputs[layer.name]) == len(calls) == layer.n_calls
        for entry, gradients in zip(found.inputs[layer.name], calls, strict=True):
            squared = torch.stack([g.square().flatten() for g in gradients])  # (N, elements)
            assert (entry.n_samples, entry.count) == (11, squared.numel())
            assert entry.total == pytest.approx(float(squared.sum()), rel=1e-10)
            assert entry.mean == pytest.approx(float(squared.mean()), rel=1e-10)
            torch.testing.assert_close(entry.per_element, squared.sum(0), rtol=1e-10, atol=1e-18)


def test_a_shortcut_around_a_layer_adds_nothing_to_the_layers_input_curvature():
    # Around `a` the identity has a gradient of 1; through it the weight is 0 and nothing comes.
    network = make(Residual)
    with torch.no_grad():
        network.a.weight.zero_()
    x = rows(11, 3)
    layers, data = layers_of(network, x), read_batches((x, LABELS))
    found = calibration_adam(network, layers, data, F.cross_entropy)
    assert found.inputs["a"][0].total == 0.0
    assert found.inputs["b"][0].mean > 0 or found.inputs["head"][0].mean > 0


def test_a_tensor_may_be_changed_in_place_after_a_layer_has_read_it():
    network, x = make(LaterInPlace), rows(11, 3)
    found = calibration_adam(
        network, layers_of(network, x), read_batches((x, LABELS)), F.cross_entropy
    )
    # The same network without the in-place operation.
    y = network.first(x)
    logits = network.head(F.relu(y) + network.second(y))
    weights = [network.get_submodule(n).weight for n in ("first", "second", "head")]
    gradients = torch.autograd.grad(F.cross_entropy(logits, LABELS), weights)
    for name, gradient in zip(("first", "second", "head"), gradients, strict=True):
        torch.testing.assert_close(found.weights[name], gradient.square() * 11)


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_network_and_data_are_left_as_they_were(training):
    network, _, layers, data = case("ConvNet", 4)
    network.train(training)
    network.head.weight.requires_grad_(False)
    before, digest = snapshot(network), data.digest()
    calibration_adam(network, layers, data, F.cross_entropy)
    assert_unchanged(network, before)
    assert data.digest() == digest


def test_a_network_in_training_mode_is_looked_at_in_eval_mode():
    network, _, layers, data = case("ConvNet", 4)
    evaluated = calibration_adam(network.eval(), layers, data, F.cross_entropy)
    trained = calibration_adam(network.train(), layers, data, F.cross_entropy)
    for name, h in evaluated.weights.items():
        assert torch.equal(h, trained.weights[name])  # dropout off, batch-norm statistics fixed


def test_frozen_weights_and_callers_without_gradients_make_no_difference():
    network, _, layers, data = case("Residual", 4)
    expected = calibration_adam(network, layers, data, F.cross_entropy).weights
    network.requires_grad_(False)
    with torch.no_grad():
        found = calibration_adam(network, layers, data, F.cross_entropy).weights
    assert all(torch.equal(found[name], h) for name, h in expected.items())


def test_a_layer_that_gets_no_gradient_is_named():
    network, x = make(PartlyDetached), rows(11, 3)
    found = calibration_adam(
        network, layers_of(network, x), read_batches((x, LABELS)), F.cross_entropy
    )
    assert found.no_gradient == ("frozen",)
    assert not found.weights["frozen"].any()
    assert found.inputs["frozen"][0].total == 0.0
    expected = slow.fisher_diagonal(network, "head", x, LABELS, F.cross_entropy)
    assert found.inputs["head"][0].mean > 0 and expected.any()


def test_of_a_loss_without_any_gradient_no_layer_is_known():
    network, _, layers, data = case("Residual", 4)

    def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).double().mean()

    found = calibration_adam(network, layers, data, accuracy)
    assert found.unknown == {layer.name for layer in layers}


def test_progress_is_told_after_each_batch():
    network, _, layers, data = case("Residual", 4)
    told: list[tuple[int, int]] = []
    calibration_adam(
        network, layers, data, F.cross_entropy, progress=lambda i, of: told.append((i, of))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_layers_called_with_keywords_are_seen():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    network, x = make(Keyword), rows(11, 3)
    found = calibration_adam(
        network, layers_of(network, x), read_batches((x, LABELS)), F.cross_entropy
    )
    plain = nn.Sequential(network.inner)
    expected = slow.input_gradients(plain, "0", x, LABELS, F.cross_entropy)[0]
    total = sum(float(g.square().sum()) for g in expected)
    assert found.inputs["inner"][0].total == pytest.approx(total)


def test_inputs_whose_size_changes_keep_their_total_only():
    entry = InputCurvature()
    entry.add(torch.ones(2, 3), 2)
    assert entry.per_element.tolist() == [2.0, 2.0, 2.0]
    entry.add(torch.full((4, 5), 2.0), 4)
    entry.add(torch.ones(2, 3), 2)
    assert entry.per_element is None
    assert (entry.total, entry.count, entry.n_samples) == (6 + 80 + 6, 32, 8)
    assert entry.mean == 92 / 32


def test_positions_flattened_into_the_first_axis_belong_to_their_sample():
    x = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(per_sample(x, 2), x.reshape(2, 12))
    assert per_sample(x, 4) is None  # six rows cannot be those of four samples
    assert per_sample(torch.tensor(1.0), 1) is None
