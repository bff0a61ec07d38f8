"""Second moments of an optimizer as curvature, against a mean kept by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.curvature import calibration_adam
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.scoring.sensitivity import measure_sensitivity
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.training import Trainer, TrainingSettings, rounded_copy
from tests.small_networks import PartlyDetached, make, seeded
from tests.training.examples import float_net, images, labelled, prepared_net

SETTINGS = TrainingSettings(
    epochs=2, batch_size=8, learning_rate=0.01, beta2=0.9, weight_decay=0.3, label_weight=0.5
)


def trained(settings=SETTINGS) -> tuple[Trainer, list[torch.Tensor]]:
    """A finished training, and the gradients of the convolution's weight step by step."""
    net, gradients = prepared_net(), []
    net.conv.parametrizations.weight.original.register_hook(gradients.append)
    run = Trainer(net, labelled(), settings, teacher=float_net(), loss_fn=F.cross_entropy)
    list(run.epochs())
    return run, gradients


def test_moments_are_the_bias_corrected_mean_of_squared_gradients():
    run, gradients = trained()
    v = torch.zeros(4, 2, 3, 3, dtype=torch.float64)
    for g in gradients:
        v = 0.9 * v + 0.1 * g.double().square()
    found = run.second_moments()
    assert found.n_steps == len(gradients) == 6 and found.batch_size == 8
    # Weight decay is decoupled, so nothing of it is in there.
    expected = (v / (1 - 0.9**6)).float()
    torch.testing.assert_close(found.moments["conv"], expected, rtol=1e-5, atol=0)
    assert list(found.moments) == ["conv", "head"]


def test_sgd_keeps_no_second_moments():
    run, _ = trained(replace(SETTINGS, optimizer="sgd"))
    assert run.second_moments() is None


def test_before_the_first_step_there_are_none():
    run = Trainer(prepared_net(), labelled(), SETTINGS, teacher=float_net(), loss_fn=F.mse_loss)
    assert run.second_moments() is None


def test_clipped_weights_are_counted_by_layer():
    run, _ = trained()
    for name, bits in (("conv", 2), ("head", 3)):
        module = run.network.get_submodule(name)
        scale = weight_quantizer(module).scales[bits]
        end = scale.reshape(-1, *[1] * (float_weight(module).dim() - 1)) * (2 ** (bits - 1) - 1)
        expected = int((float_weight(module).abs() > end).sum())
        assert run.second_moments().clipped[name] == expected
    assert run.second_moments().clipped["conv"] > 0


def test_curvature_takes_weights_from_the_moments_and_inputs_from_the_measurement():
    run, _ = trained()
    data = read_batches(labelled(), batch_size=10)
    layers = introspect(float_net(), images()).layers
    measured = calibration_adam(rounded_copy(run.network), layers, data, F.cross_entropy)
    moments = run.second_moments()
    curvature = moments.curvature(measured)
    for name, v in moments.moments.items():
        assert torch.equal(curvature.weights[name], 8 * v)
        assert curvature.inputs[name] is measured.inputs[name]
    assert curvature.batch_size == 8 and curvature.no_gradient == ()
    # What the score asks of a curvature.
    space = SearchSpace.build(layers, bits=[2, 3], pin_first_last=None)
    sensitivity = measure_sensitivity(run.network, space, curvature, data, "diagonal")
    assert all(v > 0 for row in sensitivity.weights.values() for v in row.values())


def test_a_layer_without_gradient_is_flagged_and_not_free():
    float_ = make(PartlyDetached, dtype=torch.float32)
    x = torch.randn(16, 3, generator=seeded(0))
    y = torch.arange(16) % 3
    layers = introspect(float_, x).layers
    net = prepare(float_, layers)
    set_bits(net, {"frozen": (3, 32), "head": (3, 32)})
    with torch.no_grad():  # a weight that meets no gradient but a zero one
        net.head.parametrizations.weight.original.zero_()
    settings = TrainingSettings(epochs=1, batch_size=4, label_weight=1, warmup_epochs=0)
    run = Trainer(net, (x, y), settings, loss_fn=lambda z, y: F.cross_entropy(z, y) + 0 * z.sum())
    list(run.epochs())
    found = run.second_moments()
    assert list(found.moments) == ["head"]  # `frozen` has no moments at all
    data = read_batches((x, y))
    measured = calibration_adam(rounded_copy(net), layers, data, F.cross_entropy)
    curvature = found.curvature(measured)
    assert curvature.no_gradient == ("frozen",)
    space = SearchSpace.build(layers, bits=[2, 3], activation_bits=None, pin_first_last=None)
    rises = measure_sensitivity(net, space, curvature, data, "diagonal").weights["frozen"]
    assert rises[2] > 0


def test_moments_that_are_zero_throughout_are_flagged():
    float_ = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        float_[0].bias.fill_(-1e3)  # a dead layer: ReLU lets nothing through
    x = torch.randn(16, 3, generator=seeded(0))
    layers = introspect(float_, x).layers
    net = prepare(float_, layers)
    set_bits(net, {"0": (3, 32), "2": (3, 32)})
    y = torch.arange(16) % 2
    settings = TrainingSettings(epochs=1, batch_size=4, label_weight=1, warmup_epochs=0)
    run = Trainer(net, (x, y), settings, loss_fn=F.cross_entropy)
    list(run.epochs())
    found = run.second_moments()
    assert set(found.no_gradient) == {"0", "2"}
    data = read_batches((x, y))
    measured = calibration_adam(rounded_copy(net), layers, data, F.cross_entropy)
    assert set(found.curvature(measured).no_gradient) == {"0", "2"}


@pytest.mark.parametrize("out_of_range", ["pass", "stop"])
def test_moments_of_clipped_weights_vanish_only_where_their_gradient_stops(out_of_range):
    settings = replace(SETTINGS, out_of_range=out_of_range, learning_rate=1e-9)
    run, _ = trained(settings)
    conv = run.network.conv
    beyond = float_weight(conv).abs() > 1.01 * weight_quantizer(conv).scales[2][:, None, None, None]
    assert bool(beyond.any())
    moments = run.second_moments().moments["conv"]
    assert bool((moments[beyond] == 0).all()) == (out_of_range == "stop")
