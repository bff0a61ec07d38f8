"""Statistics correction against closed forms, and against the float network it imitates."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches, autocast, forward, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import float_weight, prepared_layers, weight_quantizer
from hq_optuna.quantization.statistics import statistics_places
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.layers import FLOAT_BITS


class Residual(nn.Module):
    """Convolutions with and without batch-norm, a shortcut and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.head(torch.relu(self.plain(x)).mean((2, 3)))


def make(seed: int = 0) -> tuple[nn.Module, Batches]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Residual().double()
        data = torch.randn(64, 3, 8, 8, dtype=torch.float64), torch.arange(64) % 3
        network.train()(data[0])  # statistics that are nearly those of the data, but not quite
        network.eval()
    return network, read_batches(data, batch_size=64)


def prepared_of(network: nn.Module, data: Batches) -> nn.Module:
    return prepare(network, introspect(network, data[0].inputs).layers)


def uniform(network: nn.Module, bits: int) -> BitConfig:
    return BitConfig.uniform(tuple(prepared_layers(network)), bits, 32)


def inputs_of(network: nn.Module, name: str, data: Batches) -> Tensor:
    """Return what enters a module."""
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        forward(network, data[0].inputs)
    handle.remove()
    return seen[0]


def test_batch_norm_and_bare_layers_are_told_apart() -> None:
    network, data = make()
    correction = StatisticsCorrection(prepared_of(network, data), data)
    assert correction.modules == ("bn1", "bn2", "plain", "head")


def test_float_stays_float_bit_for_bit() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data)
    with torch.no_grad():
        expected = network(data[0].inputs)
        assert torch.equal(prepared(data[0].inputs), expected)
        # Nothing is quantized, so differences are zero up to the rounding of the update.
        assert torch.allclose(correction.apply()[0], expected, rtol=0, atol=1e-12)
        correction.reset()
        assert torch.equal(prepared(data[0].inputs), expected)


def test_the_float_statistics_are_those_of_the_float_network_whatever_the_bits_are_now() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    first = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 2))
    expected = first.apply()[0]
    first.reset()
    assert torch.equal(StatisticsCorrection(prepared, data).apply()[0], expected)


def test_reset_restores_what_was_stored_bit_for_bit() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    before = copy.deepcopy(network.state_dict())
    correction = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 2))
    with torch.no_grad():
        uncorrected = prepared(data[0].inputs)
        correction.apply()
        assert not torch.equal(prepared(data[0].inputs), uncorrected)
        correction.reset()
        assert torch.equal(prepared(data[0].inputs), uncorrected)
    for name in ("bn1", "bn2"):
        module = prepared.get_submodule(name)
        assert torch.equal(module.running_mean, before[f"{name}.running_mean"])  # type: ignore[arg-type]
        assert torch.equal(module.running_var, before[f"{name}.running_var"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_each_channel_leaves_batch_norm_with_the_mean_and_spread_of_the_float_network(
    name: str,
) -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 3))
    correction.apply()
    module = network.get_submodule(name)
    with torch.no_grad():
        expected = module(inputs_of(network, name, data))
        found = prepared.get_submodule(name)(inputs_of(prepared, name, data))
    # Exactly so but for batch-norm's eps, which is not scaled with the variance.
    assert torch.allclose(found.mean((0, 2, 3)), expected.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(found.std((0, 2, 3)), expected.std((0, 2, 3)), rtol=1e-3)


def test_a_trained_network_is_corrected_by_its_difference_to_the_float_one() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    set_bits(prepared, uniform(prepared, 3))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(1.3)  # a training, of a kind
        affine = {"bn1": prepared.bn1.bias.clone(), "bn2": prepared.bn2.bias.clone()}
        for name in affine:  # means and spreads are told before scale and shift
            prepared.get_submodule(name).reset_parameters()
            network.get_submodule(name).weight.fill_(1.0)  # type: ignore[operator]
            network.get_submodule(name).bias.zero_()  # type: ignore[operator]
        StatisticsCorrection(prepared, data, of=network).apply()
        for name in affine:
            expected = network.get_submodule(name)(inputs_of(network, name, data))
            found = prepared.get_submodule(name)(inputs_of(prepared, name, data))
            assert torch.allclose(found.mean((0, 2, 3)), expected.mean((0, 2, 3)), atol=1e-4)
            assert torch.allclose(found.std((0, 2, 3)), expected.std((0, 2, 3)), rtol=1e-3)
        outputs = [forward(net, data[0].inputs).mean(0) for net in (prepared, network)]
        assert torch.allclose(*outputs, atol=1e-12)


def test_the_update_is_that_of_the_formula() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 2))
    mean_float = inputs_of(network, "bn1", data).mean((0, 2, 3))
    var_float = inputs_of(network, "bn1", data).var((0, 2, 3), correction=0)
    mean, var = (
        inputs_of(prepared, "bn1", data).mean((0, 2, 3)),
        inputs_of(prepared, "bn1", data).var((0, 2, 3), correction=0),
    )
    correction.apply()
    stored, corrected = network.get_submodule("bn1"), prepared.get_submodule("bn1")
    expected = mean - (mean_float - stored.running_mean) * (var / var_float).sqrt()  # type: ignore[operator]
    assert torch.allclose(corrected.running_mean, expected, rtol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(
        corrected.running_var,  # type: ignore[arg-type]
        stored.running_var * var / var_float,  # type: ignore[operator]
        rtol=1e-12,
    )


def test_layers_without_batch_norm_get_their_means_back() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 2))
    with torch.no_grad():
        expected = network(data[0].inputs).mean(0)
        before = (prepared(data[0].inputs).mean(0) - expected).abs().max()
        returned = correction.apply()[0]
        after = prepared(data[0].inputs)
    assert torch.allclose(after.mean(0), expected, atol=1e-12)
    assert before > 1e-3
    # One pass gives the outputs that the corrected network then has.
    assert torch.allclose(returned, after, rtol=1e-12)


