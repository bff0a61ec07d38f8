"""Kind D, layers: a subclass with a forward of its own computes what that says."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from tests.reported import product
from tests.small_networks import seeded


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def labels(n, of):
    return torch.randint(0, of, (n,), generator=seeded(1))


class ChannelsLast(nn.Conv1d):
    """Takes (samples, length, channels)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Pixels(nn.Linear):
    """Works on channels, which are not the last axis."""

    def forward(self, x):
        return conv2d(x, self.weight[:, :, None, None], self.bias)


class Padded(nn.Conv2d):
    """Pads at the far end, as networks ported from TensorFlow do."""

    def forward(self, x):
        x = pad(x, (0, 1, 0, 1))
        return conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Computes with a weight made from its own."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class Wide(nn.ConvTranspose2d):
    """Cuts what it returns."""

    def forward(self, x):
        return conv_transpose2d(x, self.weight, self.bias, self.stride)[:, :, 1:, 1:]


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Pad(nn.Module):
    def forward(self, x):
        return pad(x, (0, 1, 0, 1))


class Cut(nn.Module):
    def forward(self, x):
        return x[:, :, 1:, 1:]


def along_length(inside, size):
    kind = ChannelsLast if inside else nn.Conv1d
    a, b = (kind(12, 12, 3, padding=1) for _ in range(2))
    turn = nn.Identity() if inside else Transpose()
    net = nn.Sequential(turn, a, nn.ReLU(), b, nn.ReLU(), turn, nn.Flatten())
    return nn.Sequential(*net, nn.Linear(12 * size, 4)), drawn(96, size, 12)


def by_pixel(inside, size):
    middle = Pixels(12, 12) if inside else nn.Conv2d(12, 12, 1)
    if not inside:
        middle.weight.data = nn.Linear(12, 12).weight.data[:, :, None, None]
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * size * size, 4),
    )  # fmt: skip
    return net, drawn(96, 3, size, size)


def padded(inside, size):
    middle = Padded(8, 8, 3, stride=2) if inside else nn.Conv2d(8, 8, 3, stride=2)
    before = nn.Identity() if inside else Pad()
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(first, before, middle, head), drawn(96, 3, size, size)


def cut(inside, size):
    kind = Wide if inside else nn.ConvTranspose2d
    middle, after = kind(8, 6, 3, stride=2), nn.Identity() if inside else Cut()
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(first, middle, after, head), drawn(96, 3, size, size)


@pytest.fixture
def off():
    """How far 3 bits move the outputs of a network, made the same way each time."""

    def of(make, inside, size, **options):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            network, x = make(inside, size)
            network.eval()
            scale = torch.linspace(0.1, 3, x.shape[-1])
            x = x * scale
            changed, _ = product.quantized(network, (x, labels(len(x), 4)), 3, **options)
            return float((changed(x) - network(x)).square().mean())

    return of


@pytest.mark.parametrize("size", [9, 12])  # 12 is the number of channels, too
@pytest.mark.parametrize("options", [{}, {"rounding": "nearest"}, {"correction": False}])
@pytest.mark.parametrize("make", [along_length, by_pixel, padded, cut])
def test_a_layer_in_another_layout_is_rounded_as_the_one_that_is_laid_out_as_usual(
    off, make, options, size
):
    """Transposed, padded or cut inside its forward or outside: 3 bits move outputs about alike."""
    plain = off(make, False, size, rounding="nearest", correction=False)
    usual = off(make, False, size, **options)
    assert off(make, True, size, **options) < 1.1 * max(usual, plain)


def test_own_padding_is_compensated_for_by_what_the_weight_really_meets(off):
    """The same convolution with its padding outside has the same rounded weights, to the bit."""
    options = {"correction": False}
    assert off(padded, True, 9, **options) == off(padded, False, 9, **options)


def test_a_weight_that_is_computed_from_the_own_one_takes_its_bits():
    """Weight standardization: the rounded weight is standardized, as by hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ).eval()  # fmt: skip
    x = drawn(64, 3, 8, 8)
    changed, _ = product.quantized(net, (x, labels(64, 4)), {"0": (32, 32), "2": (3, 32), "6": (32, 32)}, correction=False)  # fmt: skip  # noqa: E501
    w = changed[2].weight.detach()
    for channel in w.flatten(1):
        assert len(channel.unique()) <= 7
    h = net[1](net[0](x))
    w = w - w.mean((1, 2, 3), keepdim=True)
    by_hand = conv2d(h, w / w.std((1, 2, 3), keepdim=True), net[2].bias, padding=1)
    torch.testing.assert_close(changed[2](changed[1](changed[0](x))), by_hand, rtol=1e-4, atol=1e-5)


class NormAct(nn.BatchNorm2d):
    """Batch-norm and activation in one, as timm has them."""

    def forward(self, x):
        return super().forward(x).relu()


class LastNorm(nn.BatchNorm1d):
    """Normalizes the last axis of (samples, length, channels)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Inverted(nn.BatchNorm2d):
    """Keeps an inverse deviation where PyTorch keeps a variance."""

    def forward(self, x):
        shape = (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) * self.running_var.view(shape)


def with_norm(norm, after):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), norm(8), after, nn.Conv2d(8, 8, 3), norm(8), after,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ).eval()  # fmt: skip
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.2, 0.2)
                layer.running_var.uniform_(0.1, 0.4)
    return net


@torch.no_grad()
def test_a_batch_norm_that_does_more_is_corrected_like_its_parent():
    """With an activation inside: the same statistics, bit for bit, as with one behind it."""
    x = drawn(64, 3, 9, 9)
    outputs = [
        product.quantized(with_norm(norm, after), (x, labels(64, 4)), 2)[0](x)
        for norm, after in ((nn.BatchNorm2d, nn.ReLU()), (NormAct, nn.Identity()))
    ]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_statistics_that_mean_something_else_are_left_alone():
    """A norm with a formula of its own keeps what it stores, and 4 bits do no harm by it."""
    x = drawn(64, 3, 9, 9)
    net = with_norm(Inverted, nn.ReLU())
    changed, _ = product.quantized(net, (x, labels(64, 4)), 3)
    for place in (1, 4):
        assert torch.equal(changed[place].running_var, net[place].running_var)
    plain, _ = product.quantized(net, (x, labels(64, 4)), 3, correction=False)
    expected = net(x)
    distances = [(each(x) - expected).square().mean() for each in (changed, plain)]
    assert distances[0] < 1.1 * distances[1]


@torch.no_grad()
def test_a_norm_along_another_axis_does_no_harm():
    """(samples, length, channels) with as many places as channels, so that shapes tell nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Linear(8, 8), LastNorm(8), nn.ReLU(), nn.Linear(8, 8), LastNorm(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 3),
        ).eval()  # fmt: skip
        net[1].running_var.uniform_(0.1, 0.4)
        net[4].running_mean.uniform_(-0.3, 0.3)
    x = drawn(96, 8, 8) * torch.linspace(0.2, 2, 8)
    expected = net(x)
    off = [
        (product.quantized(net, (x, labels(96, 3)), 3, correction=on)[0](x) - expected).square()
        for on in (True, False)
    ]
    assert off[0].mean() < 1.1 * off[1].mean()
