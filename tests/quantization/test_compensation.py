import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import compensation, moments, prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights, compensated
from hq_optuna.quantization.functional import quantize_weight, weight_grid
from hq_optuna.quantization.moments import input_moments
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.ranges import weight_scale
from tests.reference.compensate import compensate

MODULES = [
    (nn.Linear(6, 4), (32, 6)),
    (nn.Linear(6, 4), (8, 5, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (8, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (8, 4, 5, 5)),
    (nn.Conv2d(4, 4, (3, 2), stride=(2, 1), dilation=(1, 2), groups=4), (8, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (8, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 3)),
]


def data_of(x):
    return read_batches((x, torch.zeros(len(x), dtype=torch.long)), batch_size=4)


def layers_of(network, data):
    return introspect(network, data[0].inputs).layers


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda v: str(v)[:40])
def test_moments_tell_the_error_of_the_output(module, shape):
    """tr(ΔW E[x xᵀ] ΔWᵀ) is the mean over places of the squared change of the output."""
    torch.manual_seed(0)
    network = nn.Sequential(copy.deepcopy(module))
    x = torch.randn(shape)
    data = data_of(x)
    moment = input_moments(network, layers_of(network, data), data)["0"]
    layer = network[0]
    change = torch.randn_like(layer.weight)
    before = layer(x)
    with torch.no_grad():
        layer.weight += change
    moved = (layer(x) - before).double()
    channels = 1 if not isinstance(layer, nn.Linear) else -1
    expected = moved.square().movedim(channels, 0).flatten(1).mean(1)
    rows = change.flatten(1).double().reshape(len(moment), -1, moment.shape[1])
    told = torch.einsum("grd,gde,gre->gr", rows, moment, rows).flatten()
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_have_the_moments_of_their_inputs(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 2)).to(dtype)
    x = torch.rand(256, 64).to(dtype)
    data = data_of(x)
    layers = layers_of(network, data)
    moment = input_moments(network, layers, data)["0"][0]
    expected = x.double().mT @ x.double() / len(x)
    torch.testing.assert_close(moment, expected, rtol=1e-6, atol=0)  # single precision's sums
    prepared = prepare(network, layers)
    compensate_weights(prepared, layers, data, {"0": [3]})
    assert weight_quantizer(prepared[0]).kept(float_weight(prepared[0]), 3).dtype == dtype


@pytest.mark.parametrize("exponent", [-139, -80, 100])
def test_inputs_whose_squares_single_precision_cannot_hold_are_compensated_for(exponent):
    """As in a network of random weights, where what enters its last layers may be 1e-30."""
    torch.manual_seed(0)
    x = torch.randn(64, 2) @ torch.randn(2, 9)
    x = (x * 16).round() / 16  # a few digits, so that the smallest numbers hold them too
    network = nn.Sequential(nn.Linear(9, 4))
    kept = []
    for data in (data_of(x), data_of(torch.ldexp(x, torch.tensor(exponent)))):
        layers = layers_of(network, data)
        prepared = prepare(network, layers)
        compensate_weights(prepared, layers, data, {"0": [3]})
        kept.append(weight_quantizer(prepared[0]).kept(float_weight(prepared[0]), 3))
    assert torch.equal(*kept)
    weight = network[0].weight
    assert not torch.equal(kept[0], quantize_weight(weight, weight_scale(weight, 3, 0), 3, 0))


def test_a_random_part_of_many_places_tells_the_same_each_time(monkeypatch):
    monkeypatch.setattr(moments, "LEAST_PLACES", 500)
    monkeypatch.setattr(moments, "PLACES_PER_INPUT", 1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    data = data_of(torch.randn(16, 3, 16, 16))
    layers = layers_of(network, data)
    some, again = (input_moments(network, layers, data)["0"] for _ in range(2))
    assert torch.equal(some, again)
    monkeypatch.setattr(moments, "LEAST_PLACES", 10**9)
    every = input_moments(network, layers, data)["0"]
    assert not torch.equal(some, every)
    assert torch.linalg.norm(some - every) < 0.5 * torch.linalg.norm(every)


def test_transposed_convolutions_and_very_wide_layers_are_left_out(monkeypatch):
    monkeypatch.setattr(moments, "MOST_COLUMNS", 30)
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 2, 3))
    data = data_of(torch.randn(4, 3, 8, 8))
    assert list(input_moments(network, layers_of(network, data), data)) == ["2"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 200))
