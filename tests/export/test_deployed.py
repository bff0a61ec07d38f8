"""The network in plain modules equals the answer, and the answer is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import deployed, deployed_layers, round_biases_
from hq_optuna.export.folding import factors_of, fold_batch_norm_, widen_dead_scales_
from hq_optuna.export.tracing import traced
from hq_optuna.quantization import get_bits
from tests.export.answers import answer_of, data_of, everything, images, randomized
from tests.small_networks import Twice, snapshot


def folded(network: nn.Module, x: torch.Tensor) -> tuple[nn.Module, dict[str, str]]:
    ready = deployed(network)
    return ready, fold_batch_norm_(ready, traced(ready, data_of(x)))


@torch.no_grad()
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 6), (1, 1), (16, 16), (32, 8), (8, 32)])
def test_it_equals_the_answer_bit_for_bit_where_nothing_is_shifted(bits):
    x, network = images(), everything()
    answer = answer_of(network, x, bits)
    assert torch.equal(deployed(answer)(x), answer(x))


@torch.no_grad()
def test_shifts_of_outputs_go_into_biases():
    x, network = images(), everything()
    answer = answer_of(network, x, (3, 4), correct=True)
    ready = deployed(answer)
    assert not torch.equal(ready.head.bias, network.head.bias)
    given = torch.randn(5, 5)  # one layer alone: no code can flip between here and the output
    assert torch.allclose(ready.head(given), answer.head(given), rtol=1e-6, atol=1e-6)


def test_it_holds_integers_and_neither_hooks_nor_parametrizations():
    ready = deployed(answer_of(everything(), images(), (4, 4), correct=True))
    for name, layer in deployed_layers(ready).items():
        assert layer.weight_codes.dtype == torch.int8, name
        assert int(layer.weight_codes.abs().max()) <= 7
        assert not hasattr(layer, "parametrizations")
        assert not layer._forward_hooks and not layer._forward_pre_hooks
        assert "weight" not in dict(layer.named_parameters())


def test_the_answer_is_left_as_found():
    x = images()
    answer = answer_of(everything(), x, (4, 4), correct=True)
    before, bits, outputs = snapshot(answer), get_bits(answer), answer(x)
    folded(answer, x)
    after = snapshot(answer)
    assert before.keys() == after.keys() and get_bits(answer) == bits
    assert all(torch.equal(before["state"][k], after["state"][k]) for k in before["state"])
    assert {k: v for k, v in before.items() if k != "state"} == {
        k: v for k, v in after.items() if k != "state"
    }
    assert torch.equal(answer(x), outputs)


def test_batch_norm_folds_behind_convolutions_alone():
    x = images()
    _, pairs = folded(answer_of(everything(), x, (4, 8)), x)
    assert pairs == {"stem": "norm", "depthwise": "norm_2", "up": "up_norm"}


@torch.no_grad()
def test_folding_multiplies_scales_and_negates_codes_where_gamma_is_negative():
    x, network = images(), everything()
    network.norm.weight[:4] = -network.norm.weight[:4].abs()
    network.norm.weight[4] = 0.0
    answer = answer_of(network, x, (4, 8))
    plain = deployed(answer)
    ready, _ = folded(answer, x)
    factor, _ = factors_of(network.norm)
    expected = factor.reshape(-1, 1, 1, 1) * plain.stem.weight.double()
    assert torch.allclose(ready.stem.weight.double(), expected, rtol=1e-6, atol=0)
    assert bool((ready.stem.weight_scale > 0).all())
    alive = [j for j in range(8) if j != 4]
    signs = factor.sign()[alive].reshape(-1, 1, 1, 1)
    assert torch.equal(
        ready.stem.weight_codes[alive], (plain.stem.weight_codes[alive] * signs).to(torch.int8)
    )
    assert not ready.stem.weight_codes[4].any()
    assert isinstance(ready.norm, nn.Identity)


@torch.no_grad()
def test_a_folded_layer_computes_what_layer_and_batch_norm_compute():
    x, network = images(), everything(3)
    answer = answer_of(network, x, (4, 8), correct=True)
    ready, _ = folded(answer, x)
    assert torch.allclose(ready.stem(x), answer.norm(answer.stem(x)), rtol=1e-5, atol=1e-5)


class NormedTwice(nn.Module):
    """What must not fold: a norm of two layers, one behind another use, one before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm1d(4)
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.shared, self.used = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.shared(self.a(self.before(x))) + self.shared(self.b(x))
        y = self.c(x)
        return self.used(y) + y


class NormedTokens(nn.Module):
    """A norm of tokens, which are the axis before the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.layer(x)).mean(1)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "shape"), [(NormedTwice, (8, 4)), (NormedTokens, (8, 4, 4))])
def test_what_is_not_a_layer_with_a_norm_of_its_own_stays(kind, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    answer = answer_of(randomized(kind()), x, (4, 4))
    ready, pairs = folded(answer, x)
    assert pairs == {}
    assert torch.equal(ready(x), answer(x))


@torch.no_grad()
def test_a_layer_called_twice_is_one_layer():
    x = torch.randn(8, 3)
    answer = answer_of(randomized(Twice()), x, (4, 4))
    ready = deployed(answer)
    assert ready.shared is ready.again
    assert torch.equal(ready(x), answer(x))


@torch.no_grad()
def test_a_dead_channels_scale_holds_its_bias():
    x, network = images(), everything()
    network.stem.weight[2] = 0.0
    answer = answer_of(network, x, (8, 8))
    ready, _ = folded(answer, x)
    before = ready(x)
    widen_dead_scales_(ready)
    stem = ready.stem
    counts = stem.bias.abs() / (stem.weight_scale * stem.input_quantizer.scale)
    assert float(counts.max()) < 2**31
    assert torch.equal(ready(x), before)
    assert round_biases_(ready) == []


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2 + self.weight.sum()


class Unusual(nn.Module):
    """A layer with a forward of its own, a weight that is used elsewhere too, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.tied, self.head = OwnForward(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.tied.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        x = torch.tanh(self.tied(self.own(x)))
        return self.head(x @ self.tied.weight)


@torch.no_grad()
def test_own_forwards_hooks_and_other_uses_of_a_weight_are_kept():
    x = torch.randn(8, 4)
    answer = answer_of(randomized(Unusual()), x, (4, 4))
    assert torch.equal(deployed(answer)(x), answer(x))


def test_refused_are_networks_without_bits_in_other_precision_and_with_replaced_forwards():
    with pytest.raises(ExportError, match="holds no quantized layer"):
        deployed(everything())
    answer = answer_of(everything(), images(), (8, 8))
    answer.norm.double()
    with pytest.raises(ExportError, match=r"'norm.weight' is torch.float64"):
        deployed(answer)
    other = answer_of(everything(), images(), (8, 8))
    other.head.forward = lambda x: x
    with pytest.raises(ExportError, match="'head' has a function in the place"):
        deployed(other)
