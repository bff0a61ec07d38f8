"""Learned step sizes against LSQ's own composed form, finite differences and PyTorch's rounding."""

import math

import pytest
import torch
from torch import Tensor, nn

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.functional import activation_grid, quantize_weight, weight_grid
from hq_optuna.quantization.prepare import float_weight, input_quantizer, weight_quantizer
from hq_optuna.quantization.quantizers import QUANTIZERS
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.training.learned import LearnedInput, LearnedSteps, LearnedWeight
from tests.small_networks import ConvNet, make, seeded
from tests.training.examples import images, prepared_net

WEIGHT_SHAPES = [((6, 5), 0), ((4, 3, 3, 3), 0), ((3, 4, 2, 2), 1)]


def lsq(x: Tensor, s: Tensor, low: int, high: int, factor: Tensor | float) -> Tensor:
    """LSQ's eqs. (1) to (3) with its gradient scale, composed as in the paper's appendix."""
    s = (s - s * factor).detach() + s * factor
    v = x / s
    clipped = v.clamp(low, high)
    return (clipped + (clipped.round() - clipped).detach()) * s


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("shape", "axis"), WEIGHT_SHAPES)
def test_weights_get_the_gradients_of_lsq(bits, shape, axis):
    w = torch.randn(shape, dtype=torch.float64, generator=seeded(bits)).requires_grad_()
    channels = shape[axis]
    scale = torch.rand(channels, dtype=torch.float64, generator=seeded(1)) + 0.2
    along = [1] * len(shape)
    along[axis] = -1
    up = torch.randn(shape, dtype=torch.float64, generator=seeded(2))
    learned = LearnedWeight(scale, w, bits, axis, passes=False)
    (learned(w) * up).sum().backward()

    low, high = weight_grid(bits)
    n = w.numel() // channels
    s, w2 = scale.clone().requires_grad_(), w.detach().clone().requires_grad_()
    (lsq(w2, s.reshape(along), low, high, 1 / math.sqrt(n * high)) * up).sum().backward()
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-12, atol=0)
    # A step lr · gradient of log s changes s by the share by which LSQ's step changes it.
    torch.testing.assert_close(learned.log_scale.grad, s.grad / scale)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_inputs_get_the_gradients_of_lsq(bits, zero_point):
    x = torch.randn(7, 5, 3, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    learned = LearnedInput(AffineRange(0.3, zero_point), bits, x.dtype, x.device)
    up = torch.randn(x.shape, dtype=torch.float64, generator=seeded(2))
    (learned(x) * up).sum().backward()
    low, high = (q - zero_point for q in activation_grid(bits))
    s, x2 = torch.tensor(0.3, dtype=torch.float64).requires_grad_(), x.detach().requires_grad_()
    factor = 1 / math.sqrt(15 * activation_grid(bits)[1])
    x2.grad = None
    (lsq(x2, s, low, high, factor) * up).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(learned.log_scale.grad, s.grad / 0.3)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("shape", "axis"), WEIGHT_SHAPES)