def test_compensation_is_obq_in_the_order_of_the_inputs_size(seed, bits, d):
    """Against an independent reference, with one scale and more columns than a block."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * d, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    moment = x.T @ x / len(x)
    w = torch.from_numpy(rng.normal(size=(2, d))).float()
    scale = weight_scale(w, bits, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensation, "SCALES", (1.0,))
        patch.setattr(compensation, "BLOCK", 16)
        patch.setattr(compensation, "PRECISION", torch.float64)
        rounded, found, output_error = compensated(w, torch.from_numpy(moment)[None], scale, bits)
    nearest = quantize_weight(w, scale, bits, 0).double().numpy()
    damped = moment + 0.01 * np.mean(np.diag(moment)) * np.eye(d)
    for channel in range(2):
        row = w[channel].double().numpy()
        expected = compensate(row, moment, float(scale[channel]), weight_grid(bits)[1])
        errors = [(q - row) @ damped @ (q - row) for q in (nearest[channel], expected)]
        best = nearest[channel] if errors[0] <= errors[1] else expected
        np.testing.assert_allclose(rounded[channel].numpy(), best, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, scale)
    change = rounded.double().numpy() - w.double().numpy()
    expected = np.einsum("cd,de,ce->c", change, moment, change) / np.mean(np.diag(moment))
    np.testing.assert_allclose(output_error.numpy(), expected, rtol=1e-6, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 3))
def test_no_channel_gets_worse_and_all_stay_on_their_grid(seed, bits, groups):
    torch.manual_seed(seed)
    weight = torch.randn(groups * 4, 5, 2)
    mixed = torch.randn(groups, 10, 10).double()
    moment = mixed @ mixed.mT
    scale = weight_scale(weight, bits, 0)
    rounded, found, _ = compensated(weight, moment, scale, bits)
    codes = rounded / found[:, None, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    low, high = weight_grid(bits) if bits > 1 else (-1, 1)
    assert codes.min() > low - 0.01 and codes.max() < high + 0.01
    # What is kept must survive PyTorch's own rounding bit for bit.
    assert torch.equal(quantize_weight(rounded, found, bits, 0), rounded)
    damped = moment + torch.eye(10) * 0.01 * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]

    def error(q):
        rows = (q - weight).double().flatten(1).reshape(groups, -1, 10)
        return torch.einsum("grd,gde,gre->gr", rows, damped, rows).flatten()

    nearest = quantize_weight(weight, scale, bits, 0)
    assert bool((error(rounded) <= error(nearest) * (1 + 1e-6) + 1e-9).all())


def test_inputs_that_are_always_zero_leave_rounding_to_nearest():
    weight = torch.randn(3, 4)
    scale = weight_scale(weight, 3, 0)
    rounded, found, output_error = compensated(weight, torch.zeros(1, 4, 4).double(), scale, 3)
    assert torch.equal(rounded, quantize_weight(weight, scale, 3, 0))
    assert torch.equal(found, scale)
    assert output_error is None


def test_a_group_whose_moments_are_none_is_rounded_to_nearest():
    torch.manual_seed(0)
    weight, mixed = torch.randn(4, 6), torch.randn(2, 6, 6).double()
    moment, scale = mixed @ mixed.mT, weight_scale(weight, 3, 0)
    moment[1, 0, 1] = moment[1, 1, 0] = 10 * moment[1].abs().max()  # not those of any input
    found = compensated(weight, moment, scale, 3)
    nearest = quantize_weight(weight, scale, 3, 0)
    assert torch.equal(found.weight[2:], nearest[2:])
    assert torch.equal(found.weight[:2], compensated(weight[:2], moment[:1], scale[:2], 3).weight)


@pytest.mark.parametrize("bits", [3, 6])
def test_a_group_whose_input_is_always_zero_makes_no_difference_to_the_others(bits):
    torch.manual_seed(0)
    weight, mixed = torch.randn(8, 9), torch.randn(4, 9, 9).double()
    moment, scale = mixed @ mixed.mT, weight_scale(weight, bits, 0)
    every = compensated(weight, moment, scale, bits)
    nearest = quantize_weight(weight, scale, bits, 0)
    moment[1] = 0  # the input of channels 2 and 3
    found = compensated(weight, moment, scale, bits)
    dead = torch.arange(8) // 2 == 1
    assert not torch.equal(every.weight[~dead], nearest[~dead])
    assert torch.equal(found.weight[dead], nearest[dead])
    assert torch.equal(found.scale[dead], scale[dead])
    assert not found.output_error[dead].any()
    for one, other in zip(found, every, strict=True):
        assert torch.equal(one[~dead], other[~dead])


def correlated_network():
    """A layer whose inputs are nearly the same: errors can make up for each other."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 24), nn.Linear(24, 8)).eval()
    return network, data_of(torch.randn(64, 2))


def test_outputs_come_much_closer_to_the_float_networks():
    network, data = correlated_network()
    layers = layers_of(network, data)
    x = torch.randn(256, 2)
    nearest, better = prepare(network, layers), prepare(network, layers)
    compensate_weights(better, layers, data, {layer.name: [3] for layer in layers})
    errors = []
    for prepared in (nearest, better):
        set_bits(prepared, {"1": (3, 32)})
        with torch.no_grad():
            errors.append(float((prepared(x) - network(x)).square().mean()))
    assert errors[1] < 0.2 * errors[0]


