"""What `introspect` refuses, in words."""

import copy

import pytest
import torch
from torch import nn

from hq_optuna.errors import HqOptunaError, NetworkError
from hq_optuna.network.introspection import introspect
from tests.introspected import Net


def test_a_wrong_shape_is_named_with_the_error_behind_it():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(
        NetworkError, match=r"does not run on the example input \(\(2, 1, 8, 8\)\): RuntimeError"
    ) as caught:
        introspect(network, torch.zeros(2, 1, 8, 8))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(caught.value.__cause__) in str(caught.value)
    assert "Check the shape" in str(caught.value)
    assert isinstance(caught.value, (HqOptunaError, ValueError))


def test_missing_arguments_are_an_error_of_the_example():
    network = Net(lambda net, x, y: net.fc(x + y), fc=nn.Linear(3, 3))
    with pytest.raises(NetworkError, match=r"TypeError.*number of arguments"):
        introspect(network, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(3, 8, 8)),
        (nn.Sequential(nn.ConvTranspose1d(3, 4, 3)), torch.zeros(3, 8)),
        (nn.Sequential(nn.Linear(3, 4)), torch.zeros(3)),
    ],
    ids=["Conv2d", "ConvTranspose1d", "Linear"],
)
def test_an_example_without_batch_dimension_is_refused(network, example):
    with pytest.raises(NetworkError, match=r"no batch dimension.*example\[None\]"):
        introspect(network, example)
    assert len(introspect(network, example, n_samples=1).layers) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with torch.no_grad():
        network[2].weight[1, 1] = value
    with pytest.raises(NetworkError, match=r"'2.weight' holds 1 NaN or infinite values of 6"):
        introspect(network, torch.zeros(2, 3))


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_compiled_is_refused_with_the_way_out(part, in_place):
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))
    compiled = network[2] if part else network
    if in_place:
        compiled.compile()
    else:
        compiled = torch.compile(compiled)
    if part:
        network[2] = compiled
    else:
        network = compiled
    words = "'2' is compiled by torch.compile" if part else "The network is compiled by"
    with pytest.raises(NetworkError, match=words):
        introspect(network, torch.zeros(2, 3))
    plain = copy.deepcopy(network) if in_place else nn.Sequential(*network.children())
    if not in_place and part:
        plain[2] = network[2]._orig_mod
    assert len(introspect(plain, torch.zeros(2, 3)).layers) == 2


def test_nothing_to_quantize_says_what_was_passed_over():
    with pytest.raises(NetworkError, match="Nothing in the network can be quantized") as caught:
        introspect(nn.Sequential(nn.Embedding(5, 3)), torch.zeros(2, 4, dtype=torch.long))
    assert "0 (Embedding): a table that is looked up" in str(caught.value)
    with pytest.raises(NetworkError, match="Nothing in the network can be quantized"):
        introspect(nn.Sequential(nn.ReLU()), torch.zeros(2, 3))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_uninitialized_lazy_module_is_named():
    network = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    with pytest.raises(NetworkError, match=r"'1.weight' is not initialized yet"):
        introspect(network, torch.zeros(2, 3))
    network(torch.zeros(2, 3))
    assert len(introspect(network, torch.zeros(2, 3)).layers) == 2


def test_a_network_on_the_meta_device_is_refused():
    with pytest.raises(NetworkError, match=r"'0.weight' is on the meta device"):
        introspect(nn.Sequential(nn.Linear(3, 3, device="meta")), torch.zeros(2, 3))


def test_a_network_that_is_one_layer_needs_a_name():
    with pytest.raises(NetworkError, match=r"itself one Linear layer.*nn.Sequential\(layer\)"):
        introspect(nn.Linear(3, 2), torch.zeros(2, 3))


@pytest.mark.parametrize("example", [(), (3, "a"), {"x": None}, torch.zeros(())])
def test_an_example_without_samples_is_refused(example):
    with pytest.raises(NetworkError, match="no tensor with a batch dimension"):
        introspect(nn.Sequential(nn.Linear(3, 2)), example)


def test_an_empty_batch_is_refused():
    with pytest.raises(NetworkError, match="holds 0 samples"):
        introspect(nn.Sequential(nn.Linear(3, 2)), torch.zeros(0, 3))


def test_something_that_is_no_module_is_refused():
    with pytest.raises(NetworkError, match=r"torch.nn.Module; got function"):
        introspect(lambda x: x, torch.zeros(2, 3))