def test_midrise_weights_get_the_gradients_of_lsq_on_their_grid(bits, shape, axis):
    w = torch.randn(shape, dtype=torch.float64, generator=seeded(bits)).requires_grad_()
    scale = torch.rand(shape[axis], dtype=torch.float64, generator=seeded(1)) * 0.3 + 0.1
    along = [1] * len(shape)
    along[axis] = -1
    up = torch.randn(shape, dtype=torch.float64, generator=seeded(2))
    midrise = QUANTIZERS["midrise"]
    learned = LearnedWeight(scale, w, bits, axis, False, midrise)
    (learned(w) * up).sum().backward()

    largest = 2**bits - 1
    s, w2 = scale.clone().requires_grad_(), w.detach().clone().requires_grad_()
    factor = 1 / math.sqrt(w.numel() // shape[axis] * largest)
    step = s.reshape(along)
    step = (step - step * factor).detach() + step * factor
    v = (w2 / step).clamp(-largest, largest)
    code = (2 * (w2 / (2 * step)).floor() + 1).clamp(-largest, largest)
    ((v + (code - v).detach()) * step * up).sum().backward()
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(learned.log_scale.grad, s.grad / scale)


def test_weights_whose_codes_do_not_depend_on_the_scale_keep_their_quantizers_gradient():
    dorefa = QUANTIZERS["dorefa"]
    w = torch.randn(4, 6, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    scale = dorefa.scale(w, 3, 0)
    up = torch.randn(w.shape, dtype=torch.float64, generator=seeded(1))
    dorefa.quantize(w, scale, 3, 0).backward(up)
    expected, w.grad = w.grad, None
    learned = LearnedWeight(scale, w, 3, 0, True, dorefa)
    out = learned(w)
    out.backward(up)
    torch.testing.assert_close(w.grad, expected, rtol=1e-6, atol=0)  # the scale by way of its log
    slope = (up * out.detach()).sum(1) / (math.sqrt(6 * 7) * scale.double().square())
    torch.testing.assert_close(learned.log_scale.grad, slope)
    assert learned.n_clipped(w) == 0


@pytest.mark.parametrize(
    ("name", "bits"),
    [("binary", 1), ("ternary", 2), ("midrise", 1), ("midrise", 2), ("midrise", 5), ("dorefa", 3)],
)
def test_every_quantizer_rounds_as_it_does_without_learning(name, bits):
    quantizer = QUANTIZERS[name]
    w = torch.randn(8, 4, 3, 3, generator=seeded(0))
    learned = LearnedWeight(quantizer.scale(w, bits, 0), w, bits, 0, True, quantizer)
    assert torch.equal(learned(w), quantizer.quantize(w, learned.scale, bits, 0))


def test_the_gradient_of_a_scale_is_the_slope_of_the_surrogate():
    # Rounding held as the constant it adds, clipping as it is; finite differences of that.
    x = torch.randn(200, dtype=torch.float64, generator=seeded(3)).requires_grad_()
    low, high, s0 = -3, 3, 0.4
    learned = LearnedWeight(torch.tensor([s0]), x, bits=3, channel_axis=0, passes=False)
    learned.shape = [-1]
    learned.log_scale.data = torch.tensor([math.log(s0)], dtype=torch.float64)
    learned.factor = torch.ones(1, dtype=torch.float64)
    learned(x).square().sum().backward()
    codes = (x.detach() / s0).clamp(low, high)
    added = codes.round() - codes

    def surrogate(log_scale: float) -> Tensor:
        s = math.exp(log_scale)
        return (((x.detach() / s).clamp(low, high) + added) * s).square().sum()

    step = 1e-6
    slope = (surrogate(math.log(s0) + step) - surrogate(math.log(s0) - step)) / (2 * step)
    torch.testing.assert_close(learned.log_scale.grad[0], slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_scale_does_not_depend_on_the_layout(layout, dtype):
    x = torch.randn(4, 6, 5, 5, generator=seeded(0)).to(dtype)
    up = torch.randn(x.shape, generator=seeded(1)).to(dtype)
    learned = LearnedInput(AffineRange(0.25, 3), 3, torch.float32, x.device)
    expected = LearnedInput(AffineRange(0.25, 3), 3, torch.float64, x.device)
    x1 = x.clone(memory_format=layout).requires_grad_()
    x2 = x.detach().double().requires_grad_()
    learned(x1).backward(up)
    expected(x2).backward(up.double())
    assert x1.grad.dtype == dtype
    assert torch.equal(x1.grad.double(), x2.grad)
    # bfloat16 rounds x / s and the result to eight bits, which moves the slope by their error.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        learned.log_scale.grad.double(), expected.log_scale.grad, rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_values_are_those_of_the_ordinary_rounding_bit_for_bit(bits):
    w = torch.randn(8, 4, 3, 3, generator=seeded(0))
    scale = torch.rand(8, generator=seeded(1)) * 0.3 + 0.05
    learned = LearnedWeight(scale, w, bits, 0, passes=True)
    # The scale that is written back is the one that rounds.
    assert torch.equal(learned(w), quantize_weight(w, learned.scale, bits, 0))
    torch.testing.assert_close(learned.scale, scale, rtol=1e-6, atol=0)


def test_gradients_of_clipped_weights_pass_or_stop_and_the_scale_learns_the_same():
    w = torch.tensor([[0.2, 0.9, -3.0]], requires_grad=True)
    scales = {}
    for passes in (True, False):
        w.grad = None
        learned = LearnedWeight(torch.tensor([0.5]), w, 2, 0, passes)
        learned(w).sum().backward()
        assert w.grad.tolist() == ([[1.0, 1.0, 1.0]] if passes else [[1.0, 0.0, 0.0]])
        scales[passes] = learned.log_scale.grad
    assert torch.equal(scales[True], scales[False])


def test_one_bit_weights_are_signs_whose_gradient_passes():
    w = torch.tensor([[0.2, -0.9, 3.0]], requires_grad=True)
    learned = LearnedWeight(torch.tensor([0.5]), w, 1, 0, passes=False)
    out = learned(w)
    assert out.tolist() == [[0.5, -0.5, 0.5]]
    (out * torch.tensor([[1.0, 2.0, 4.0]])).sum().backward()
    assert w.grad.tolist() == [[1.0, 2.0, 4.0]]
    # ∂/∂log s = Σ g · x̂ = 0.5 − 1 + 2, times 1 / (√3 · 0.25)
    torch.testing.assert_close(learned.log_scale.grad, torch.tensor([1.5 / (math.sqrt(3) * 0.25)]))


def test_frozen_steps_take_no_gradient_and_inputs_still_do():
    x = torch.randn(3, 4, requires_grad=True)
    learned = LearnedInput(AffineRange(0.3, 2), 3, x.dtype, x.device)
    learned.log_scale.requires_grad_(False)
    learned(x).sum().backward()
    assert learned.log_scale.grad is None and x.grad is not None


def test_layers_in_float_have_no_steps():
    net = prepared_net({"conv": (32, 4), "head": (2, 32)})
    steps = LearnedSteps.of(net, passes=True)
    assert list(steps.weights) == ["head"] and list(steps.inputs) == ["conv"]
    names = [name for name, _ in steps.named_parameters()]
    assert names == ["weight_step.head", "input_step.conv"]


def test_learned_steps_take_the_place_of_ranges_and_leave_their_values_behind():
    net = prepared_net()
    steps = LearnedSteps.of(net, passes=True)
    conv = net.get_submodule("conv")
    before = weight_quantizer(conv), input_quantizer(conv)
    with pytest.raises(RuntimeError, match="stop"), steps.used_in(net):
        assert conv.parametrizations.weight[-1] is steps.weights["conv"]
        steps.weights["conv"].log_scale.data += 0.5
        steps.inputs["conv"].log_scale.data -= 0.5
        inside = net(images())
        raise RuntimeError("stop")
    assert (weight_quantizer(conv), input_quantizer(conv)) == before
    assert torch.equal(before[0].scales[2], steps.weights["conv"].scale)
    assert before[1].ranges[4] == steps.inputs["conv"].learned
    assert torch.equal(net(images()), inside)


def test_other_bits_get_scales_of_the_trained_weight():
    net = prepared_net()
    conv = net.get_submodule("conv")
    old = weight_quantizer(conv).scale(float_weight(conv), 3).clone()
    with torch.no_grad():
        float_weight(conv).mul_(2)
    LearnedSteps.of(net, passes=True).write_back(net)
    torch.testing.assert_close(weight_quantizer(conv).scale(float_weight(conv), 3), 2 * old)


def test_every_kind_of_layer_learns():
    net = make(ConvNet, dtype=torch.float32)
    x = torch.randn(8, 2, 6, 6, generator=seeded(0))
    layers = introspect(net, x).layers
    names = [layer.name for layer in layers]
    data = read_batches((x, torch.zeros(8, dtype=torch.int64)))
    prepared = prepare(net, layers, observe_inputs(net, names, data))
    set_bits(prepared, dict.fromkeys(names, (3, 3)))
    steps = LearnedSteps.of(prepared, passes=True)
    expected = prepared(x)
    with steps.used_in(prepared):
        out = prepared(x)
        nn.functional.cross_entropy(out, torch.zeros(8, dtype=torch.int64)).backward()
    torch.testing.assert_close(out, expected)
    assert all(p.grad is not None and bool(p.grad.any()) for _, p in steps.named_parameters())