def test_a_later_layer_is_corrected_for_the_input_it_will_have() -> None:
    network, data = make()
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 2))
    correction.apply()
    seen = inputs_of(prepared, "bn2", data).mean((0, 2, 3))
    seen_var = inputs_of(prepared, "bn2", data).var((0, 2, 3), correction=0)
    float_mean = inputs_of(network, "bn2", data).mean((0, 2, 3))
    float_var = inputs_of(network, "bn2", data).var((0, 2, 3), correction=0)
    stored = network.get_submodule("bn2")
    expected = seen - (float_mean - stored.running_mean) * (seen_var / float_var).sqrt()  # type: ignore[operator]
    assert torch.allclose(
        prepared.get_submodule("bn2").running_mean,  # type: ignore[arg-type]
        expected,
        rtol=1e-10,
    )


def test_a_norm_that_is_called_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.bn(x)))

    network = Twice().double().eval()
    data = make()[1]
    correction = StatisticsCorrection(prepared_of(network, data), data)
    assert "bn" not in correction.modules


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_go_through_the_network_as_if_they_were_one(size: int) -> None:
    network, whole = make()
    x = whole[0].inputs
    prepared = prepared_of(network, whole)
    set_bits(prepared, uniform(prepared, 3))
    together = StatisticsCorrection(prepared, whole)
    expected = together.apply()[0]
    held = {name: buffer.clone() for name, buffer in prepared.named_buffers()}
    together.reset()
    parts = read_batches((x, whole[0].labels), batch_size=size)
    found = StatisticsCorrection(prepared, parts).apply()
    assert torch.allclose(torch.cat([found[i] for i in range(len(parts))]), expected, rtol=1e-9)
    for name, buffer in prepared.named_buffers():
        assert torch.allclose(buffer, held[name], rtol=1e-9)


def test_what_one_batch_raises_ends_all_of_them_and_is_raised() -> None:
    network, data = make()
    parts = read_batches((data[0].inputs, data[0].labels), batch_size=8)
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, parts)
    calls = []

    def fails(module: nn.Module, args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("the third")

    prepared.get_submodule("plain").register_forward_pre_hook(fails)
    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="the third"):
        correction.apply()
    assert threading.active_count() == before


