"""A trained network as flat tensors comes back bit for bit; its rounded copy computes the same."""

import pytest
import torch
from safetensors import torch as safetensors
from torch import nn
from torch.nn import functional as F

from hq_optuna.errors import CheckpointError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import get_bits, observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import prepared_layers
from hq_optuna.training import (
    Trainer,
    TrainingSettings,
    load_trained_,
    rounded_copy,
    trained_tensors,
)
from tests.small_networks import ConvNet, make, seeded
from tests.training.examples import float_net, images, labelled, prepared_net


def trained(net: nn.Module, teacher: nn.Module, data) -> Trainer:
    run = Trainer(net, data, TrainingSettings(epochs=2, batch_size=8), teacher=teacher)
    list(run.epochs())
    return run


@pytest.mark.parametrize("corrected", [False, True])
def test_a_trained_network_comes_back_bit_for_bit(corrected):
    net = prepared_net()
    if corrected:
        StatisticsCorrection(net, read_batches(labelled(), batch_size=30)).apply()
    run = trained(net, float_net(), labelled())
    content = safetensors.save(trained_tensors(run.network))
    other = prepared_net({"conv": (5, 6), "head": (7, 32)}, seed=1)
    load_trained_(other, safetensors.load(content))
    assert get_bits(other) == get_bits(net)
    assert torch.equal(other(images()), net(images()))
    # And at bits that were not trained: found from the trained weights.
    for each in (net, other):
        set_bits(each, {"conv": (3, 4), "head": (2, 3)})
    assert torch.equal(other(images()), net(images()))


def test_every_kind_of_layer_comes_back():
    float_ = make(ConvNet, dtype=torch.float32)
    x, y = torch.randn(16, 2, 6, 6, generator=seeded(0)), torch.arange(16) % 3
    layers = introspect(float_, x).layers
    names = [layer.name for layer in layers]
    histograms = observe_inputs(float_, names, read_batches((x, y)))

    def fresh() -> nn.Module:
        prepared = prepare(float_, layers, histograms)
        set_bits(prepared, {name: (1 + i, 2 + i) for i, name in enumerate(names)})
        return prepared

    net, other = fresh(), fresh()
    trained(net, float_, (x, y))
    assert not torch.equal(net(x), other(x))
    load_trained_(other, trained_tensors(net))
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("name", ["ternary", "midrise", "dorefa"])
def test_weights_of_other_quantizers_come_back_too(name):
    float_, (x, y) = float_net(), labelled()
    layers = introspect(float_, x).layers
    names = [layer.name for layer in layers]
    histograms = observe_inputs(float_, names, read_batches((x, y)))

    def fresh() -> nn.Module:
        prepared = prepare(float_, layers, histograms, quantizers=dict.fromkeys(names, name))
        set_bits(prepared, dict.fromkeys(names, (2, 4)))
        return prepared

    net, other = fresh(), fresh()
    trained(net, float_, (x, y))
    load_trained_(other, trained_tensors(net))
    assert torch.equal(net(x), other(x)) and torch.equal(rounded_copy(net)(x), net(x))
    assert not torch.equal(fresh()(x), net(x))


def test_what_is_exported_is_a_copy():
    net = prepared_net()
    tensors = trained_tensors(net)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    trained(net, float_net(), labelled())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert any(not torch.equal(t, before[n]) for n, t in trained_tensors(net).items())


def test_tensors_of_another_structure_are_refused_and_change_nothing():
    net = prepared_net()
    before = trained_tensors(net)
    wrong_layers = {n: t for n, t in before.items() if n != "bits.head"}
    with pytest.raises(CheckpointError, match="trained layers are conv; the network is prepared"):
        load_trained_(net, wrong_layers)
    wrong_shape = {**before, "network.head.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"structure: head\.bias differ"):
        load_trained_(net, wrong_shape)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(net).items())


def test_the_rounded_copy_computes_what_the_trained_network_computes():
    net = prepared_net()
    trained(net, float_net(), labelled())
    copied = rounded_copy(net)
    assert torch.equal(copied(images()), net(images()))
    assert torch.equal(copied.get_parameter("conv.weight"), net.conv.weight)
    assert set(prepared_layers(net)) == {"conv", "head"}  # the network itself stays prepared


def test_the_rounded_copy_passes_gradients_through_rounded_inputs():
    copied = rounded_copy(prepared_net())
    F.cross_entropy(copied(images()), labelled()[1]).backward()
    assert bool(copied.get_parameter("conv.weight").grad.any())
