"""Rounding: bit for bit what PyTorch computes, and what a slow twin computes value by value."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hq_optuna.quantization.functional import (
    activation_grid,
    quantize_activation,
    quantize_weight,
    weight_grid,
)
from tests.reference import fake_quantize as slow
from tests.small_networks import seeded

ALL_BITS = range(2, 17)

LAYERS: list[tuple[nn.Module, int]] = [
    (nn.Linear(5, 4), 0),
    (nn.Conv1d(4, 6, 3), 0),
    (nn.Conv2d(4, 6, 3, groups=2), 0),
    (nn.Conv2d(4, 8, 3, groups=4), 0),  # depthwise with two filters a channel
    (nn.Conv3d(2, 3, 2), 0),
    (nn.ConvTranspose1d(4, 3, 3), 1),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), 1),
    (nn.ConvTranspose3d(2, 3, 2), 1),
]
LAYER_IDS = [f"{type(m).__name__}-{getattr(m, 'groups', 1)}" for m, _ in LAYERS]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)) * 3


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells −0.0 from 0.0."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_weights_equal_pytorchs_fake_quantization_bit_for_bit(bits):
    w, scale = values(6, 5, 3), torch.rand(6, generator=seeded(1)) / 2 ** (bits - 3) + 1e-4
    expected = torch.fake_quantize_per_channel_affine(
        w, scale, torch.zeros(6, dtype=torch.int32), 0, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    )
    assert same_bits(quantize_weight(w, scale, bits, 0), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_activations_equal_pytorchs_fake_quantization_bit_for_bit(bits):
    x, zero_point = values(200), 2 ** (bits - 1) - 1
    scale = 12 / 2**bits
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**bits - 1)
    ours = quantize_activation(x, scale, zero_point, bits)
    assert same_bits(ours, expected)


@pytest.mark.parametrize("bits", [1, *ALL_BITS])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_quick_way_without_gradient_equals_the_one_with_it(bits, share):
    wide = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, float("inf")])
    x, zero_point = torch.cat([values(5000, seed=bits), wide]), int(share * (2**bits - 1))
    for scale in (0.0131, 1 / 16, 7 / 2**bits):
        graded = quantize_activation(x.clone().requires_grad_(), scale, zero_point, bits)
        assert graded.requires_grad
        with torch.no_grad():
            assert same_bits(quantize_activation(x, scale, zero_point, bits), graded.detach())


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_no_number_stays_none(dtype, graded):
    x = torch.tensor([float("nan"), 1.0, float("inf")], dtype=dtype, requires_grad=graded)
    found = quantize_activation(x, 0.5, 1, 4)
    assert found[0].isnan()
    assert found[1:].tolist() == [1.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_rounded_by_pytorch_itself(dtype):
    x = values(300).to(dtype)
    expected = torch.fake_quantize_per_tensor_affine(x, 0.3, 2, 0, 15)
    assert same_bits(quantize_activation(x, 0.3, 2, 4), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weights_equal_the_slow_twin_on_every_axis(bits, axis):
    w = values(3, 4, 5, seed=bits)
    scale = torch.rand(w.shape[axis], generator=seeded(2)) / 2 ** (bits - 3) + 1e-4
    top = 2 ** (bits - 1) - 1
    expected = slow.per_channel(w.numpy(), scale.numpy().tolist(), axis, -top, top)
    np.testing.assert_array_equal(quantize_weight(w, scale, bits, axis).numpy(), expected)


@pytest.mark.parametrize("bits", [1, *ALL_BITS])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_activations_equal_the_slow_twin(bits, share):
    x, zero_point, scale = values(150, seed=bits), int(share * (2**bits - 1)), 10 / 2**bits
    expected = slow.per_tensor(x.numpy(), scale, zero_point, 0, 2**bits - 1)
    ours = quantize_activation(x, scale, zero_point, bits)
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_ties_go_to_the_even_code():
    w = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, -1.25]])
    expected = torch.tensor([[0.0, 1.0, 1.0, 0.0, -1.0, -1.0]])
    assert torch.equal(quantize_weight(w, torch.tensor([0.5]), 4, 0), expected)


@pytest.mark.parametrize("odd", [3, 4])
def test_ties_do_not_depend_on_the_zero_point(odd):
    x = torch.tensor([0.25, 0.75, 1.25])
    ours = quantize_activation(x, 0.5, odd, 4)
    assert torch.equal(ours, torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize("layer, axis", LAYERS, ids=LAYER_IDS)
@pytest.mark.parametrize("bits", [1, 3])
def test_each_output_channel_of_every_layer_kind_has_its_own_scale(layer, axis, bits):
    w = values(*layer.weight.shape)
    scale = torch.rand(w.shape[axis], generator=seeded(3)) + 0.2
    ours = quantize_weight(w, scale, bits, axis)
    for channel, s in enumerate(scale):
        alone = w.select(axis, channel)
        if bits == 1:
            expected = torch.where(alone >= 0, s, -s)
        else:
            expected = torch.fake_quantize_per_tensor_affine(alone, float(s), 0, -3, 3)
        assert torch.equal(ours.select(axis, channel), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 8])
def test_other_precisions_round_to_the_same_codes(dtype, bits):
    w = values(4, 30).to(dtype)
    scale = torch.full((4,), 2.0 ** (2 - bits))  # exact in every precision
    ours = quantize_weight(w, scale, bits, 0)
    assert ours.dtype == dtype
    assert torch.equal(ours.float(), quantize_weight(w.float(), scale, bits, 0))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_gradient_is_1_inside_the_weights_range_and_0_where_clipped(bits):
    w = values(4, 50).requires_grad_()
    scale = torch.full((4,), 3.0 / 2 ** (bits - 1))
    quantize_weight(w, scale, bits, 0).sum().backward()
    codes = (w.detach() / scale[:, None]).round()
    inside = codes.abs() <= 2 ** (bits - 1) - 1
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(w.grad, inside.float())


def test_the_gradient_is_1_inside_the_activations_range_and_0_where_clipped():
    x = torch.tensor([-3.0, -1.1, -0.2, 0.0, 1.9, 2.4, 9.0], requires_grad=True)
    weight = torch.arange(1.0, 8.0)
    ours = quantize_activation(x, 1.0, 1, 2)
    assert ours.tolist() == [-1.0, -1.0, 0.0, 0.0, 2.0, 2.0, 2.0]
    (ours * weight).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


def test_binary_weights_are_sign_times_scale_and_the_gradient_passes_straight():
    w = torch.tensor([[0.5, -0.1, 0.0], [-7.0, 2.0, 1e-9]], requires_grad=True)
    ours = quantize_weight(w, torch.tensor([0.2, 3.0]), 1, 0)
    assert torch.equal(ours, torch.tensor([[0.2, -0.2, 0.2], [-3.0, 3.0, 3.0]]))
    (ours * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert w.grad.tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.parametrize("bits", ALL_BITS)
def test_weights_have_as_many_steps_below_zero_as_above_and_inputs_all_codes(bits):
    low, high = weight_grid(bits)
    assert -low == high == 2 ** (bits - 1) - 1
    assert activation_grid(bits) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_rounding_twice_changes_nothing(bits):
    w, scale = values(5, 40), torch.full((5,), 0.25)
    once = quantize_weight(w, scale, bits, 0)
    assert torch.equal(quantize_weight(once, scale, bits, 0), once)
    assert len(once.unique()) <= 2**bits
