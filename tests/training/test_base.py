"""A trained network as what the next steps of a search, and their trainings, start from."""

from __future__ import annotations

import copy

import pytest
import torch

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.prepare import float_weight
from hq_optuna.training import Trainer, TrainingSettings
from hq_optuna.training.trained import TrainedNetwork, trained_tensors
from hq_optuna.training.trainer import start_weights_
from tests.training.examples import BITS, float_net, images, labelled, prepared_net

SETTINGS = TrainingSettings(epochs=2, learning_rate=0.02, warmup_epochs=0, batch_size=16)


@pytest.fixture(scope="module")
def trained():
    net = prepared_net()
    set_bits(net, BITS)
    list(Trainer(net, labelled(), SETTINGS, teacher=float_net()).epochs())
    return net


@pytest.fixture
def base(trained):
    layers = introspect(float_net(), images()).layers
    return TrainedNetwork.rebuild(float_net(), layers, trained_tensors(trained))


def prepared_again(base):
    """The base prepared as for the next steps, with compensated weights at all bits."""
    layers = introspect(base.network, images()).layers
    data = read_batches(labelled())
    net = prepare(base.network, layers, observe_inputs(base.network, list(BITS), data))
    compensate_weights(net, layers, data, {name: range(2, 9) for name in BITS})
    base.restore_learned_(net)
    set_bits(net, BITS)
    return net


def test_at_its_own_bits_it_is_the_trained_network(trained, base):
    assert torch.equal(prepared_again(base)(images()), trained(images()))


def test_training_goes_on_from_the_weights_behind_the_rounded_ones(trained, base):
    net = prepared_again(base)
    copied = copy.deepcopy(net)  # as a search trains a copy
    start_weights_(copied, "moved")
    moved_ = 0
    for name in BITS:
        begins = float_weight(copied.get_submodule(name))
        assert torch.equal(begins, float_weight(trained.get_submodule(name)))
        moved_ += int((begins != float_weight(net.get_submodule(name))).sum())
    assert moved_ > 0  # else this shows nothing
    assert torch.equal(copied(images()), trained(images()))


def test_a_layer_at_other_bits_begins_from_its_compensated_weights(trained, base):
    net = prepared_again(base)
    name = "head"
    set_bits(net, {name: (BITS[name][0] - 1, BITS[name][1])})
    before = net(images())
    start_weights_(net, "moved")
    begins = float_weight(net.get_submodule(name))
    assert not torch.equal(begins, float_weight(trained.get_submodule(name)))
    assert torch.equal(net(images()), before)


def test_rounded_weights_can_be_asked_for(trained, base):
    net = prepared_again(base)
    before = {name: net.get_submodule(name).weight.clone() for name in BITS}
    start_weights_(net, "rounded")
    for name in BITS:
        assert torch.equal(float_weight(net.get_submodule(name)), before[name])
