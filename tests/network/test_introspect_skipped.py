"""`introspect` lists what it cannot quantize, with reasons."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from hq_optuna.network.introspection import introspect
from tests.introspected import Net


def reasons(network, example):
    return {s.name: s.reason for s in introspect(network, example).skipped}


def test_a_branch_that_is_not_taken_is_listed():
    network = Net(
        lambda net, x: net.aux(net.fc(x)) if net.training else net.fc(x),
        fc=nn.Linear(3, 3),
        aux=nn.Linear(3, 2),
    )
    assert "never called on the calibration data" in reasons(network, torch.zeros(2, 3))["aux"]


def test_a_weight_used_by_a_function_is_listed():
    network = Net(
        lambda net, x: F.linear(net.a(x), net.b.weight), a=nn.Linear(3, 3), b=nn.Linear(3, 2)
    )
    assert "without calling the layer" in reasons(network, torch.zeros(2, 3))["b"]


class Custom(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x):
        return x


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output)
    return module


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Embedding(5, 3), "a table that is looked up.*weight \\(5, 3\\)"),
        (nn.EmbeddingBag(5, 3), "a table that is looked up"),
        (hooked(nn.LSTM(3, 4)), "inside one function.*hooks.*weight_ih_l0 \\(16, 3\\)"),
        (hooked(nn.RNN(3, 4, num_layers=3)), "weight_ih_l1 \\(4, 4\\), …"),
        (hooked(nn.LSTMCell(3, 4)), "inside one function"),
        (nn.Bilinear(3, 4, 5), "bilinear"),
        (hooked(nn.MultiheadAttention(4, 2, kdim=3)), "one function.*q_proj_weight \\(4, 4\\)"),
        (Custom(kernel=(3, 4)), "not a Conv.*kernel \\(3, 4\\)"),
        (Custom(weight=(1, 4)), "not a Conv.*weight \\(1, 4\\)"),
        (nn.ParameterList([torch.ones(2, 2)]), "not a Conv"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_with_other_weights_are_listed_with_a_reason(module, why):
    network = Net(lambda net, x: net.fc(x), fc=nn.Linear(3, 2), other=module)
    (entry,) = (s for s in introspect(network, torch.zeros(2, 3)).skipped if s.name == "other")
    assert entry.kind == type(module).__name__
    assert re.search(why, entry.reason), entry.reason


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(3),
        nn.GroupNorm(1, 3),
        nn.LayerNorm((3, 4)),
        nn.RMSNorm((3, 4)),
        nn.InstanceNorm2d(3, affine=True),
        nn.PReLU(3),
        Custom(layer_scale=(8, 1, 1), class_token=(1, 1, 8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_normalizations_and_vectors_are_not_listed(module):
    network = Net(lambda net, x: net.fc(x), fc=nn.Linear(3, 2), other=module)
    assert introspect(network, torch.zeros(2, 3)).skipped == ()


def test_the_parameters_of_the_network_itself_are_listed():
    network = Net(lambda net, x: net.fc(x) @ net.table, fc=nn.Linear(3, 2))
    network.table = nn.Parameter(torch.ones(2, 2))
    assert "table (2, 2)" in reasons(network, torch.zeros(2, 3))["(network)"]


def test_of_two_layers_that_share_a_weight_the_first_called_is_quantized():
    network = Net(lambda net, x: net.a(net.b(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    network.a.weight = network.b.weight
    found = introspect(network, torch.zeros(2, 3))
    assert [layer.name for layer in found.layers] == ["b"]
    assert found.n_weights == 9
    (entry,) = found.skipped
    assert entry.name == "a"
    assert "shares its weight with 'b'" in entry.reason
    assert "register one module under both names" in entry.reason


def test_a_head_tied_to_an_embedding_is_quantized_and_the_embedding_listed():
    network = Net(lambda net, x: net.head(net.table(x)), table=nn.Embedding(7, 3))
    network.head = nn.Linear(3, 7, bias=False)
    network.head.weight = network.table.weight
    found = introspect(network, torch.zeros(2, 4, dtype=torch.long))
    assert [(layer.name, layer.macs) for layer in found.layers] == [("head", 4 * 21)]
    assert found.n_parameters == 21
    assert found.skipped[0].name == "table"
    assert "shares its weight with 'head'" in found.skipped[0].reason


def test_integer_weights_are_listed_as_quantized_already():
    class Int8Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.float())

    module = Int8Linear(3, 3)
    module.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    network = nn.Sequential(nn.Linear(3, 3), module)
    assert "torch.int8, not floating point" in reasons(network, torch.zeros(2, 3))["1"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "pruning"],
)
def test_computed_weights_are_listed_once_with_the_way_out(wrap):
    network = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
    found = introspect(network, torch.zeros(2, 3))
    assert [layer.name for layer in found.layers] == ["0"]
    assert [entry.name for entry in found.skipped] == ["1"]
    assert "computed from other parameters" in found.skipped[0].reason
    assert "remove_parametrizations" in found.skipped[0].reason


def test_a_layer_kept_in_a_plain_list_is_listed():
    hidden = [nn.Linear(3, 3)]
    network = Net(lambda net, x: net.fc(hidden[0](x)), fc=nn.Linear(3, 2))
    found = introspect(network, torch.zeros(2, 3))
    assert [layer.name for layer in found.layers] == ["fc"]
    assert (found.skipped[0].name, found.skipped[0].kind) == ("(unregistered)", "Linear")
    assert "nn.ModuleList" in found.skipped[0].reason
