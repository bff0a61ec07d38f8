"""Where trained weights begin when compensated rounding knows better codes."""

import pytest
import torch
from torch import nn

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.functional import quantize_weight
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.quantizers import QUANTIZERS
from hq_optuna.training.trainer import moved, start_weights_
from tests.small_networks import seeded
from tests.training.examples import BITS, float_net, images, labelled, prepared_net


def compensated():
    net = prepared_net()
    layers = introspect(float_net(), images()).layers
    bits = {name: [pair[0]] for name, pair in BITS.items()}
    compensate_weights(net, layers, read_batches(labelled()), bits)
    return net


def weights(net):
    return {name: float_weight(net.get_submodule(name)).detach().clone() for name in BITS}


def test_float_weights_stay_where_they_are():
    net = compensated()
    before = weights(net)
    start_weights_(net, "float")
    assert all(torch.equal(w, before[name]) for name, w in weights(net).items())


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize("start", ["rounded", "moved"])
def test_a_weight_that_another_module_uses_too_stays(start):
    torch.manual_seed(0)
    data = read_batches((torch.randint(0, 7, (32, 3)), torch.randint(0, 7, (32,))))
    network = Tied().eval()
    layers = introspect(network, data[0].inputs).layers
    prepared = prepare(network, layers)
    set_bits(prepared, {"head": (3, 32)})
    compensate_weights(prepared, layers, data, {"head": [3]})
    before = prepared(data[0].inputs)
    start_weights_(prepared, start)
    assert torch.equal(prepared.embedding.weight, network.embedding.weight)
    assert torch.equal(prepared(data[0].inputs), before)


@pytest.mark.parametrize("start", ["rounded", "moved"])
def test_weights_begin_where_they_round_to_the_compensated_ones(start):
    net = compensated()
    before, used = weights(net), {n: net.get_submodule(n).weight.clone() for n in BITS}
    nearest = {
        n: quantize_weight(before[n], weight_quantizer(net.get_submodule(n)).scales[b], b, 0)
        for n, (b, _) in BITS.items()
    }
    assert any(not torch.equal(nearest[n], used[n]) for n in BITS)  # else this shows nothing
    outputs = net(images())
    start_weights_(net, start)
    assert torch.equal(net(images()), outputs)
    for name, w in weights(net).items():
        assert torch.equal(w, used[name]) == (start == "rounded")
        stays = nearest[name] == used[name]
        if start == "moved":  # only what would round otherwise, or nearly, has moved
            assert (w == before[name])[stays].float().mean() > 0.5


@pytest.mark.parametrize(
    ("name", "bits"), [("uniform", 1), ("uniform", 2), ("uniform", 4), ("midrise", 2)]
)
def test_moved_weights_round_to_what_is_wanted_with_a_margin(name, bits):
    quantizer = QUANTIZERS[name]
    w = torch.randn(500, generator=seeded(0))
    scale = torch.full((1,), 0.3)
    other = torch.randn(500, generator=seeded(1))
    wanted = quantizer.quantize(other[None], scale, bits, 0)[0]
    found = moved(w, wanted, scale, bits, quantizer)
    for nudge in (-0.09, 0.0, 0.09):
        again = quantizer.quantize((found + nudge * 0.3)[None], scale, bits, 0)[0]
        assert torch.equal(again, wanted)


def test_without_compensated_weights_nothing_moves():
    net = prepared_net()
    before = weights(net)
    start_weights_(net, "moved")
    assert all(torch.equal(w, before[name]) for name, w in weights(net).items())
