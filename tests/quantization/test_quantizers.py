"""Each quantizer against its paper's formula, all its code vectors, and autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hq_optuna.errors import SpaceError
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.compensation import Grid, compensate_weights, compensated
from hq_optuna.quantization.functional import quantize_activation, quantize_weight
from hq_optuna.quantization.modules import WeightFakeQuantize
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.quantizers import QUANTIZERS, quantizer_named
from hq_optuna.quantization.ranges import TINY, weight_scale
from tests.quantization.test_compensation import correlated_network
from tests.quantization.test_functional import LAYER_IDS, LAYERS
from tests.reference import quantizers as slow
from tests.small_networks import layers_of, seeded

ALL = [
    (name, bits)
    for name, quantizer in QUANTIZERS.items()
    for bits in (1, 2, 3, 4, 8)
    if bits in quantizer.all_bits
]
FEW = [(name, bits) for name, bits in ALL if bits <= 4]
COMPENSATED = [(name, bits) for name, bits in ALL if QUANTIZERS[name].compensates]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def rounded(name: str, w: Tensor, bits: int, axis: int = 0) -> Tensor:
    quantizer = QUANTIZERS[name]
    with torch.no_grad():
        return quantizer.quantize(w, quantizer.scale(w, bits, axis), bits, axis)


def errors(name: str, w: Tensor, bits: int) -> Tensor:
    return (rounded(name, w, bits).double() - w.double()).square().sum(1)


# The error is the least there is


@pytest.mark.parametrize(
    "name, bits, n",
    [("binary", 1, 8), ("ternary", 2, 7), ("midrise", 1, 8), ("midrise", 2, 6), ("midrise", 3, 4)],
)
def test_no_codes_and_no_scale_have_a_smaller_error(name, bits, n):
    w = torch.cat([values(12, n), values(4, n, seed=1).exp(), values(4, n, seed=2).round()])
    ours = errors(name, w, bits)
    for row, error in zip(w.double().numpy(), ours, strict=True):
        least = slow.least_error(row, slow.codes_of(name, bits))
        assert float(error) == pytest.approx(least, rel=1e-5, abs=1e-9)


def test_ternary_is_exact_in_long_channels_too_and_below_the_papers_threshold():
    w = torch.stack([values(3000), values(3000, seed=1) ** 3, values(3000, seed=2).exp()])
    for row, error in zip(w.double().numpy(), errors("ternary", w, 2), strict=True):
        assert float(error) == pytest.approx(slow.least_ternary_error(row), rel=1e-5)
        assert float(error) < np.square(slow.twn(row) - row).sum()


def test_ternary_and_uniform_at_2_bits_are_the_same_where_both_are_exact():
    w = values(8, 500)
    scales = QUANTIZERS["ternary"].scale(w, 2, 0), weight_scale(w, 2, 0)
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0)
    assert torch.equal(rounded("ternary", w, 2) != 0, rounded("uniform", w, 2) != 0)


@pytest.mark.parametrize("name", ["uniform", "midrise", "dorefa"])
def test_every_quantizer_that_can_do_1_bit_is_binary_there(name):
    w = values(5, 30)
    assert torch.equal(rounded(name, w, 1), rounded("binary", w, 1))
    alpha = w.double().abs().mean(1)
    expected = torch.where(w >= 0, 1.0, -1.0) * alpha[:, None]
    torch.testing.assert_close(rounded(name, w, 1), expected.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("n", [40, 3000])
def test_the_scale_of_midrise_is_nearly_the_best_of_thousands(bits, n):
    w = torch.stack([values(n, seed=bits), values(n, seed=1) ** 3])
    codes = slow.codes_of("midrise", bits)
    for row, error in zip(w.double().numpy(), errors("midrise", w, bits), strict=True):
        least = slow.least_scanned_error(row, codes, n_scales=400)
        assert float(error) <= least * (1.01 if bits <= 4 else 1.05)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_grid_without_zero_has_less_error_on_gaussian_weights(bits):
    w = values(20, 600)
    assert bool((errors("midrise", w, bits) < errors("uniform", w, bits)).all())


# Formulas


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_is_the_published_function_times_the_scale_of_least_squares(bits):
    w = torch.cat([values(6, 40, seed=bits) / 5, 3 * values(2, 40)])
    ours = rounded("dorefa", w, bits)
    for row, quantized in zip(w.double(), ours.double(), strict=True):
        published = torch.tensor(slow.dorefa(row.tolist(), bits), dtype=torch.float64)
        alpha = (row @ published) / (published @ published)
        torch.testing.assert_close(quantized, alpha * published, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_inputs_without_negative_values_are_dorefas_with_another_bound(bits):
    x, bound = values(500, seed=bits) * 2, 1.75  # exact in every step
    ours = quantize_activation(x, bound / (2**bits - 1), 0, bits)
    expected = [bound * slow.dorefa_activation(float(v) / bound, bits) for v in x]
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name, bits", ALL)
def test_every_value_is_a_code_of_the_grid_times_the_scale_bit_for_bit(name, bits):
    quantizer, w = QUANTIZERS[name], values(6, 300)
    scale = quantizer.scale(w, bits, 0)
    assert scale.dtype == torch.float32 and bool((scale > 0).all())
    ours = quantizer.quantize(w, scale, bits, 0)
    codes = (ours / scale[:, None]).round()
    assert torch.equal(codes * scale[:, None], ours)
    assert {int(c) for c in codes.unique()} <= set(slow.codes_of(name, bits))
    assert codes.abs().max() <= quantizer.largest_code(bits) == max(slow.codes_of(name, bits))


@pytest.mark.parametrize("name, bits", COMPENSATED)
def test_rounding_twice_changes_nothing_and_nearest_is_what_quantize_does(name, bits):
    quantizer, w = QUANTIZERS[name], values(5, 80)
    scale = quantizer.scale(w, bits, 0)
    once = quantizer.quantize(w, scale, bits, 0)
    assert torch.equal(quantizer.quantize(once, scale, bits, 0), once)
    code = torch.tensor(float(quantizer.largest_code(bits)))
    grid = Grid(scale[:, None], code, quantizer.has_odd_codes(bits))
    torch.testing.assert_close(grid.nearest(w), once, rtol=1e-6, atol=0)


# Gradients


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradient_of_dorefa_is_autograds_of_the_published_steps(bits):
    w = (values(3, 50, seed=bits) / 3).double().requires_grad_()
    weight = values(3, 50, seed=99).double()
    scale = QUANTIZERS["dorefa"].scale(w, bits, 0)
    (QUANTIZERS["dorefa"].quantize(w, scale, bits, 0) * weight).sum().backward()
    alpha = scale.double() * (2**bits - 1)
    for i in range(3):
        row = w.detach()[i].clone().requires_grad_()
        (alpha[i] * slow.dorefa_composed(row, bits) * weight[i]).sum().backward()
        torch.testing.assert_close(w.grad[i], row.grad, rtol=1e-6, atol=1e-9)
    assert bool((w.grad != weight).any())


@pytest.mark.parametrize("name, bits", [("binary", 1), ("ternary", 2), ("dorefa", 1)])
def test_gradients_pass_straight_through_as_published(name, bits):
    w, weight = values(4, 30).requires_grad_(), values(4, 30, seed=1)
    scale = QUANTIZERS[name].scale(w, bits, 0)
    ours = QUANTIZERS[name].quantize(w, scale, bits, 0)
    (ours * weight).sum().backward()
    assert torch.equal(w.grad, weight)
    assert torch.equal(ours.detach(), rounded(name, w.detach(), bits))


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_the_gradient_of_midrise_is_1_inside_the_range_and_0_where_clipped(bits):
    w = (3 * values(4, 60)).requires_grad_()
    scale = torch.full((4,), 2.0 ** (1 - bits))
    QUANTIZERS["midrise"].quantize(w, scale, bits, 0).sum().backward()
    inside = w.detach().abs() < 2.0  # the outermost value and half a step
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(w.grad, inside.float())


# Channels, precisions, odd weights


@pytest.mark.parametrize("layer, axis", LAYERS, ids=LAYER_IDS)
@pytest.mark.parametrize("name, bits", FEW)
def test_each_output_channel_is_rounded_as_if_it_were_alone(name, bits, layer, axis):
    w = values(*layer.weight.shape)
    scale = QUANTIZERS[name].scale(w, bits, axis)
    assert scale.shape == (w.shape[axis],)
    ours = rounded(name, w, bits, axis)
    for channel in range(w.shape[axis]):
        alone = w.select(axis, channel)[None]
        assert torch.equal(ours.select(axis, channel)[None], rounded(name, alone, bits))


@pytest.mark.parametrize("name, bits", ALL)
def test_a_channel_of_zeros_stays_next_to_zero_and_harms_no_other(name, bits):
    w = values(3, 20)
    w[1] = 0.0
    ours = rounded(name, w, bits)
    assert ours[1].abs().max() <= TINY * QUANTIZERS[name].largest_code(bits)
    assert torch.equal(ours[[0, 2]], rounded(name, w[[0, 2]], bits))


@pytest.mark.parametrize("name, bits", ALL)
def test_one_weight_in_a_channel_is_kept_as_it_is(name, bits):
    w = torch.tensor([[0.37], [-12.5], [1e-4]])
    torch.testing.assert_close(rounded(name, w, bits), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name, bits", [(n, b) for n, b in ALL if n != "dorefa"])
def test_weights_twice_as_large_are_rounded_to_values_twice_as_large(name, bits):
    w = values(4, 50)
    assert torch.equal(rounded(name, 2 * w, bits), 2 * rounded(name, w, bits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, bits", ALL)
def test_weights_of_other_precisions_are_rounded_in_theirs(name, bits, dtype):
    w = values(4, 30).to(dtype)
    ours = WeightFakeQuantize(0, QUANTIZERS[name]).quantized(w, bits)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), rounded(name, w.float(), bits), rtol=0.02, atol=0.02)


# In a prepared network


@pytest.mark.parametrize("name, bits", ALL)
def test_a_layer_has_the_same_weight_with_and_without_gradients(name, bits):
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    prepared = prepare(network, layers_of(network, values(4, 6)), quantizers={"1": name})
    set_bits(prepared, {"1": (bits, 32)})
    weight = network[1].weight.detach()
    with torch.no_grad():
        without = prepared.get_submodule("1").weight
    assert torch.equal(without, rounded(name, weight, bits))
    with_gradient = prepared.get_submodule("1").weight
    assert torch.equal(with_gradient.detach(), without) and with_gradient.requires_grad
    with_gradient.sum().backward()
    assert float_weight(prepared.get_submodule("1")).grad is not None
    assert weight_quantizer(prepared.get_submodule("0")).quantizer.name == "uniform"


def test_bits_that_a_quantizer_cannot_do_are_refused_and_nothing_changes():
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    prepared = prepare(network, layers_of(network, values(4, 6)), quantizers={"1": "ternary"})
    with pytest.raises(SpaceError, match=r"'1'.*'ternary' can do 2 bits; got 3 bits for its wei"):
        set_bits(prepared, {"0": (3, 3), "1": (3, 3)})
    assert weight_quantizer(prepared.get_submodule("0")).bits == 32
    set_bits(prepared, {"1": (32, 8)})
    set_bits(prepared, {"1": (2, 8)})


def test_an_unknown_quantizer_or_layer_is_refused():
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    layers = layers_of(network, values(4, 6))
    with pytest.raises(SpaceError, match=r"one of uniform, binary, ternary, midrise, dorefa; got"):
        prepare(network, layers, quantizers={"1": "ternery"})
    with pytest.raises(SpaceError, match=r"'7' is none of the layers to prepare: 0, 1\."):
        prepare(network, layers, quantizers={"7": "ternary"})
    assert quantizer_named("dorefa").bits_text == "1 to 8 bits"
    assert quantizer_named("binary").bits_text == "1 bit"


# Compensated rounding on their grids


@pytest.mark.parametrize("name, bits", COMPENSATED)
def test_compensation_stays_on_the_quantizers_grid_and_makes_no_channel_worse(name, bits):
    quantizer, weight = QUANTIZERS[name], values(8, 5, 2)
    mixed = values(2, 10, 10, seed=1).double()
    moment = mixed @ mixed.mT
    scale = quantizer.scale(weight, bits, 0)
    ours, found, _ = compensated(weight, moment, scale, bits, quantizer)
    codes = (ours / found[:, None, None]).round()
    assert torch.equal(codes * found[:, None, None], ours)
    assert {int(c) for c in codes.unique()} <= set(slow.codes_of(name, bits))
    damped = moment + torch.eye(10) * 0.01 * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]

    def error(q: Tensor) -> Tensor:
        rows = (q - weight).double().flatten(1).reshape(2, -1, 10)
        return torch.einsum("grd,gde,gre->gr", rows, damped, rows).flatten()

    nearest = error(quantizer.quantize(weight, scale, bits, 0))
    assert bool((error(ours) <= nearest * (1 + 1e-6) + 1e-9).all())
    if bits > 1:
        assert float(error(ours).sum()) < 0.9 * float(nearest.sum())


@pytest.mark.parametrize("name, bits", ALL)
def test_a_prepared_network_is_compensated_where_the_quantizer_allows_it(name, bits):
    network, data = correlated_network()
    layers = layers_of(network, data[0].inputs)
    prepared = prepare(network, layers, quantizers={"1": name})
    compensate_weights(prepared, layers, data, {"1": [bits]})
    weight = float_weight(prepared.get_submodule("1")).detach()
    kept = weight_quantizer(prepared.get_submodule("1")).kept(weight, bits)
    assert (kept is not None) == QUANTIZERS[name].compensates
    if kept is None:
        set_bits(prepared, {"1": (bits, 32)})
        expected = rounded(name, weight, bits)
        assert torch.equal(prepared.get_submodule("1").weight.detach(), expected)


def test_uniform_is_the_function_it_was_bit_for_bit():
    w = values(6, 200)
    for bits in range(1, 17):
        expected = quantize_weight(w, weight_scale(w, bits, 0), bits, 0)
        assert torch.equal(rounded("uniform", w, bits), expected)
