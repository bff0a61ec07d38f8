"""`introspect` counts what really runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hq_optuna.network.introspection import introspect
from hq_optuna.network.layer_types import QUANTIZABLE
from tests.introspected import Net, one

# --- counts ---------------------------------------------------------------------------------------

KINDS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 17)),
    "conv2d": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 0)), (3, 4, 9, 11)),
    "conv3d": (nn.Conv3d(2, 3, 2), (3, 2, 4, 5, 6)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (3, 8, 7, 7)),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8, padding=1), (3, 8, 7, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2), (3, 4, 9, 9)),
    "padding by name": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (3, 4, 9, 9)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 4, stride=2), (3, 4, 9)),
    "transposed2d": (
        nn.ConvTranspose2d(4, 6, (3, 5), stride=2, padding=1, output_padding=1),
        (3, 4, 5, 6),
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (3, 2, 3, 4, 5)),
    "transposed grouped": (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4), (3, 8, 5, 5)),
    "linear": (nn.Linear(12, 5), (3, 12)),
    "linear on tokens": (nn.Linear(12, 5, bias=False), (3, 7, 12)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_half_of_the_flops_that_pytorch_counts(kind):
    module, shape = KINDS[kind]
    network, example = nn.Sequential(module).eval(), torch.zeros(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(example)
    layer = one(network, example)
    assert layer.macs * 2 * shape[0] == counter.get_total_flops() > 0
    assert layer.n_inputs == example[0].numel()
    assert layer.weight_shape == tuple(module.weight.shape)
    assert layer.channel_axis == (1 if "Transpose" in layer.kind else 0)
    assert (layer.name, layer.kind, layer.n_calls) == ("0", type(module).__name__, 1)


def test_macs_agree_with_the_products_counted_one_by_one():
    # Each output element of a convolution of ones over ones is its number of products (no padding).
    grouped = nn.Conv2d(6, 4, 3, groups=2, stride=2, bias=False)
    transposed = nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2, bias=False)
    for module in (grouped, transposed):
        nn.init.ones_(module.weight)
        products = int(module(torch.ones(1, 6, 7, 8)).sum())
        assert one(nn.Sequential(module), torch.zeros(2, 6, 7, 8)).macs == products


def test_every_class_of_layer_is_quantizable():
    assert {type(module) for module, _ in KINDS.values()} == set(QUANTIZABLE)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_batch_size_of_the_example_changes_nothing(n):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
    found = introspect(network, torch.zeros(n, 3, 8, 8))
    assert [layer.macs for layer in found.layers] == [4 * 36 * 27, 1440]
    assert (found.macs, found.n_weights) == (4 * 36 * 27 + 1440, 108 + 1440)
    assert (found.n_samples, found.n_parameters) == (n, 108 + 4 + 1440 + 10)


def test_layers_come_in_the_order_of_their_first_call():
    network = Net(
        lambda net, x: net.a(net.c(net.b(x))),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 4),
    )
    names = [layer.name for layer in introspect(network, torch.zeros(2, 4)).layers]
    assert names == ["b", "c", "a"]


def test_calls_of_one_layer_add_up():
    conv = nn.Conv2d(3, 3, 3)
    network = Net(lambda net, x: net.conv(net.conv(x)), conv=conv)
    layer = one(network, torch.zeros(2, 3, 8, 8))
    assert layer.n_calls == 2
    assert layer.macs == 3 * 27 * (6 * 6 + 4 * 4)
    assert layer.n_inputs == 3 * (8 * 8 + 6 * 6)
    assert layer.n_weights == 81


def test_a_module_under_several_names_is_one_layer_with_aliases():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    network = nn.Sequential(block, block, nn.Sequential(block[0]))
    layer = one(network, torch.zeros(2, 4))
    assert (layer.name, layer.aliases, layer.n_calls) == ("0.0", ("1.0", "2.0"), 3)
    assert layer.macs == 3 * 16


def test_work_that_samples_share_is_rounded_up():
    # A table of 5 positions is projected once for the whole batch of 2.
    network = Net(
        lambda net, x: net.fc(x) + net.positions(torch.eye(5, 3)).sum(),
        fc=nn.Linear(3, 4),
        positions=nn.Linear(3, 1),
    )
    layers = {layer.name: layer for layer in introspect(network, torch.zeros(2, 3)).layers}
    assert layers["positions"].macs == 8  # 15 / 2
    assert layers["fc"].macs == 12


def test_a_subclass_counts_when_it_is_called():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean()
            return F.conv2d(x, weight, self.bias)

    layer = one(nn.Sequential(Standardized(3, 4, 3)), torch.zeros(2, 3, 5, 5))
    assert (layer.kind, layer.macs) == ("Standardized", 4 * 9 * 27)


def test_inputs_may_be_positional_or_named_arguments():
    def add(net, x, *, y):
        return net.a(input=x) + net.b(y)

    network = Net(add, a=nn.Linear(3, 2), b=nn.Linear(5, 2))
    found = introspect(network, {"x": torch.zeros(4, 3), "y": torch.zeros(4, 5)})
    assert [(layer.name, layer.macs) for layer in found.layers] == [("a", 6), ("b", 10)]
    pair = Net(lambda net, x, y: net.a(x) + net.b(y), a=nn.Linear(3, 2), b=nn.Linear(5, 2))
    assert introspect(pair, (torch.zeros(4, 3), torch.zeros(4, 5))).layers == found.layers


def test_a_list_of_images_holds_one_sample_each():
    network = Net(lambda net, images: net.conv(torch.stack(images)), conv=nn.Conv2d(3, 4, 3))
    found = introspect(network, ([torch.zeros(3, 5, 5), torch.zeros(3, 5, 5)],))
    assert found.n_samples == 2
    assert found.layers[0].macs == 4 * 9 * 27
    apart = Net(lambda net, images: [net.conv(image) for image in images], conv=nn.Conv2d(3, 4, 3))
    assert introspect(apart, ([torch.zeros(3, 5, 5)] * 2,)).layers[0].macs == 4 * 9 * 27


def test_the_number_of_samples_can_be_given():
    network = nn.Sequential(nn.Linear(3, 2))
    assert introspect(network, torch.zeros(6, 3), n_samples=2).layers[0].macs == 18


def test_transformer_layers_are_seen_although_pytorch_fuses_them():
    network = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    )
    found = introspect(network, torch.zeros(2, 5, 8))
    assert {layer.name: layer.macs for layer in found.layers} == {
        **{f"layers.0.self_attn.{part}_proj": 5 * 8 * 8 for part in ("q", "k", "v", "out")},
        "layers.0.linear1": 5 * 8 * 16,
        "layers.0.linear2": 5 * 8 * 16,
    }
    assert torch.backends.mha.get_fastpath_enabled()
    assert [s.name for s in found.skipped] == ["layers.0.self_attn"]  # products of activations