def test_several_passes_for_many_moments_give_the_same_weights(monkeypatch):
    network, data = correlated_network()
    layers = layers_of(network, data)
    together, apart = prepare(network, layers), prepare(network, layers)
    bits = {layer.name: range(2, 10) for layer in layers}
    seen = []
    compensate_weights(together, layers, data, bits, progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    monkeypatch.setattr(compensation, "MOST_BYTES", 1)
    compensate_weights(apart, layers, data, bits)
    for name in ("0", "1"):
        for b in bits[name]:
            one, other = (
                weight_quantizer(p.get_submodule(name)).quantized(
                    float_weight(p.get_submodule(name)), b
                )
                for p in (together, apart)
            )
            assert torch.equal(one, other)


def test_a_changed_weight_is_rounded_to_nearest_again():
    network, data = correlated_network()
    layers = layers_of(network, data)
    prepared = prepare(network, layers)
    compensate_weights(prepared, layers, data, {"1": [3]})
    module = prepared.get_submodule("1")
    quantizer, weight = weight_quantizer(module), float_weight(module)
    kept = quantizer.quantized(weight, 3).clone()
    squared = (kept - weight).detach().double().square().sum(1)
    assert bool((quantizer.output_error(weight, 3) < squared).all())
    assert not torch.equal(kept, quantize_weight(weight, quantizer.scales[3], 3, 0))
    copied = copy.deepcopy(prepared)
    set_bits(copied, {"1": (3, 32)})
    assert torch.equal(copied.get_submodule("1").weight, kept)
    with torch.no_grad():
        weight += 0.25
    expected = quantize_weight(weight, quantizer.scales[3], 3, 0)
    assert torch.equal(quantizer.quantized(weight, 3), expected)
    squared = (expected - weight).detach().double().square().sum(1)
    torch.testing.assert_close(quantizer.output_error(weight, 3), squared)
    with torch.no_grad():
        weight -= 0.25
        weight.copy_(float_weight(copied.get_submodule("1")))
    assert torch.equal(quantizer.quantized(weight, 3), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_that_is_cast_keeps_its_compensated_codes(dtype):
    network, data = correlated_network()
    layers = layers_of(network, data)
    prepared = prepare(network, layers)
    compensate_weights(prepared, layers, data, {"1": [3]})
    set_bits(prepared, {"1": (3, 32)})
    layer = prepared.get_submodule("1")
    scale = weight_quantizer(layer).scale(float_weight(layer), 3)[:, None]
    codes = (layer.weight.double() / scale).round()
    nearest = weight_quantizer(layer).quantizer.quantize(float_weight(layer), scale[:, 0], 3, 0)
    assert not torch.equal(codes, (nearest.double() / scale).round())
    cast = copy.deepcopy(prepared).to(dtype)
    assert cast.get_submodule("1").weight.dtype == dtype
    assert torch.equal((cast.get_submodule("1").weight.double() / scale).round(), codes)
    assert torch.equal((cast.float().get_submodule("1").weight.double() / scale).round(), codes)
    with torch.no_grad():  # another weight is another matter
        float_weight(layer).mul_(1.1)
    assert weight_quantizer(layer).kept(float_weight(layer), 3) is None


def nearly_singular(d=6, seed=0):
    """Moments that pass one Cholesky with GPTQ's damping, and whose inverse does not pass another.

    No input has them, and rounding in a few digits may come near to them.
    """
    torch.manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(d, d).double())[0]
    sizes = torch.tensor([0.0, *torch.rand(d - 1)], dtype=torch.float64)
    damped = turned @ torch.diag(sizes) @ turned.mT
    return damped - 0.01 / 1.01 * damped.diagonal().mean() * torch.eye(d)


def test_moments_that_are_singular_after_damping_are_damped_more():
    n_failed = 0
    for seed in range(50):
        moment = nearly_singular(seed=seed)[None]
        damped = moment + 0.01 * moment[0].diagonal().mean() * torch.eye(6)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            _, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(root))
            n_failed += bool(again)
        weight = torch.randn(2, 6)
        scale = weight_scale(weight, 3, 0)
        found = compensated(weight, moment, scale, 3)
        torch.testing.assert_close(
            quantize_weight(found.weight, found.scale, 3, 0), found.weight, rtol=0, atol=0
        )
        assert found.output_error is not None  # compensated after all
    assert n_failed > 0


def test_a_layer_whose_moments_no_damping_helps_is_rounded_to_nearest_with_a_warning(
    monkeypatch, caplog
):
    network, data = correlated_network()
    layers = layers_of(network, data)
    huge = torch.full((1, 24, 24), 1e308, dtype=torch.float64)  # damped, it overflows
    monkeypatch.setattr(compensation, "input_moments", lambda *_: {"1": huge.clone()})
    prepared = prepare(network, layers)
    compensate_weights(prepared, layers, data, {"1": [3, 4]})
    layer = prepared.get_submodule("1")
    weight = float_weight(layer)
    expected = quantize_weight(weight, weight_scale(weight, 3, 0), 3, 0)
    assert torch.equal(weight_quantizer(layer).quantized(weight, 3), expected)
    (record,) = caplog.records
    assert record.message == (
        "The input moments of layer '1' are singular in 1 of 1 groups, whose weights are rounded "
        "to nearest instead of compensated."
    )
