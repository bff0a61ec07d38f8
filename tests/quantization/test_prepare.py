"""`prepare` and `set_bits`: a copy that changes its bits at will and back again, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from hq_optuna.errors import HqOptunaError, SpaceError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import get_bits, modules, observe_inputs, prepare, set_bits
from hq_optuna.quantization.prepare import float_weight, prepared_layers
from hq_optuna.quantization.quantizers import base as rounding
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS
from tests.small_networks import (
    ConvNet,
    Residual,
    Tokens,
    Twice,
    assert_unchanged,
    layers_of,
    make,
    rounded_by_hand,
    seeded,
    snapshot,
)

IMAGES = torch.randn(6, 2, 6, 6, generator=seeded(0))
ROWS = torch.randn(6, 3, generator=seeded(1))
LABELS = torch.arange(6) % 3
NETWORKS = [(ConvNet, IMAGES), (Residual, ROWS), (Twice, ROWS)]
IDS = ["ConvNet", "Residual", "Twice"]


def prepared_from(network, x):
    layers = layers_of(network, x)
    data = read_batches((x, LABELS), batch_size=4)
    return prepare(network, layers, observe_inputs(network, [la.name for la in layers], data))


@pytest.fixture
def pair():
    network = make(ConvNet, dtype=torch.float32)
    return network, prepared_from(network, IMAGES)


def uniform(network, bits, activation_bits=None):
    return BitConfig.uniform(list(get_bits(network)), bits, activation_bits or bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind, x", NETWORKS, ids=IDS)
def test_the_copy_starts_in_float_and_equals_the_network_bit_for_bit(kind, x, dtype):
    network, x = make(kind, dtype=dtype), x.to(dtype)
    prepared = prepared_from(network, x)
    assert torch.equal(prepared(x), network(x))
    assert set(get_bits(prepared).values()) == {(FLOAT_BITS, FLOAT_BITS)}
    set_bits(prepared, uniform(prepared, 3))
    assert not torch.equal(prepared(x), network(x))
    set_bits(prepared, uniform(prepared, FLOAT_BITS))
    assert torch.equal(prepared(x), network(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_network_is_left_as_it_was(training):
    network = make(ConvNet, dtype=torch.float32).train(training)
    network.head.weight.requires_grad_(False)
    layers, before = layers_of(network, IMAGES), snapshot(network)
    prepared = prepare(network, layers)
    set_bits(prepared, uniform(prepared, 2, FLOAT_BITS))
    prepared(IMAGES)
    assert_unchanged(network, before)
    assert not any(m.training for m in prepared.modules())


@pytest.mark.parametrize("kind, x", NETWORKS, ids=IDS)
def test_going_to_other_bits_and_back_returns_the_outputs_bit_for_bit(kind, x):
    network = make(kind, dtype=torch.float32)
    prepared = prepared_from(network, x)
    a = uniform(prepared, 4)
    b = BitConfig({name: (2 + i % 7, 8 - i % 7) for i, name in enumerate(a)})
    with torch.no_grad():
        set_bits(prepared, a)
        first = prepared(x)
        set_bits(prepared, b)
        second = prepared(x)
        set_bits(prepared, a)
        assert torch.equal(prepared(x), first)
        set_bits(prepared, b)
        assert torch.equal(prepared(x), second)
    assert not torch.equal(first, second)
    fresh = prepared_from(network, x)
    set_bits(fresh, b)
    assert torch.equal(fresh(x).detach(), second)


def test_nothing_is_computed_twice_for_a_layer_and_bits(pair, monkeypatch):
    scales, rounded, ranges = [], [], []

    def counted(calls, original):
        def count(*args):
            calls.append(args)
            return original(*args)

        return count

    monkeypatch.setattr(rounding, "weight_scale", counted(scales, rounding.weight_scale))
    monkeypatch.setattr(rounding, "quantize_weight", counted(rounded, rounding.quantize_weight))
    original = modules.InputHistogram.range
    monkeypatch.setattr(modules.InputHistogram, "range", counted(ranges, original))
    prepared, n_layers = pair[1], len(get_bits(pair[1]))
    with torch.no_grad():
        for bits in (4, 3, 4, FLOAT_BITS, 3, 4):
            set_bits(prepared, uniform(prepared, bits))
            assert len(scales) + len(rounded) + len(ranges) <= 6 * n_layers
            prepared(IMAGES)
    assert len(scales) == len(rounded) == len(ranges) == 2 * n_layers


@pytest.mark.parametrize("kind, x", NETWORKS, ids=IDS)
def test_a_quantized_copy_equals_the_network_with_rounded_weights_put_in(kind, x):
    network = make(kind, dtype=torch.float32)
    prepared = prepared_from(network, x)
    set_bits(prepared, uniform(prepared, 3, FLOAT_BITS))
    by_hand = copy.deepcopy(network)
    for layer in layers_of(network, x):
        module = by_hand.get_submodule(layer.name)
        module.weight.data = rounded_by_hand(module, layer, 3)
    assert torch.equal(prepared(x), by_hand(x))


def test_inputs_of_every_call_are_rounded_and_only_there():
    network = make(Twice, dtype=torch.float32)
    prepared = prepared_from(network, ROWS)
    set_bits(prepared, {"shared": LayerBits(FLOAT_BITS, 3)})
    scale, zero_point = prepared.shared.input_fake_quantize.range(3)

    def rounded(x):
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 7)

    x = torch.relu(network.shared(rounded(torch.tanh(network.enter(ROWS)))))
    expected = network.leave(torch.tanh(network.shared(rounded(x))))
    assert torch.equal(prepared(ROWS), expected)


def test_a_changed_weight_is_seen_in_the_outputs(pair):
    prepared = pair[1]
    set_bits(prepared, uniform(prepared, 4))
    with torch.no_grad():
        before = prepared(IMAGES)
        float_weight(prepared.head).mul_(0.5)
        changed = prepared(IMAGES)
        assert not torch.equal(changed, before)
        float_weight(prepared.head).mul_(2)
        assert torch.equal(prepared(IMAGES), before)


def test_a_deep_copy_has_bits_and_weights_of_its_own(pair):
    prepared = pair[1]
    set_bits(prepared, uniform(prepared, 4))
    with torch.no_grad():
        four = prepared(IMAGES)
        twin = copy.deepcopy(prepared)
        assert torch.equal(twin(IMAGES), four)
        set_bits(twin, uniform(twin, 2))
        two = twin(IMAGES)
        assert not torch.equal(two, four)
        assert torch.equal(prepared(IMAGES), four)
        for parameter in twin.parameters():
            parameter.mul_(3)
        assert torch.equal(prepared(IMAGES), four)
        set_bits(prepared, uniform(prepared, 2))
        assert torch.equal(prepared(IMAGES), two)


@pytest.mark.parametrize("bits", [1, 2, 8, FLOAT_BITS])
def test_outputs_are_the_same_with_and_without_gradients(pair, bits):
    prepared = pair[1]
    set_bits(prepared, uniform(prepared, bits))
    with_gradient = prepared(IMAGES)
    with torch.no_grad():
        assert torch.equal(prepared(IMAGES), with_gradient)
    with torch.inference_mode():
        assert torch.equal(prepared(IMAGES), with_gradient)


def test_training_reaches_the_float_weights_straight_through(pair):
    prepared = pair[1]
    set_bits(prepared, uniform(prepared, 4))
    prepared(IMAGES).square().sum().backward()
    for module in prepared_layers(prepared).values():
        weight = float_weight(module)
        assert weight.is_leaf and weight.grad is not None and bool(weight.grad.any())
    with torch.no_grad():
        before = prepared(IMAGES)
    torch.optim.SGD(prepared.parameters(), lr=0.01).step()
    with torch.no_grad():
        assert not torch.equal(prepared(IMAGES), before)


def test_the_state_dict_holds_the_networks_tensors_under_names_that_do_not_depend_on_bits(pair):
    network, prepared = pair
    renamed = {
        key.replace(".parametrizations.weight.original", ".weight"): value
        for key, value in prepared.state_dict().items()
    }
    assert renamed.keys() == network.state_dict().keys()
    assert all(torch.equal(renamed[k], v) for k, v in network.state_dict().items())
    keys = list(prepared.state_dict())
    assert "head.parametrizations.weight.original" in keys
    set_bits(prepared, uniform(prepared, 2))
    prepared(IMAGES)
    assert list(prepared.state_dict()) == keys


def test_layers_that_are_not_named_keep_their_bits(pair):
    prepared = pair[1]
    set_bits(prepared, uniform(prepared, 8))
    set_bits(prepared, {"up": (3, 5), "head": LayerBits(FLOAT_BITS, 2)})
    expected = dict.fromkeys(get_bits(prepared), (8, 8))
    assert get_bits(prepared) == BitConfig({**expected, "up": (3, 5), "head": (FLOAT_BITS, 2)})


def test_a_layer_under_two_names_is_one_layer():
    prepared = prepared_from(make(Twice, dtype=torch.float32), ROWS)
    assert list(get_bits(prepared)) == ["enter", "shared", "leave"]
    assert prepared.again is prepared.shared
    with pytest.raises(SpaceError, match=r"'again' is not prepared.*enter, shared, leave"):
        set_bits(prepared, {"again": LayerBits(4, 4)})


@pytest.mark.parametrize("bad", [(0, 8), (8, 17), (31, 8), (8, 0), (-2, 8), (2.5, 8), (8, "4")])
def test_impossible_bits_are_refused_and_change_nothing(pair, bad):
    prepared = pair[1]
    before = get_bits(prepared)
    with pytest.raises(SpaceError, match="Layer 'up': bits are 1 to 16, or 32 for float; got "):
        set_bits(prepared, {"head": LayerBits(4, 4), "up": bad})
    assert get_bits(prepared) == before


def test_a_network_that_was_not_prepared_is_refused_with_the_next_step():
    with pytest.raises(HqOptunaError, match="call prepare"):
        set_bits(nn.Linear(2, 2), {"": LayerBits(4, 4)})


def test_without_histograms_weights_can_be_rounded_and_activations_cannot():
    network = make(Residual, dtype=torch.float32)
    prepared = prepare(network, layers_of(network, ROWS))
    set_bits(prepared, uniform(prepared, 4, FLOAT_BITS))
    prepared(ROWS)
    set_bits(prepared, uniform(prepared, 4, 8))
    with pytest.raises(ValueError, match="No range is known for 8-bit activations"):
        prepared(ROWS)


@pytest.mark.parametrize("flat", [True, False])
def test_layers_on_sequences_can_be_set(flat):
    x = torch.randn(6, 5, 3, generator=seeded(2))
    prepared = prepared_from(make(Tokens(flat), dtype=torch.float32), x)
    other = prepared_from(make(Tokens(not flat), dtype=torch.float32), x)
    for network in (prepared, other):
        set_bits(network, uniform(network, 4))
    torch.testing.assert_close(prepared(x), other(x))


class Delegating(nn.Module):
    """Has what its layer has, as wrappers do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x):
        return self.layer(x)


def test_a_wrapper_that_delegates_to_a_layer_is_none():
    network = nn.Sequential(Delegating(nn.Linear(3, 3)), nn.Linear(3, 2))
    prepared = prepare(network, introspect(network, torch.zeros(2, 3)).layers)
    assert list(prepared_layers(prepared)) == ["0.layer", "1"]
