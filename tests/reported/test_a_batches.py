"""Kind A: what is done to the batches must not change what the network computes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, kl_div, mse_loss, normalize
from torch.utils.data import DataLoader, TensorDataset

from tests.reported import product
from tests.small_networks import seeded


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def classes(n, of, seed=1):
    return torch.randint(0, of, (n,), generator=seeded(seed))


def made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build().eval()


@torch.no_grad()
def loss_by_hand(network, data, loss=cross_entropy):
    """The mean over samples of the losses of the batches as they are."""
    called = [(network(*x) if isinstance(x, tuple) else network(x), y, len(y)) for x, y in data]
    return sum(float(loss(z, y)) * n for z, y, n in called) / sum(n for *_, n in called)


class Fixed(nn.Module):
    """A network with its batch size written into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 4)

    def forward(self, x):
        return self.head(self.body(self.conv(x).relu()).relu().view(16, 128))


class Towers(nn.Module):
    """Compares all samples of a batch with each other, as contrastive networks do."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
        self.text = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, image, text):
        return 10 * normalize(self.image(image), dim=1) @ normalize(self.text(text), dim=1).T


class InBatch(nn.Module):
    """Batch-norm without running statistics: a sample's output hangs on its batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)

    def forward(self, x):
        return self.c(self.norm(self.b(self.norm(self.a(x)).relu())).relu())


class TimeFirst(nn.Module):
    """A recurrent network whose first axis is time."""

    def __init__(self):
        super().__init__()
        self.i, self.o, self.rnn = nn.Linear(5, 8), nn.Linear(8, 3), nn.GRU(8, 8)

    def forward(self, x):
        return self.o(self.rnn(self.i(x).relu())[0][-1])


def fixed():
    data = TensorDataset(drawn(64, 3, 8, 8), classes(64, 4))
    return made(Fixed), DataLoader(data, batch_size=16, drop_last=True)


def towers():
    text = drawn(96, 6)
    image = torch.cat([text, text.tanh()], 1) + 0.1 * drawn(96, 12, seed=2)
    cuts = range(0, 96, 16)
    return made(Towers), [((image[k : k + 16], text[k : k + 16]), torch.arange(16)) for k in cuts]


def in_batch():
    x, y = drawn(60, 6) * torch.linspace(0.1, 3, 60)[:, None], classes(60, 3)
    return made(InBatch), [(x[k : k + 12], y[k : k + 12]) for k in range(0, 60, 12)]


def time_first():
    x, y = drawn(5, 48, 5), classes(48, 3)
    return made(TimeFirst), [(x[:, k : k + 8], y[k : k + 8]) for k in range(0, 48, 8)]


def sizes():
    x, y = [drawn(1, 3, 6 + i % 4, 9 - i % 3, seed=i) for i in range(24)], classes(24, 4)
    net = made(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )
    )  # fmt: skip
    return net, [(image, y[i : i + 1]) for i, image in enumerate(x)]


@pytest.mark.parametrize("make", [fixed, towers, in_batch, time_first, sizes])
def test_losses_are_those_of_the_batches_as_they_were_given(make):
    """Networks that compute other things when batches are joined or cut: float and at 4 bits."""
    network, data = make()
    changed, _ = product.quantized(network, data, 4)
    expected = loss_by_hand(network, data)
    assert product.float_loss(network, data) == pytest.approx(expected, abs=1e-5)
    rise = loss_by_hand(changed, data) - expected
    assert product.measured_rise(network, data, 4) == pytest.approx(rise, abs=1e-5)
    assert product.search(network, data).share <= 0.25


def test_a_loss_over_pairs_of_a_batch_is_that_of_the_batches():
    """The loss itself compares the samples of a batch; the network does not."""

    def pairs(z, y):
        apart = torch.cdist(z, z)
        return ((y[:, None] == y) * apart + (y[:, None] != y) * (1 - apart).relu()).mean()

    network = made(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))
    x, y = drawn(40, 6), classes(40, 3)
    data = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 40, 8)]
    expected = loss_by_hand(network, data, pairs)
    assert product.float_loss(network, data, pairs) == pytest.approx(expected, rel=1e-5)


