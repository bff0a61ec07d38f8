"""`introspect` counts what really runs, lists what it cannot quantize, and changes nothing."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from hq_optuna.errors import HqOptunaError, NetworkError
from hq_optuna.introspection import QUANTIZABLE, introspect


def one(network, example):
    """Return the only layer."""
    (layer,) = introspect(network, example).layers
    return layer


def reasons(network, example):
    return {s.name: s.reason for s in introspect(network, example).skipped}


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


class Net(nn.Module):
    """A network made of given modules and a forward function."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


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
        "layers.0.linear1": 5 * 8 * 16,
        "layers.0.linear2": 5 * 8 * 16,
    }
    assert torch.backends.mha.get_fastpath_enabled()
    skipped = {s.name: s.reason for s in found.skipped}
    assert set(skipped) == {"layers.0.self_attn", "layers.0.self_attn.out_proj"}
    assert "without calling the layer" in skipped["layers.0.self_attn.out_proj"]
    assert "in_proj_weight (24, 8)" in skipped["layers.0.self_attn"]


# --- what is skipped ------------------------------------------------------------------------------


def test_a_branch_that_is_not_taken_is_listed():
    network = Net(
        lambda net, x: net.aux(net.fc(x)) if net.training else net.fc(x),
        fc=nn.Linear(3, 3),
        aux=nn.Linear(3, 2),
    )
    assert "never called by the example input" in reasons(network, torch.zeros(2, 3))["aux"]


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


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Embedding(5, 3), "a table that is looked up.*weight \\(5, 3\\)"),
        (nn.EmbeddingBag(5, 3), "a table that is looked up"),
        (nn.LSTM(3, 4), "recurrent layers are not supported.*weight_ih_l0 \\(16, 3\\)"),
        (nn.GRU(3, 4), "recurrent"),
        (nn.RNN(3, 4, num_layers=3), "weight_ih_l1 \\(4, 4\\), …"),
        (nn.LSTMCell(3, 4), "recurrent"),
        (nn.Bilinear(3, 4, 5), "bilinear"),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), "attention.*q_proj_weight \\(4, 4\\)"),
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


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_are_listed_as_quantized_already():
    packed = torch.ao.nn.quantized.Linear(3, 4)
    network = Net(lambda net, x: net.fc(x), fc=nn.Linear(3, 2), packed=packed)
    assert reasons(network, torch.zeros(2, 3)) == {"packed": "already quantized (packed weights)"}


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


# --- the network is left as found -----------------------------------------------------------------


class Careless(nn.Module):
    """Changes everything a forward pass can lay its hands on."""

    def __init__(self, *, fail=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 4))
        self.fail = fail
        self.calls = 0
        self.seen = []

    def forward(self, x):
        x.add_(1)
        self.calls += 1
        self.seen.append(x.mean())
        self.count += 1
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.1)
        self.fc.weight.mul_(0.5)
        self.fc.weight.requires_grad_(False)
        self.zero_grad()
        self.norm.train()
        x = self.norm(self.conv(x)).mean((2, 3))
        self.last = x + torch.rand_like(x) + random.random() + np.random.rand()
        self.cache = x
        self.train()
        if self.fail:
            raise RuntimeError("half way through")
        return self.fc(x)


def snapshot(network):
    """Return everything about a network that a user could notice, comparable by ==."""
    numbers = {
        name: (id(t), t.data_ptr(), t.detach().numpy().tobytes())
        for name, t in (*network.named_parameters(), *network.named_buffers())
    }
    flags = {name: module.training for name, module in network.named_modules()}
    grads = {
        name: (p.requires_grad, id(p.grad), None if p.grad is None else p.grad.numpy().tobytes())
        for name, p in network.named_parameters()
    }
    plain = {
        (name, key): (id(value), list(value) if isinstance(value, (dict, list)) else None)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
    }
    return numbers, flags, grads, plain


def random_states():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


@pytest.mark.parametrize("fail", [False, True])
def test_the_network_the_input_and_the_random_state_are_left_as_found(fail):
    network, example = Careless(fail=fail), torch.randn(2, 3, 8, 8)
    network.norm.eval()  # a mixture of modes, as in fine-tuning
    network.conv.bias.requires_grad_(False)
    network.fc.weight.grad = torch.ones(2, 4)
    network.fc.register_forward_hook(lambda module, args, output: output * 2)
    before, states, kept = snapshot(network), random_states(), example.clone()
    hooks = len(nn.modules.module._global_forward_hooks)
    if fail:
        with pytest.raises(NetworkError, match="half way through"):
            introspect(network, example)
    else:
        assert len(introspect(network, example).layers) == 2
    assert snapshot(network) == before
    assert random_states() == states
    assert torch.equal(example, kept)
    assert len(nn.modules.module._global_forward_hooks) == hooks
    assert not hasattr(network, "cache")


def test_the_careless_network_changes_without_introspect():
    # The test above could not fail if this network were harmless.
    network, example = Careless(), torch.randn(2, 3, 8, 8)
    network.norm.eval()
    network.fc.weight.grad = torch.ones(2, 4)
    before, states = snapshot(network), random_states()
    with torch.no_grad():
        network.eval()(example)
    assert all(old != new for old, new in zip(before, snapshot(network), strict=True))
    assert all(old != new for old, new in zip(states[:3], random_states()[:3], strict=True))


def test_outputs_are_the_same_before_and_after():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    twin, example = copy.deepcopy(network), torch.randn(4, 3, 8, 8)
    introspect(network, example)
    assert torch.equal(network(example), twin(example))
    assert torch.equal(network[1].running_mean, twin[1].running_mean)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_scripted_part_keeps_its_mode():
    network = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 2))))
    found = introspect(network, torch.zeros(2, 3))
    assert all(module.training for module in network.modules())
    assert [layer.name for layer in found.layers] == ["0"]
    assert "not a Conv" in found.skipped[0].reason
    assert found.skipped[0].name == "1.0"


def test_hooks_of_the_user_do_not_change_the_counts():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network[0].register_forward_hook(lambda module, args, output: output[:, :, :1])
    assert one(network, torch.zeros(1, 3, 8, 8)).macs == 4 * 36 * 27


def test_the_example_is_not_held_to_gradients():
    example = torch.zeros(2, 3, requires_grad=True) * 2
    assert one(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), example).macs == 6


# --- errors ---------------------------------------------------------------------------------------


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
    with pytest.raises(TypeError, match=r"torch.nn.Module; got function"):
        introspect(lambda x: x, torch.zeros(2, 3))