def test_statistics_are_of_a_random_part_of_all_batches() -> None:
    data = read_batches((torch.zeros(3200, 4), torch.zeros(3200)), batch_size=8)
    places = statistics_places(data, 4)
    assert places == statistics_places(data, 4) == tuple(sorted(places))
    assert len(places) == 16 and max(places) > 200 and min(places) < 200
    assert len(statistics_places(data, 2**26)) == 1  # memory for one batch, come what may
    assert statistics_places(read_batches((torch.zeros(9, 4), torch.zeros(9))), 4) == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_are_corrected_in_it(dtype: torch.dtype) -> None:
    network, data = make()
    network, data = network.to(dtype), read_batches((data[0].inputs.to(dtype), data[0].labels))
    right = forward(network, data[0].inputs)
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data)
    set_bits(prepared, uniform(prepared, 3))
    with torch.no_grad():
        wrong = forward(prepared, data[0].inputs)
    outputs = correction.apply()[0]
    assert outputs.dtype == dtype
    with torch.no_grad():
        assert torch.equal(forward(prepared, data[0].inputs), outputs)
    away, still = ((x - right).float().mean(0).abs().max() for x in (wrong, outputs))
    assert still < 0.25 * away  # not 0: shift and outputs are rounded to 8 binary digits


@pytest.mark.parametrize("bits", [3, FLOAT_BITS])  # in float there is nothing to shift
def test_the_correcting_pass_gives_what_a_later_one_gives_under_autocast(bits: int) -> None:
    network, data = make()
    network, data = network.float(), read_batches((data[0].inputs.float(), data[0].labels))
    prepared = prepared_of(network, data)
    correction = StatisticsCorrection(prepared, data, "bfloat16")
    set_bits(prepared, uniform(prepared, bits))
    outputs = correction.apply()[0]
    with torch.no_grad(), autocast(prepared, "bfloat16"):
        later = forward(prepared, data[0].inputs)
    assert outputs.dtype == later.dtype == torch.bfloat16
    assert torch.equal(outputs, later)


class Experts(nn.Module):
    """The expert and its batch-norm get the samples that a router likes: none at times."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        with torch.no_grad():
            self.router.weight.copy_(torch.eye(4))
            self.router.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        z = self.router(x)
        taken = (z[:, 0] > 1).nonzero()[:, 0]
        return z.index_add(0, taken, self.norm(self.expert(z[taken])))


@pytest.mark.parametrize("in_float", [True, False])
def test_what_no_sample_reaches_stays_as_it_is_stored(in_float: bool) -> None:
    """In float, or only at some bits: 3 bits take 0.45 for 0 or 0.9, and -0.9 to 0.9 for 2.7."""
    network = Experts().eval()
    x = torch.randn(8, 4).clamp(max=0.5)
    if not in_float:
        x[:2, 0] = 1.2  # the two samples that the expert sees
    data = read_batches((x, torch.zeros(8, dtype=torch.long)))
    prepared = prepare(network, introspect(network, x + 9).layers)
    correction = StatisticsCorrection(prepared, data)
    assert ("norm" in correction.modules) is not in_float
    with torch.no_grad():
        weight = prepared.router.parametrizations.weight.original
        weight.mul_(0.5)  # now it sees none at all
    set_bits(prepared, {"router": (3, 32), "expert": (3, 32)})
    correction.apply()
    assert torch.equal(prepared.norm.running_mean, torch.zeros(4))
    assert torch.equal(prepared.norm.running_var, torch.ones(4))
    assert not bool(prepared.expert.output_shift.any())
    assert bool(prepared(x).isfinite().all())


class Pixels(nn.Linear):
    """A linear layer over channels that are not the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight[:, :, None, None], self.bias)


@pytest.mark.parametrize("size", [4, 5])  # 4 is the number of channels too
def test_a_linear_layer_with_axes_of_its_own_is_neither_shifted_nor_compensated(size: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), Pixels(4, 6), nn.Flatten()).eval()
    data = read_batches((torch.randn(8, 2, size, size), torch.zeros(8, dtype=torch.long)))
    layers = introspect(network, data[0].inputs).layers
    prepared = prepare(network, layers)
    compensate_weights(prepared, layers, data, {layer.name: [3] for layer in layers})
    set_bits(prepared, {"0": (3, 32), "2": (3, 32)})
    correction = StatisticsCorrection(prepared, data)
    correction.apply()
    assert correction.modules == ("0",)
    layer = prepared.get_submodule("2")
    weight = float_weight(layer)
    assert weight_quantizer(layer).kept(weight, 3) is None
