"""Quantizers with state: what they keep, and when they notice that it is out of date."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hq_optuna.quantization.modules import InputFakeQuantize, WeightFakeQuantize
from hq_optuna.quantization.observers import InputHistogram
from hq_optuna.quantization.quantizers import base
from hq_optuna.quantization.ranges import AffineRange, weight_scale
from hq_optuna.space.layers import FLOAT_BITS
from tests.small_networks import seeded


@pytest.fixture
def rounds(monkeypatch) -> list[int]:
    """The bits of every rounding of a weight, in order."""
    seen: list[int] = []
    original = base.quantize_weight

    def counted(weight: Tensor, scale: Tensor, bits: int, axis: int) -> Tensor:
        seen.append(bits)
        return original(weight, scale, bits, axis)

    monkeypatch.setattr(base, "quantize_weight", counted)
    return seen


def weight(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 6, generator=seeded(seed)))


def expected(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(w.detach(), scale, zero, 0, -top, top)


def test_float_returns_the_very_same_tensor():
    w, x = weight(), torch.randn(3)
    assert WeightFakeQuantize(0)(w) is w
    assert InputFakeQuantize(None)(x) is x


def test_rounded_weights_are_kept_for_each_number_of_bits(rounds):
    w, quantizer = weight(), WeightFakeQuantize(0)
    with torch.no_grad():
        for bits in (4, 3, 4, 3, 2, 4):
            quantizer.bits = bits
            assert torch.equal(quantizer(w), expected(w, weight_scale(w, bits, 0), bits))
    assert rounds == [4, 3, 2]


def replace_data(w: nn.Parameter) -> None:
    w.data = w.data * 2


def change_in_place(w: nn.Parameter) -> None:
    with torch.no_grad():
        w.mul_(2)


def copy_state(w: nn.Parameter) -> None:
    holder = nn.Module()
    holder.w = w
    holder.load_state_dict({"w": w.detach() * 2})


@pytest.mark.parametrize("change", [replace_data, change_in_place, copy_state])
def test_a_changed_weight_is_rounded_anew_at_every_number_of_bits(change, rounds):
    w, quantizer = weight(), WeightFakeQuantize(0)
    old = {bits: quantizer.quantized(w, bits) for bits in (3, 4)}
    scales = {bits: quantizer.scale(w, bits) for bits in (3, 4)}
    change(w)
    for bits in (3, 4):
        assert torch.equal(quantizer.quantized(w, bits), expected(w, scales[bits], bits))
        assert not torch.equal(quantizer.quantized(w, bits), old[bits])
    assert rounds == [3, 4, 3, 4]


def test_another_weight_at_the_old_ones_address_is_noticed():
    quantizer = WeightFakeQuantize(0)
    for seed in range(20):
        w = torch.randn(4, 6, generator=seeded(seed))
        assert torch.equal(quantizer.quantized(w, 3), expected(w, quantizer.scale(w, 3), 3))
        del w  # its memory is free for the next one


def test_a_weight_that_is_computed_from_others_is_rounded_as_it_is_now():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    quantizer = WeightFakeQuantize(0)
    quantizer.bits = 3
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    original = layer.parametrizations.weight
    with torch.no_grad():
        for factor in (1.0, 2.0, 0.5, 1.5):
            original.original0.mul_(factor)
            direction = original.original1
            plain = original.original0 * direction / direction.norm(dim=1, keepdim=True)
            rounded = expected(plain, quantizer.scale(plain, 3), 3)
            torch.testing.assert_close(layer.weight, rounded)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_weights_round_to_the_same_values_with_and_without_gradients(bits):
    w, quantizer = weight(), WeightFakeQuantize(0)
    quantizer.bits = bits
    with torch.no_grad():
        without = quantizer(w)
    with_gradient = quantizer(w)
    assert with_gradient.requires_grad and not without.requires_grad
    assert torch.equal(with_gradient.detach(), without)
    with_gradient.sum().backward()
    assert w.grad is not None and w.grad.unique().tolist() in ([0.0, 1.0], [1.0])


def test_what_inference_mode_kept_can_be_differentiated_through_later():
    w, quantizer = weight().requires_grad_(False), WeightFakeQuantize(0)
    quantizer.bits = 4
    with torch.inference_mode():
        quantizer(w)
    x = torch.randn(2, 6, requires_grad=True)
    nn.functional.linear(x, quantizer(w)).sum().backward()
    assert torch.equal(x.grad[0], quantizer(w).sum(0))


def test_a_weight_made_in_inference_mode_is_rounded_too():
    with torch.inference_mode():
        w = torch.randn(4, 6, generator=seeded(0))
    quantizer = WeightFakeQuantize(0)
    first = quantizer.quantized(w, 4)
    with torch.inference_mode():
        w.mul_(0.5)
    assert not torch.equal(quantizer.quantized(w, 4), first)


def test_a_file_holds_no_rounded_weights():
    w, quantizer = torch.randn(4, 20_000, generator=seeded(0)), WeightFakeQuantize(0)
    quantizer.quantized(w, 3)
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    assert buffer.tell() < w.numel()


def test_a_copy_takes_the_scales_along_and_rounds_its_own_weight(rounds):
    w, quantizer = weight(), WeightFakeQuantize(0)
    quantizer.quantized(w, 3)
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(quantizer), loaded):
        assert torch.equal(other.scales[3], quantizer.scales[3])
        other_weight = weight(seed=1)
        half = expected(other_weight, quantizer.scales[3], 3)
        assert torch.equal(other.quantized(other_weight, 3), half)
    quantizer.quantized(w, 3)
    assert rounds == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precisions_can_be_rounded(dtype):
    w = weight().detach().to(dtype)
    rounded = WeightFakeQuantize(0).quantized(w, 4)
    assert rounded.dtype == dtype
    assert all(len(row.unique()) <= 16 for row in rounded)
    assert (rounded - w).abs().max() < 0.5


def test_an_input_is_rounded_to_its_known_range_bit_for_bit():
    x = torch.randn(100, generator=seeded(0)) * 4
    quantizer = InputFakeQuantize(None, ranges={4: AffineRange(0.37, 5)})
    quantizer.bits = 4
    assert torch.equal(quantizer(x), torch.fake_quantize_per_tensor_affine(x, 0.37, 5, 0, 15))


def test_the_range_of_an_input_is_found_once(monkeypatch):
    found = []
    original = InputHistogram.range

    def counted(self, bits, observer, grid):
        found.append((bits, observer))
        return original(self, bits, observer, grid)

    monkeypatch.setattr(InputHistogram, "range", counted)
    counts, edges = torch.ones(8).numpy(), torch.linspace(0, 4, 9).numpy()
    quantizer = InputFakeQuantize(InputHistogram(counts, edges), "min_max")
    for bits in (4, 2, 4, 2, FLOAT_BITS, 4):
        quantizer.bits = bits
        quantizer(torch.randn(5))
    assert found == [(4, "min_max"), (2, "min_max")]


def test_an_input_that_was_not_calibrated_is_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"No range is known for 3-bit.*Known are: \[4, 8\]"):
        InputFakeQuantize(None, ranges={8: AffineRange(1.0, 0), 4: AffineRange(1.0, 0)}).range(3)
    with pytest.raises(ValueError, match=r"not calibrated\. Known are: none"):
        InputFakeQuantize(None).range(3)


def test_scales_do_not_depend_on_the_precision_of_whoever_asks_first():
    one, other = WeightFakeQuantize(0), WeightFakeQuantize(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = one.scale(weight(), 3)
    assert torch.equal(first, other.scale(weight(), 3))