def bright_images(n, per_class=True):
    """Images of 8 classes, n each, of which the first are much brighter than the last."""
    level = torch.linspace(3, -2, 8).view(8, 1, 1, 1)
    pattern = drawn(8, 1, 8, 8) * torch.linspace(2, 0.3, 8).view(8, 1, 1, 1) + level
    y = torch.arange(8).repeat_interleave(n) if per_class else torch.arange(8).repeat(n)
    return pattern[y] + 0.7 * drawn(8 * n, 1, 8, 8, seed=3), y


def trained_on(x, y):
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(100):
            pick = torch.randperm(len(x))[:64]
            optimizer.zero_grad()
            cross_entropy(network(x[pick]), y[pick]).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def moved(network, changed, x):
    before, after = network(x).log_softmax(1), changed(x).log_softmax(1)
    return float(kl_div(after, before, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("batched", [False, True])
def test_the_order_of_the_calibration_data_changes_little(batched):
    """Images in class order, as a folder gives them, as tensors or in a loader's batches."""
    x, y = bright_images(100)
    network, (seen, _) = trained_on(x, y), bright_images(40)

    def off(order):
        data = x[order], y[order]
        if batched:
            data = DataLoader(TensorDataset(*data), batch_size=25)
        changed, _ = product.quantized(network, data, 2)
        return moved(network, changed, seen)

    shuffled = max(off(torch.randperm(800, generator=seeded(i))) for i in range(3))
    assert off(torch.arange(800)) < 1.5 * shuffled


def test_statistics_come_from_many_batches_that_cannot_be_joined():
    """Images one by one with a name beside, or in sizes that the network makes one."""
    x, y = bright_images(16, per_class=False)
    body = trained_on(x, y)

    class Resized(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, image, name=""):
            return self.body(interpolate(image, size=(8, 8)))

    network = Resized().eval()
    named = [({"image": x[i : i + 1], "name": f"{i}.png"}, y[i : i + 1]) for i in range(128)]
    sized = [
        (interpolate(x[i : i + 1], size=(8 * (1 + i % 3),) * 2), y[i : i + 1]) for i in range(128)
    ]
    expected = moved(network, product.quantized(network, [(x, y)], 3)[0], x)
    for data in (named, sized):
        changed, _ = product.quantized(network, data, 3)
        # 16 of the 128 images tell the statistics, at least: as far off as few samples make it.
        assert moved(network, changed, x) < 1.5 * expected


def test_a_last_batch_that_is_smaller_weighs_less():
    """100 samples in batches of 32: the mean loss is over samples, not over batches."""
    network = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    x, y = drawn(100, 4), drawn(100, 2, seed=2)
    y[96:] += 30
    with torch.no_grad():
        expected = float(mse_loss(network(x), y))
    data = [(x[k : k + 32], y[k : k + 32]) for k in range(0, 100, 32)]
    assert product.float_loss(network, data, mse_loss) == pytest.approx(expected, rel=1e-5)


def test_curvature_that_stops_early_has_seen_a_random_part():
    """Sure images first, unsure ones last: what 'fisher' reads of them is a part of both."""
    network = made(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)))
    x = drawn(1600, 4) * torch.linspace(8, 0.2, 1600)[:, None]
    y = network(x).argmax(1)
    given, _ = product.rise_table(network, (x, y), scorer="fisher")
    order = torch.randperm(1600, generator=seeded(5))
    mixed, _ = product.rise_table(network, (x[order], y[order]), scorer="fisher")
    for name in given:
        assert given[name]["weights"][4] == pytest.approx(mixed[name]["weights"][4], rel=0.5)
