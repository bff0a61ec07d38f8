"""Kind D: what a class or function of the user's changes is not what it is derived from."""

import functools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from hq_optuna.network.losses import is_cross_entropy, is_squared_error
from tests.reported import product


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def classifier():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()


def classes():
    return torch.randn(64, 8), torch.randint(0, 3, (64,))


def numbers():
    return torch.randn(64, 8), torch.randn(64, 3)


# Losses


def focal(outputs, labels):
    each = F.cross_entropy(outputs, labels, reduction="none")
    return ((1 - torch.exp(-each)) ** 5 * each).mean()


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs, labels):
        return focal(outputs, labels)


class Tempered(nn.CrossEntropyLoss):
    def __call__(self, outputs, labels):
        return super().__call__(outputs / 3, labels)


class LogCosh(nn.MSELoss):
    def forward(self, outputs, labels):
        return torch.log(torch.cosh(3 * (outputs - labels))).mean()


@functools.wraps(F.cross_entropy)
def wrapped(outputs, labels):
    return focal(outputs, labels)


def hooked():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, given, found: found**2)
    return loss


def hooked_before():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_pre_hook(lambda module, given: (given[0] / 3, given[1]))
    return loss


def patched():
    loss = nn.CrossEntropyLoss()
    loss.forward = focal
    return loss


class Partial(partial):
    def __call__(self, outputs, labels):
        return focal(outputs, labels)


OVERRIDDEN = {
    "forward": Focal,
    "call": Tempered,
    "squared error": LogCosh,
    "wraps": lambda: wrapped,
    "hook": hooked,
    "hook before": hooked_before,
    "patched": patched,
    "partial": lambda: Partial(F.cross_entropy),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_loss_that_is_changed_is_a_loss_of_its_own(name):
    """Its float loss, rises and score are those of a plain function that calls it."""
    loss = OVERRIDDEN[name]()
    data = numbers() if isinstance(loss, nn.MSELoss) else classes()
    parent = nn.MSELoss() if isinstance(loss, nn.MSELoss) else nn.CrossEntropyLoss()
    (got, _), (expected, _), (known, _) = (
        figures(each, data) for each in (loss, lambda z, y: loss(z, y), parent)
    )
    assert got == pytest.approx(expected, rel=1e-6)
    assert got[0] != pytest.approx(known[0], rel=0.1)
    [said] = product.opened(classifier(), data, loss, scorer=None).objective.warnings
    assert "outputs" in said
    with pytest.raises(ValueError, match="knows cross-entropy and squared error"):
        product.opened(classifier(), data, loss, scorer="fisher")


def figures(loss, data):
    """Return score and loss at 4 bits and the loss in float, and all warnings."""
    search = product.opened(classifier(), data, loss)
    scorer = search.objective.prepare()
    found = scorer.score(product.assignment(search, 4))
    return (found.total, found.calibration_loss, scorer.float_loss()), search.objective.warnings


class OnlyNamed(nn.CrossEntropyLoss):
    """A subclass that keeps all that its parent does."""

    def __init__(self, name):
        super().__init__(label_smoothing=0.1)
        self.name = name


def test_a_loss_that_keeps_what_is_known_is_known():
    """A subclass with settings of its own, and a `partial`: scored as cross-entropy is."""
    data = classes()
    expected = product.score(classifier(), data, 4, nn.CrossEntropyLoss(label_smoothing=0.1))
    for loss in (OnlyNamed("mine"), partial(F.cross_entropy, label_smoothing=0.1)):
        assert is_cross_entropy(loss)
        assert product.score(classifier(), data, 4, loss) == expected
    assert is_squared_error(partial(F.mse_loss, reduction="mean"))
    assert not is_squared_error(nn.MSELoss(reduction="sum"))
    assert not is_cross_entropy(partial(F.cross_entropy, target=data[1]))


def test_a_loss_without_a_mean_is_refused():
    """reduction='none': one number a sample, and no loss of the batch."""
    for loss in (nn.CrossEntropyLoss(reduction="none"), partial(F.cross_entropy, reduction="none")):
        with pytest.raises(
            ValueError, match=r"returns one number, the mean of a batch; got \(32,\)"
        ):
            is_classes = isinstance(loss, nn.Module)
            product.opened(classifier(), classes() if is_classes else numbers(), loss)


# Data


class Doubled(TensorDataset):
    """A subclass of which each sample is twice what its tensors hold, in the opposite order."""

    def __getitem__(self, index):
        x, y = super().__getitem__(len(self) - 1 - index)
        return 2 * x, y


class Alone(Dataset):
    """Fetches batches by itself, as `__getitems__` allows."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        raise AssertionError("it gives many at once")

    def __getitems__(self, indices):
        return [(2 * self.x[len(self) - 1 - i], self.y[len(self) - 1 - i]) for i in indices]


class Backwards(Sampler):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))

    def __len__(self):
        return self.n


class DoublingLoader(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


def test_data_are_what_their_classes_give():
    """Datasets, samplers and loaders with methods of their own: read as PyTorch would read them."""
    x, y = classes()
    plain = TensorDataset(x, y)
    expected = product.score(classifier(), (2 * x.flip(0), y.flip(0)), 4)
    for data in (
        Doubled(x, y),
        Alone(x, y),
        DoublingLoader(plain, batch_size=32, sampler=Backwards(64)),
        DataLoader(Doubled(x, y), batch_size=32),
    ):
        assert product.score(classifier(), data, 4) == expected
