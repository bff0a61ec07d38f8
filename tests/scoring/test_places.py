"""What a score is a mean over: samples, however many rows they have, and the places that count."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.curvature import calibration_adam, output_curvature, probe_of
from hq_optuna.network.batches import Batch, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.network.losses import Places
from hq_optuna.rises import CrossEntropy, rise_of_loss
from tests.searches import search
from tests.small_networks import seeded


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def masked(labels, share=0.5):
    return torch.where(torch.rand(labels.shape, generator=seeded(9)) < share, -100, labels)


def test_places_count_as_the_loss_counts_them():
    z, labels = drawn(6, 3, 4), torch.randint(0, 3, (6, 4), generator=seeded(1))
    weight = torch.tensor([1.0, 5.0, 0.5])
    each = F.cross_entropy(z, labels, reduction="none").double()
    for loss_fn, given in (
        (nn.CrossEntropyLoss(weight=weight), labels),
        (F.cross_entropy, masked(labels)),
        (nn.CrossEntropyLoss(weight=weight, ignore_index=1), labels),
    ):
        counted = Places.of(loss_fn).counted(z, given)
        valid = each.where(given != -100, 0.0)
        assert float((counted * valid).mean()) == pytest.approx(float(loss_fn(z, given)), rel=1e-5)
    assert Places().counted(z, labels) is None
    assert Places().counted(z, F.one_hot(labels, 3).float().movedim(-1, 1)) is None
    nothing = Places().counted(z, torch.full_like(labels, -100))
    assert not nothing.any()


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 5.0, 0.5])])
def test_the_rise_is_that_of_the_places_that_count(weight):
    """Second order: against the loss itself, with labels drawn from the network's own softmax."""
    z = drawn(200, 3, 5).double()
    moved = z + 0.01 * drawn(200, 3, 5, seed=2)
    labels = masked(torch.randint(0, 3, (200, 5), generator=seeded(3)))
    loss = nn.CrossEntropyLoss(weight=None if weight is None else weight.double())
    rise = CrossEntropy(temperature=1.0, marks=Places.of(loss))
    p = z.softmax(1)
    change = moved - z
    per_place = 0.5 * ((p * change**2).sum(1) - (p * change).sum(1) ** 2)
    counts = (labels != -100).double()
    if weight is not None:
        counts = counts * weight.double()[labels.clamp_min(0)]
    expected = 200 * float((counts * per_place).sum() / counts.sum())
    assert (rise.of_batch(z, moved, Batch(z, labels, 200))) == pytest.approx(expected, rel=1e-9)
    assert float(rise(z, moved)) != pytest.approx(expected, rel=1e-3)
    # What no label asks for does not decide.
    wild = moved + 100 * (labels == -100).unsqueeze(1)
    wild[:, 0] += 50 * (labels == -100)
    assert (rise.of_batch(z, wild, Batch(z, labels, 200))) == pytest.approx(expected, rel=1e-9)


class Tokens(nn.Module):
    """Reads ``(N, T, 4)``, returns class scores of every token as rows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.two(self.one(x).relu()).relu()).reshape(-1, 3)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("scorer", ["gauss_newton", "fisher"])
def test_rows_of_a_sample_are_one_sample(loss_fn, scorer):
    """The same tokens, alone and in fours, are the same score."""
    x, classes = drawn(64, 4), torch.randint(0, 3, (64,), generator=seeded(1))
    labels = classes if loss_fn is F.cross_entropy else F.one_hot(classes, 3).float()
    scores = []
    for t in (1, 4):
        pairs = [(x.reshape(64 // t, t, 4)[i : i + 8], labels) for i in range(0, 64 // t, 8)]
        batches = [(a, labels[8 * t * i : 8 * t * (i + 1)]) for i, (a, _) in enumerate(pairs)]
        found = search(
            model=Tokens().eval(), calibration=batches, loss_fn=loss_fn, scorer=scorer,
            correction=False, rounding="nearest",
        )  # fmt: skip
        made = found.objective.prepare()
        config = found.space.config([4] * len(found.space.variables))
        scores.append(made.score(config).total)
    # Vectors of the layer sums are drawn anew for another shape, and ranges are of histograms
    # that begin with the first batch.
    assert scores[1] == pytest.approx(scores[0], rel=1e-4 if scorer == "gauss_newton" else 0.5)


def test_ignored_places_do_not_choose_the_bits():
    x = drawn(24, 1, 7, 7)
    x[:, :, :, 4:] *= 20
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)
        ).eval()
    labels = net(x).detach().argmax(1)
    quiet = labels.clone()
    quiet[:, :, 4:] = -100
    scores = {}
    for name, given in (("all", labels), ("quiet", quiet)):
        made = search(model=net, calibration=(x, given), correction=False).objective.prepare()
        scores[name] = made.score(search(model=net, calibration=(x, given)).space.config([4] * 3))
    assert scores["all"].total != pytest.approx(scores["quiet"].total, rel=0.1)
    batch = Batch(x, quiet, len(x))
    rise = rise_of_loss(F.cross_entropy).fitted([net(x).detach()], [batch])
    assert rise.scale != rise_of_loss(F.cross_entropy).fitted([net(x).detach()]).scale


def test_the_probe_has_the_curvature_of_the_places_that_count():
    z = drawn(1, 3, 2).double()
    labels = torch.tensor([[0, -100]])
    probe, generator = probe_of(F.cross_entropy), seeded(0)
    probe.temperature = 1.0
    seen = torch.stack([probe.draw(z, generator, labels)[0] for _ in range(4000)])
    assert not seen[:, :, 1].any()
    p = z[0, :, 0].softmax(0)
    hessian = torch.diag(p) - torch.outer(p, p)  # of the mean over the one place
    found = seen[:, :, 0].T @ seen[:, :, 0] / len(seen)
    torch.testing.assert_close(found, hessian, rtol=0.1, atol=0.02)
    assert probe.scale() == pytest.approx(1.0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_curvature_is_of_the_use_that_is_rounded():
    """A weight that an embedding reads too is rounded in the linear layer alone."""
    x, y = torch.randint(0, 11, (2, 64), generator=seeded(0))
    tied = Tied().eval()
    apart = copy.deepcopy(tied)
    apart.head.weight = nn.Parameter(tied.head.weight.detach().clone())
    data = read_batches((x, y))
    for measure in (
        lambda net, layers: output_curvature(net, layers, data, probe_of(F.cross_entropy)),
        lambda net, layers: calibration_adam(net, layers, data, F.cross_entropy),
    ):
        found = [measure(net, introspect(net, x).layers) for net in (tied, apart)]
        torch.testing.assert_close(found[0].weights["head"], found[1].weights["head"])
    assert tied.head.weight is tied.embedding.weight
